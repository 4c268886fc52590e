"""Charts from values: `Series` in `Panel`s in a `Figure`, drawn to one SVG that needs no script.

A chart knows nothing of runs: whoever calls gives series, with a band where there is one (the spread of a bucket
of steps, or of several seeds). `draw` also returns the read-out under the title, at the last step, and the same
numbers for every step, from which the page's script shows the step under the pointer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from markupsafe import Markup

from tenbit.report.axis import Axis
from tenbit.report.svg import Point, group, path, runs, spread, stairs, tag
from tenbit.report.words import number

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 380.0, 42.0, 12.0, 10.0, 22.0
BETWEEN, LETTER, LINE = 18.0, 6.7, 12.5  # LETTER: of the widest common system font, bold
LONGEST_NAME = 14
MOST_POINTS = 360  # a point a pixel; more are drawn as the band of their bucket

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """One curve. None in `y` is a gap. `colour` names a colour of the style sheet."""

    label: str
    x: Sequence[int]
    y: Values
    colour: str = "plain"
    style: Literal["line", "broken", "faint", "points", "dashed", "stairs"] = "line"
    show: Callable[[float], str] = number
    band: tuple[Values, Values] | None = None
    quiet: bool = False  # neither labelled nor read out: it only lies behind another series
    of: Literal["mean", "largest", "smallest"] = "mean"  # what is drawn of steps that share a pixel

    @property
    def sparse(self) -> bool:
        """Evaluations: far between, so they are joined over the steps that have none."""
        return self.style in ("points", "dashed")

    def thinned(self, most: int = MOST_POINTS) -> Series:
        """Means over buckets of steps, with a band from the smallest value to the largest; or their extremes alone."""
        if len(self.x) <= most or self.sparse:
            return self
        size = -(-len(self.x) // most)
        starts = range(0, len(self.x), size)
        cells = [[v for v in self.y[i : i + size] if v is not None] for i in starts]
        low, high = self.band or (self.y, self.y)
        x = [self.x[min(i + size, len(self.x)) - 1] for i in starts]
        if self.of != "mean":
            pick = max if self.of == "largest" else min
            return replace(self, x=x, y=[pick(c, default=None) for c in cells])
        return replace(
            self,
            x=x,
            y=[sum(c) / len(c) if c else None for c in cells],
            band=(
                [min((v for v in low[i : i + size] if v is not None), default=None) for i in starts],
                [max((v for v in high[i : i + size] if v is not None), default=None) for i in starts],
            ),
        )


@dataclass(frozen=True)
class Panel:
    """Series over one vertical axis. `marks` are steps to cross out; `stacked` piles the series up. `unit` is what the
    axis counts, for a figure that stands alone."""

    series: Sequence[Series]
    axis: Axis
    title: str = ""
    height: float = 128.0
    stacked: bool = False
    marks: Sequence[int] = ()
    unit: str = ""


@dataclass(frozen=True)
class Figure:
    title: str
    panels: Sequence[Panel]
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """What the page shows of a figure. `readout` is (colour, label, value at the end); `data` is for the script."""

    title: str
    note: str
    svg: Markup
    readout: list[tuple[str, str, str]]
    last: int | None
    data: dict[str, Any]


@dataclass(frozen=True)
class Frame:
    """Where a panel's values land, in the units of the view box."""

    top: float
    height: float
    right: float
    across: Axis
    up: Axis

    def x(self, step: float) -> float:
        return LEFT + (self.across.at(step) or 0.0) * (self.right - LEFT)

    def y(self, value: float) -> float | None:
        at = self.up.at(value)
        return None if at is None else self.top + (1 - at) * self.height

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def points(self, x: Sequence[int], y: Values) -> list[Point | None]:
        placed = [(step, None if v is None else self.y(v)) for step, v in zip(x, y, strict=True)]
        return [None if at is None else (self.x(step), at) for step, at in placed]


def draw(figure: Figure, across: Axis, ident: str) -> Drawing:
    """Draws a figure over the steps of `across`; `ident` makes its element ids unique on the page."""
    panels, frames = laid_out(figure, across)
    right, bottom = frames[0].right, frames[-1].bottom
    height = bottom + BOTTOM
    marks = [_panel(panel, frame, named_at_end(panel)) for panel, frame in zip(panels, frames, strict=True)]
    svg = tag(
        "svg",
        tag("title", figure.title, id=f"{ident}-t"),
        tag("desc", describe(figure), id=f"{ident}-d"),
        *marks,
        _step_ticks(across, right, bottom),
        group([], class_="cursor"),
        viewBox=f"0 0 {WIDTH:.0f} {height:.0f}",
        role="img",
        tabindex="0",
        aria_labelledby=f"{ident}-t {ident}-d",
    )
    data = _data(panels, frames, right, bottom)
    last = data["x"][-1] if data["x"] else None
    readout = [(r["colour"], r["label"], r["text"][-1] if r["text"] else "–") for r in data["rows"]]
    return Drawing(figure.title, figure.note, svg, readout, last, data)


