"""An audit's pictures, from what audit.json holds: one a layer, and one of all layers.

Above, how large activations get, against the largest number of the format; below, gradients by exponent as they are at
the plan's loss scale, against the range of the format: what lies left of it is flushed, right of it overflows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tenbit.precision import Format
from tenbit.report.svg import Point, group, path, runs, tag
from tenbit.report.words import number, percent, scientific, superscript

WIDTH, LEFT, RIGHT = 380.0, 132.0, 14.0
ROW, BAR = 15.0, 9.0
HISTOGRAM = 96.0
WIDE = 2.0**60  # a format that reaches so far has its edges outside every picture
SPAN = 44
SHORTER = (
    ("_layernorm", " norm"), ("_norm", " norm"), ("post_attention", "post-attn"), ("pre_feedforward", "pre-MLP"),
    ("post_feedforward", "post-MLP"), ("self_attn", "attn"), ("block_sparse_moe", "moe"),
)  # fmt: skip
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """One figure of the page: a title, a sentence, and the drawing. `bad`: something in it does not fit."""

    title: str
    note: str
    svg: Markup
    bad: bool


@dataclass(frozen=True)
class Scale:
    """Exponents of two to places between two edges of the drawing."""

    low: float
    high: float
    left: float = LEFT
    right: float = WIDTH - RIGHT

    def at(self, exponent: float) -> float:
        part = (exponent - self.low) / (self.high - self.low)
        return self.left + min(1.0, max(0.0, part)) * (self.right - self.left)


def parts_of(audit: Mapping[str, Any]) -> list[tuple[str, list[Row], list[Row]]]:
    """(name, forward rows, backward rows): what is before the layers, each layer, and what is after."""
    layers: list[str] = audit["layers"]

    def place(row: Row) -> int:
        name = row["module"]
        inside = next((i for i, layer in enumerate(layers) if name == layer or name.startswith(f"{layer}.")), None)
        if inside is not None:
            return inside + 1
        return 0 if "embed" in name else len(layers) + 1

    names = ["embedding", *layers, "last norm and head"]
    kinds = [[[r for r in audit[side] if place(r) == i] for side in ("forward", "backward")] for i in range(len(names))]
    return [(name, forward, backward) for name, (forward, backward) in zip(names, kinds, strict=True)]


def pictures(audit: Mapping[str, Any]) -> list[Picture]:
    format = Format(audit["format"])
    parts = parts_of(audit)
    ranges = _forward_scale(parts, format), _backward_scale(parts, audit, format)
    return [
        _picture(name, forward, backward, audit, format, ranges, f"p{i}")
        for i, (name, forward, backward) in enumerate(parts)
        if forward or backward
    ]


def _forward_scale(parts: Sequence[tuple[str, list[Row], list[Row]]], format: Format) -> Scale:
    sizes = [math.log2(r["largest"]) for _, rows, _ in parts for r in rows if r["largest"] > 0]
    top = math.log2(format.largest)
    shown = [s for s in sizes if s > -24]
    low = min([*shown, top - 12])
    high = max([*sizes, top]) + 1 if format.largest < WIDE else max([*sizes, 10.0]) + 4
    return Scale(math.floor(low) - 1, math.ceil(high))


def _backward_scale(
    parts: Sequence[tuple[str, list[Row], list[Row]]], audit: Mapping[str, Any], format: Format
) -> Scale:
    shift = math.log2(audit["loss_scale"])
    found = [int(k) + shift for _, _, rows in parts for r in rows for k, n in r["exponents"].items() if n]
    if format.largest > WIDE:  # nothing of the format's edges is near: as many powers of two as hold what there is
        top = max(found, default=0)
        return Scale(max(min(found, default=0), top - SPAN) - 1, top + 2)
    first, top = _exponent(format.smallest_subnormal), _exponent(format.largest) + 1
    return Scale(max(min([*found, first - 4]), first - 24) - 1, max([*found, top]) + 3)


def _exponent(power: float) -> int:
    return math.frexp(power)[1] - 1


def _picture(
    name: str, forward: list[Row], backward: list[Row], audit: Mapping[str, Any], format: Format,
    ranges: tuple[Scale, Scale], ident: str,
) -> Picture:  # fmt: skip
    rows = shown_rows(forward, name)
    tops = [r for r in forward if not r["fp32"]]
    high = max((r["largest"] for r in tops), default=0.0)
    over = sum(r["at_loss_scale"]["overflowed"] for r in backward if "at_loss_scale" in r and not r["fp32"])
    lost = [r["at_loss_scale"]["squares_share"] for r in backward if "at_loss_scale" in r and not r["fp32"]]
    bad = high > format.largest or over > 0 or any(r["not_finite"] for r in forward)
    said = [f"largest {number(high)}, {number(format.largest / high)}× below the end"] if high else []
    if lost:
        said.append(
            f"of a gradient's squared norm {scientific(max(lost))} is flushed" if max(lost) else "no gradient lost"
        )
    if over:
        said.append(f"{over:,} gradients overflow")
    bars, height = _bars(rows, ranges[0], format)
    columns = _columns(backward, audit, ranges[1], format, height + 30)
    total = height + 30 + HISTOGRAM + 40
    svg = tag(
        "svg",
        tag("title", f"{name}: activations and gradients", id=f"{ident}-t"),
        tag("desc", "; ".join(said) or "nothing was seen", id=f"{ident}-d"),
        bars,
        columns,
        viewBox=f"0 0 {WIDTH:.0f} {total:.0f}",
        role="img",
        aria_labelledby=f"{ident}-t {ident}-d",
    )
    return Picture(name, "; ".join(said), svg, bad)


def shown_rows(forward: Sequence[Row], name: str) -> list[tuple[str, Row]]:
    """(label, row) without tensors that were seen under another name already; of a stack of them the outermost stays.

    A tensor is the same where everything that was measured of it is: an output and the next module's input.
    """
    out, seen = [], set()
    for row in forward:
        key = (row["largest"], row["rms"], row["count"])
        if row["kind"] != "product" and key not in seen:
            seen.add(key)
            inside = row["module"] == name or row["module"].startswith(f"{name}.")
            own = row["module"].removeprefix(name) if inside else row["module"].rpartition(".")[2]
            own = own.removeprefix(".") or "residual stream"
            kind = {"input": "in", "output": "out", "logits": ""}.get(row["kind"], row["kind"])
            out.append((f"{own} {kind}".strip(), row))
    return out


def _short(label: str, most: int = 21) -> str:
    """A module's name in the room beside a bar: words shortened that all models have, then the middle left out."""
    for long, short in SHORTER:
        label = label.replace(long, short)
    if len(label) <= most:
        return label
    end = (most - 1) // 2 + 3  # what tells two places apart stands at the end: "in", "out"
    return f"{label[: most - 1 - end]}…{label[-end:]}"


