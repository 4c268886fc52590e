"""An audit as one self-contained HTML page: the verdict, the remedies, and a picture of every layer.

    write_page(json.loads((folder / "audit.json").read_text()), folder)        folder/audit.html

The page is made from audit.json alone, has no script and loads nothing. What came from a model is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenbit.report.audit_figures import overview, pictures
from tenbit.report.template import style, template
from tenbit.report.words import number, percent, power_of_two, scientific, whole
from tenbit.runlog import write_atomic

FILE = "audit.html"
NEAREST = 12  # rows of a table that is not folded away


def write_page(audit: Mapping[str, Any], folder: Path) -> Path:
    """Writes the page into an existing folder, and returns its path."""
    target = folder / FILE
    write_atomic(target, render(audit, folder.name).encode("utf-8", "replace"))
    return target


def render(audit: Mapping[str, Any], name: str) -> str:
    verdict = audit["verdict"]
    return template("audit.html.jinja").render(
        name=name,
        title=f"{audit['precision']} audit · {audit['model']} on {audit['data']}",
        kind=verdict["kind"],
        said=_said(audit),
        because=verdict["because"],
        toml=verdict["toml"],
        notes=[*audit["unfollowed"], *audit["notes"]],
        numbers=_numbers(audit),
        overview=overview(audit),
        pictures=pictures(audit),
        forward=_forward(audit),
        backward=_backward(audit),
        weights=_weights(audit),
        settings=_settings(audit),
        nearest=NEAREST,
        style=style(),
    )


def _said(audit: Mapping[str, Any]) -> str:
    kind, precision, trial, seen = audit["verdict"]["kind"], audit["precision"], audit["trial"], audit["seen"]
    looked = f"{whole(seen['tokens'])} tokens of {whole(seen['answers'])} answers were seen."
    if kind == "unsafe":
        otherwise = f": train it in {' or '.join(audit['instead'])}" if audit["instead"] else ""
        return f"Unsafe in {precision}{otherwise}. {looked}"
    tried = (
        f"One gradient step and one scoring by tenbit's own trainer and engine were finite; KL from FP32 "
        f"{scientific(trial['trainer'])} per token, between training and sampling {scientific(trial['engine'])}. "
        f"{looked}"
    )
    if kind == "safe":
        return f"Safe in {precision}. {tried}"
    return f"Safe in {precision} with what is below in the recipe's precision table, on both sides. {tried}"


def _numbers(audit: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    held = [r for r in audit["forward"] if not r["fp32"]]
    top = max(held, key=lambda r: r["largest"], default=None)
    window = audit["window"]
    out = []
    if top is not None:
        room = number(audit["largest"] / top["largest"]) if top["largest"] else "∞"
        out.append(("largest activation", number(top["largest"]), f"{room}× below {audit['largest']:.6g}"))
        out.append(("where", _tail(top["module"]), top["kind"]))
    if audit["scaled"]:
        high = "∞" if window["high"] is None else power_of_two(window["high"])
        out.append(("loss scales", f"{power_of_two(window['low'])} to {high}", "rounding loses more; none overflows"))
        out.append(("loss scale of the plan", power_of_two(audit["loss_scale"]), ""))
    worst = max(audit["weights"], key=lambda w: w["rms_error"], default=None)
    if worst is not None:
        out.append(("largest error of a weight's cast", scientific(worst["rms_error"]), "of its norm"))
    return out


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-3:])


def _forward(audit: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(module, kind, largest, rms, headroom), the largest first; those in FP32 last."""
    rows = sorted(audit["forward"], key=lambda r: (r["fp32"], -r["largest"]))
    return [
        (
            r["module"], r["kind"], number(r["largest"]), number(r["rms"]),
            "FP32" if r["fp32"] else f"{number(r['headroom'])}×" if r["headroom"] else "–",
        )
        for r in rows
    ]  # fmt: skip


def _backward(audit: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(module, kind, largest, smallest, flushed at 1, flushed at the plan's scale, subnormal there), largest first."""
    rows = [r for r in audit["backward"] if "at_1" in r]
    rows.sort(key=lambda r: (r["fp32"], -r["largest"]))
    return [
        (
            r["module"], r["kind"] + (" (FP32)" if r["fp32"] else ""), number(r["largest"]), number(r["smallest"]),
            percent(r["at_1"]["flushed_share"]), percent(r["at_loss_scale"]["flushed_share"]),
            percent(r["at_loss_scale"]["subnormal"] / r["values"]),
        )
        for r in rows
    ]  # fmt: skip


def _weights(audit: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(tensor, format, largest, become inf, become zero, subnormal, error of the norm), what is wrong first."""
    rows = sorted(audit["weights"], key=lambda w: (w["fits"] and not w["lossy"], -w["rms_error"]))
    return [
        (
            w["name"], w["format"], number(w["largest"]), whole(w["overflowed"]), whole(w["flushed"]),
            whole(w["subnormal"]), scientific(w["rms_error"]),
        )
        for w in rows
    ]  # fmt: skip


def _settings(audit: Mapping[str, Any]) -> list[tuple[str, str]]:
    out = [(key, str(audit[key])) for key in ("model", "data", "device")]
    given = {**audit["answers"], **{k: v for k, v in audit["training"].items() if v is not None}}
    out += [(key, f"{v:g}" if isinstance(v, float) else str(v)) for key, v in given.items()]
    out += [(f"a gradient step's {key}".replace("_", " "), f"{v:,}") for key, v in audit["totals"].items()]
    return out + [(f"version of {key}", v) for key, v in audit["versions"].items()]