def laid_out(figure: Figure, across: Axis) -> tuple[list[Panel], list[Frame]]:
    """The panels as they are drawn, with no more points than fit, and where each lies. Shared by SVG and PNG."""
    panels = [replace(p, series=[s.thinned() for s in p.series]) for p in figure.panels]
    widest = max((len(short(s.label)) for p in panels for s in named_at_end(p)), default=0)
    right = WIDTH - (widest * LETTER + 12 if widest else RIGHT)
    frames, top = [], TOP
    for panel in panels:
        top += 16 if heading(panel) else 0
        frames.append(Frame(top, panel.height, right, across, panel.axis))
        top += panel.height + BETWEEN
    return panels, frames


def heading(panel: Panel) -> str:
    return " ".join(filter(None, (panel.title, panel.axis.unit)))


def describe(figure: Figure) -> str:
    """The figure in words, for those who do not see it."""
    parts = []
    for series in (s for p in figure.panels for s in p.series if not s.quiet):
        known = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None]
        if not known:
            parts.append(f"{series.label}: no values.")
            continue
        (a, first), (b, last) = known[0], known[-1]
        low, high = min(y for _, y in known), max(y for _, y in known)
        show = series.show
        parts.append(
            f"{series.label}: {show(first)} at step {a}, {show(last)} at step {b}, "
            f"between {show(low)} and {show(high)}."
        )
    return " ".join(parts)


def named_at_end(panel: Panel) -> list[Series]:
    """Series that are named at the end of their curve: where there are several to tell apart."""
    named = [s for s in panel.series if not s.quiet and any(v is not None for v in s.y)]
    return named if len(named) > 1 else []


def short(label: str) -> str:
    """A label that fits beside its curve; the read-out has all of it."""
    return label if len(label) <= LONGEST_NAME else label[: LONGEST_NAME - 1].rstrip() + "…"


def _panel(panel: Panel, frame: Frame, named: list[Series]) -> Markup:
    parts = [_grid(frame)]
    if heading(panel):
        parts.append(tag("text", heading(panel), x=LEFT, y=frame.top - 8, class_="heading"))
    if not any(v is not None for s in panel.series for v in s.y):
        middle = (LEFT + frame.right) / 2
        at = frame.top + frame.height / 2
        parts.append(tag("text", "no values", x=middle, y=at, class_="tick", text_anchor="middle"))
    ends: list[tuple[Series, float]] = []
    if panel.stacked:
        parts += _stack(panel.series, frame, ends)
    else:
        for step in panel.marks:
            x = frame.x(step)
            parts.append(tag("path", d=path([(x, frame.top), (x, frame.bottom)]), class_="mark"))
            parts.append(tag("path", d=f"M{x - 3:.1f},{frame.top - 3:.1f}l6,6m0,-6l-6,6", class_="cross"))
        for series in panel.series:
            parts += _curve(series, frame)
            last = next((p for p in reversed(frame.points(series.x, series.y)) if p), None)
            if last:
                ends.append((series, last[1]))
    ends = [(s, y) for s, y in ends if any(s is n for n in named)]
    for (series, _), y in zip(ends, spread([y for _, y in ends], LINE, frame.top, frame.bottom), strict=True):
        text = tag("text", short(series.label), x=frame.right + 7, y=y + 3.5, class_=f"name c-{series.colour}")
        parts.append(text)
    return group(parts)


def _grid(frame: Frame) -> Markup:
    parts, up = [], frame.up

    def at(unit: float) -> float:
        return frame.top + (1 - (unit - up.low) / (up.high - up.low)) * frame.height

    for unit in up.minor:
        parts.append(tag("path", d=path([(LEFT, at(unit)), (frame.right, at(unit))]), class_="grid minor"))
    for unit, label in up.ticks:
        parts.append(tag("path", d=path([(LEFT, at(unit)), (frame.right, at(unit))]), class_="grid"))
        parts.append(tag("text", label, x=LEFT - 6, y=at(unit) + 3.5, class_="tick", text_anchor="end"))
    return group(parts)