def _bars(rows: Sequence[tuple[str, Row]], across: Scale, format: Format) -> tuple[Markup, float]:
    top = 20.0
    bottom = top + ROW * max(1, len(rows))
    end = math.log2(format.largest)
    parts = [tag("text", "largest |x|, forward", x=LEFT, y=10.0, class_="heading")]
    parts += _ticks(across, top, bottom)
    for i, (label, row) in enumerate(rows):
        y = top + ROW * i
        size = math.log2(row["largest"]) if row["largest"] > 0 else across.low
        x = across.at(size)
        colour = (
            "rest" if row["fp32"] else "bad" if row["largest"] > format.largest or row["not_finite"] else "accuracy"
        )
        parts.append(tag("text", _short(label), x=LEFT - 6, y=y + 10.5, class_="tick", text_anchor="end"))
        box = [(across.left, y + 3), (x, y + 3), (x, y + 3 + BAR), (across.left, y + 3 + BAR)]
        parts.append(tag("path", d=path(box, close=True), class_=f"area c-{colour}"))
        value = number(row["largest"]) + (" FP32" if row["fp32"] else "")
        fits = across.right - x > 8 + 6.2 * len(value)
        if fits:
            parts.append(tag("text", value, x=x + 4, y=y + 10.5, class_="tick"))
        else:
            kind = "onrest" if row["fp32"] else "inbar"
            parts.append(tag("text", value, x=x - 4, y=y + 11, class_=kind, text_anchor="end"))
    if across.low < end < across.high:
        x = across.at(end)
        parts.append(tag("path", d=path([(x, top - 4), (x, bottom)]), class_="edge"))
        parts.append(tag("text", f"{format.largest:.6g}", x=x, y=top - 7, class_="tick limit", text_anchor="middle"))
    return group(parts), bottom