def _step_ticks(across: Axis, right: float, bottom: float) -> Markup:
    parts = []
    for unit, label in across.ticks:
        x = LEFT + (across.at(unit) or 0.0) * (right - LEFT)
        parts.append(tag("path", d=path([(x, bottom), (x, bottom + 3)]), class_="grid"))
        parts.append(tag("text", label, x=x, y=bottom + 15, class_="tick", text_anchor="middle"))
    return group(parts)


def _curve(series: Series, frame: Frame) -> list[Markup]:
    colour = f"c-{series.colour}"
    parts = []
    if series.band is not None:
        low, high = (frame.points(series.x, side) for side in series.band)
        both = [(a, b) if a and b else None for a, b in zip(low, high, strict=True)]
        cut: list[list[tuple[Point, Point]]] = [[]]
        for pair in both:
            if pair:
                cut[-1].append(pair)
            elif cut[-1]:
                cut.append([])
        for run in cut:
            if len(run) > 1:
                outline = [b for _, b in run] + [a for a, _ in reversed(run)]
                parts.append(tag("path", d=path(outline, close=True), class_=f"band {colour}"))
    lines = runs(frame.points(series.x, series.y))
    if series.sparse:
        lines = [[p for run in lines for p in run]] if lines else []
    for run in lines:
        if len(run) > 1:
            drawn = stairs(run) if series.style == "stairs" else run
            parts.append(tag("path", d=path(drawn), class_=f"line {series.style} {colour}"))
        if len(run) == 1 or series.sparse:
            parts += [tag("circle", cx=x, cy=y, r=2.4, class_=f"dot {colour}") for x, y in run]
    return parts


def _stack(series: Sequence[Series], frame: Frame, ends: list[tuple[Series, float]]) -> list[Markup]:
    """Piles of one step's width each, lowest series first; appends the middle of each top at the end to `ends`."""
    x = series[0].x if series else []
    rows = [i for i in range(len(x)) if any(s.y[i] is not None for s in series)]
    edges = {}
    for i in rows:
        before = (x[i] + x[i - 1]) / 2 if i - 1 in edges else x[i] - 0.5
        after = (x[i] + x[i + 1]) / 2 if i + 1 < len(x) else x[i] + 0.5
        edges[i] = (frame.x(max(before, frame.across.low)), frame.x(min(after, frame.across.high)))
    parts, base = [], dict.fromkeys(rows, 0.0)
    for one in series:
        upper = {i: base[i] + (one.y[i] or 0.0) for i in rows}
        blocks: list[list[int]] = []
        for i in rows:
            if blocks and blocks[-1][-1] == i - 1:
                blocks[-1].append(i)
            else:
                blocks.append([i])
        for block in blocks:
            above = [(e, frame.y(upper[i]) or 0.0) for i in block for e in edges[i]]
            below = [(e, frame.y(base[i]) or 0.0) for i in reversed(block) for e in reversed(edges[i])]
            parts.append(tag("path", d=path(above + below, close=True), class_=f"area c-{one.colour}"))
        if rows:
            top, low = frame.y(upper[rows[-1]]) or 0.0, frame.y(base[rows[-1]]) or 0.0
            if low - top > 5:  # thinner ones are in the read-out
                ends.append((one, (top + low) / 2))
        base = upper
    return parts


def _data(panels: Sequence[Panel], frames: Sequence[Frame], right: float, bottom: float) -> dict[str, Any]:
    """Positions and texts of every step. Sparse series keep their last value until the next one."""
    shown = [(s, p, f) for p, f in zip(panels, frames, strict=True) for s in p.series if not s.quiet]
    xs = sorted({x for s, _, _ in shown for x in s.x})
    rows = []
    for series, panel, frame in shown:
        at = dict(zip(series.x, series.y, strict=True))
        text, py, held = [], [], None
        for x in xs:
            value = at.get(x)
            if series.sparse:
                held = value if value is not None else held
            text.append("–" if (v := held if series.sparse else value) is None else series.show(v))
            y = frame.y(value) if value is not None and not panel.stacked else None
            py.append(None if y is None else round(y, 1))
        rows.append({"colour": series.colour, "label": series.label, "text": text, "y": py})
    px = [round(frames[0].x(x), 1) for x in xs]
    return {"x": xs, "px": px, "top": TOP, "bottom": bottom, "right": right, "rows": rows}