def _ticks(across: Scale, top: float, bottom: float, every: int = 0) -> list[Markup]:
    span = across.high - across.low
    every = every or next(n for n in (2, 4, 5, 8, 10, 20, 40, 80, 160) if span / n <= 7)
    parts = []
    for k in range(math.ceil(across.low / every) * every, math.floor(across.high) + 1, every):
        x = across.at(k)
        parts.append(tag("path", d=path([(x, top), (x, bottom)]), class_="grid"))
        parts.append(tag("text", f"2{superscript(k)}", x=x, y=bottom + 12, class_="tick", text_anchor="middle"))
    return parts


def _columns(backward: Sequence[Row], audit: Mapping[str, Any], across: Scale, format: Format, top: float) -> Markup:
    """Gradients by exponent: of activations and of parameters, piled up; regions of the format behind them."""
    across = Scale(across.low, across.high, 20.0)
    top, bottom = top + 26, top + 26 + HISTOGRAM - 14
    shift = round(math.log2(audit["loss_scale"]))
    counts: dict[str, dict[int, int]] = {"activations": {}, "parameters": {}}
    for row in backward:
        if row["fp32"]:
            continue
        side = counts["parameters" if row["kind"] == "weight" else "activations"]
        for k, n in row["exponents"].items():
            at = max(math.ceil(across.low), int(k) + shift)
            side[at] = side.get(at, 0) + n
    whole = sum(n for side in counts.values() for n in side.values())
    told = f"gradients × 2{superscript(shift)}, share of values" if shift else "gradients, share of values"
    parts = [tag("text", told, x=across.left, y=top - 16, class_="heading")]
    parts += _regions(across, format, top, bottom)
    parts += _ticks(across, top, bottom)
    if not whole:
        middle = (across.left + across.right) / 2
        return group([*parts, tag("text", "none", x=middle, y=(top + bottom) / 2, class_="tick", text_anchor="middle")])
    exponents = sorted({k for side in counts.values() for k in side})
    peak = max(sum(side.get(k, 0) for side in counts.values()) for k in exponents)
    for k in exponents:
        base = 0
        for name, colour in (("parameters", "sequence"), ("activations", "scale")):
            n = counts[name].get(k, 0)
            if n:
                low, high = (bottom - (bottom - top) * v / peak for v in (base, base + n))
                left, right = across.at(k) + 0.4, across.at(k + 1) - 0.4
                box: list[Point] = [
                    (left, low),
                    (right, low),
                    (right, min(high, low - 0.6)),
                    (left, min(high, low - 0.6)),
                ]
                parts.append(tag("path", d=path(box, close=True), class_=f"area c-{colour}"))
            base += n
    parts.append(tag("text", percent(peak / whole, 0), x=across.right, y=top - 16, class_="tick", text_anchor="end"))
    return group(parts)


def _regions(across: Scale, format: Format, top: float, bottom: float) -> list[Markup]:
    first, normal = _exponent(format.smallest_subnormal) - 1, _exponent(format.smallest_normal)
    last = _exponent(format.largest) + 1
    regions = (
        ("zero", across.low, first, "lost"),
        ("subnormal", first, normal, "coarse"),
        ("overflow", last, across.high, "lost"),
    )
    parts = []
    for name, low, high, kind in regions:
        if min(high, across.high) <= max(low, across.low):
            continue
        a, b = across.at(low), across.at(high)
        parts.append(tag("path", d=path([(a, top), (b, top), (b, bottom), (a, bottom)], close=True), class_=kind))
        if b - a > 5.6 * len(name):
            parts.append(tag("text", name, x=(a + b) / 2, y=top - 3, class_="tick", text_anchor="middle"))
    return parts


def overview(audit: Mapping[str, Any]) -> Markup | None:
    """All layers: the largest activation of the stream, of attention and of the MLP. None for fewer than two layers."""
    layers: list[str] = audit["layers"]
    if len(layers) < 2:
        return None
    lines: dict[str, list[float | None]] = {}
    for label, colour, inside in (
        ("residual stream", "accuracy", lambda own: own == ""),
        ("attention", "scale", lambda own: ("attn" in own or "attention" in own) and "norm" not in own),
        ("MLP", "mismatch", lambda own: "mlp" in own or "feed_forward" in own or "moe" in own),
    ):
        values = []
        for layer in layers:
            own = [
                r["largest"] for r in audit["forward"]
                if (r["module"] == layer or r["module"].startswith(f"{layer}."))
                and inside(r["module"].removeprefix(layer).removeprefix(".").partition(".")[0])
                and not r["fp32"] and r["kind"] != "product"
            ]  # fmt: skip
            values.append(max(own, default=None))
        lines[f"{label}|{colour}"] = values
    return _lines(lines, Format(audit["format"]))


def _lines(lines: Mapping[str, Sequence[float | None]], format: Format) -> Markup:
    left, right, top, bottom = 36.0, WIDTH - 104, 18.0, 230.0
    n = len(next(iter(lines.values())))
    known = [math.log2(v) for values in lines.values() for v in values if v]
    end = math.log2(format.largest)
    low, high = (
        math.floor(min([*known, end - 10 if format.largest < WIDE else 0])),
        math.ceil(max([*known, end if format.largest < WIDE else 4])) + 1,
    )

    def y(exponent: float) -> float:
        return bottom - (exponent - low) / (high - low) * (bottom - top)

    def x(i: int) -> float:
        return left + (right - left) * (i / (n - 1))

    parts = []
    every = max(1, math.ceil((high - low) / 6))
    for k in range(low, high + 1, every):
        parts.append(tag("path", d=path([(left, y(k)), (right, y(k))]), class_="grid"))
        parts.append(tag("text", f"2{superscript(k)}", x=left - 6, y=y(k) + 3.5, class_="tick", text_anchor="end"))
    for i in range(0, n, max(1, math.ceil(n / 9))):
        parts.append(tag("text", str(i), x=x(i), y=bottom + 15, class_="tick", text_anchor="middle"))
    if low < end < high:
        parts.append(tag("path", d=path([(left, y(end)), (right, y(end))]), class_="edge"))
        parts.append(tag("text", f"{format.largest:.6g}", x=right + 7, y=y(end) + 3.5, class_="tick limit"))
    ends = []
    for key, values in lines.items():
        label, _, colour = key.partition("|")
        points = [None if not v else (x(i), y(math.log2(v))) for i, v in enumerate(values)]
        for run in runs(points):
            parts.append(tag("path", d=path(run), class_=f"line c-{colour}"))
            parts += [tag("circle", cx=a, cy=b, r=2.2, class_=f"dot c-{colour}") for a, b in run]
        last = next((p for p in reversed(points) if p), None)
        if last:
            ends.append((label, colour, last[1]))
    placed: list[float] = []
    for label, colour, at in sorted(ends, key=lambda e: e[2]):
        at = max([at, *(p + 13 for p in placed[-1:])])
        placed.append(at)
        parts.append(tag("text", label, x=right + 7, y=at + 3.5, class_=f"name c-{colour}"))
    title = tag("title", "The largest activation of every layer")
    return tag("svg", title, *parts, viewBox=f"0 0 {WIDTH:.0f} {bottom + 24:.0f}", role="img")
