"""A `Figure` as a PNG, by matplotlib: the same panels, places, axes and colours as its SVG, for papers and slides.

Nothing is computed here. Panels come from `chart.laid_out`, ticks and positions from their axes, colours from the
light half of the style sheet, which is also what a page prints with. One unit of the SVG's view box is one hundredth of
an inch.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from functools import cache

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from tenbit.report import chart
from tenbit.report.axis import Axis
from tenbit.report.chart import BOTTOM, LEFT, LINE, WIDTH, Figure, Frame, Panel, Series
from tenbit.report.svg import spread
from tenbit.report.template import style

INCH, SCALE = 100.0, 2  # units of the view box in an inch; pixels for each unit
POINT = 72 / INCH  # one unit as a font size or a line width
STEP, BELOW, ABOVE = "training step", 14.0, 14.0  # the names of the axes, and room for each
MARGIN, TITLE, A_TITLE = 10.0, 17.0, 46  # height of a line of the title, and its letters
CAPTION, A_LINE = 13.0, 76  # the same of the caption
DASHES = {"dashed": (0, (4, 3)), "broken": (0, (3, 2))}


def png(figure: Figure, across: Axis, title: str = "", caption: str = "") -> bytes:
    """The figure on white, with its title above, or a longer one that also says it out of the page, and a caption."""
    out = io.BytesIO()
    canvas(figure, across, title, caption).savefig(out, format="png", dpi=INCH * SCALE, facecolor=colour("card"))
    return out.getvalue()


def canvas(figure: Figure, across: Axis, title: str = "", caption: str = "") -> Canvas:
    """What `png` writes. Both axes are named: there is no page around that says what they are."""
    titles = textwrap.wrap(title or figure.title, A_TITLE) or [""]
    panels, frames = chart.laid_out(figure, across)
    head = TITLE * len(titles) + 7 + (ABOVE if panels[0].unit and not chart.heading(panels[0]) else 0)
    lines = textwrap.wrap(caption, A_LINE)
    below = frames[-1].bottom + BOTTOM + BELOW
    height = head + below + (CAPTION * len(lines) + 8 if lines else 0)
    page = Canvas(figsize=(WIDTH / INCH, height / INCH), dpi=INCH * SCALE, facecolor=colour("card"))
    FigureCanvasAgg(page)

    def write(
        x: float, y: float, words: str, size: float, ink: str, weight: str = "normal", align: str = "left"
    ) -> None:
        """Text at a place of the page, in units of the view box from its upper left corner."""
        # a title is shown as it is: matplotlib would read $...$ as mathematics
        page.text(
            x / WIDTH,
            1 - y / height,
            words,
            fontsize=size * POINT,
            color=ink,
            parse_math=False,
            va="baseline",
            weight=weight,
            ha=align,
        )

    for i, line in enumerate(titles):
        write(MARGIN, TITLE * (i + 1), line, 13, colour("ink"), weight="bold")
    for panel, frame in zip(panels, frames, strict=True):
        bottom = height - head - frame.bottom
        box = (LEFT / WIDTH, bottom / height, (frame.right - LEFT) / WIDTH, frame.height / height)
        axes = page.add_axes(box)
        _panel(axes, panel, frame, across, last=frame is frames[-1])
        name = ", ".join(filter(None, (chart.heading(panel), panel.unit)))
        if name:
            write(LEFT, head + frame.top - 7, name, 11, colour("soft"))
        for series, y in _names(panel, frame):
            ink = colour("soft" if series.colour.startswith("phase") else series.colour)
            write(frame.right + 7, head + y + 3.5, chart.short(series.label), 10.5, ink, weight="bold")
    middle = (LEFT + frames[-1].right) / 2
    write(middle, head + frames[-1].bottom + BOTTOM + 8, STEP, 11, colour("soft"), align="center")
    for i, line in enumerate(lines):
        write(MARGIN, head + below + CAPTION * (i + 1), line, 9, colour("soft"))
    return page


@cache
def _colours() -> dict[str, str]:
    light = re.search(r":root \{(.*?)\}", style(), flags=re.S)
    assert light is not None
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", light.group(1)))


def colour(name: str) -> str:
    """A colour of the style sheet, on light paper."""
    return _colours()[name]


def _panel(axes: Axes, panel: Panel, frame: Frame, across: Axis, last: bool) -> None:
    """One panel, in axis units from 0 to 1 both ways: every value is placed by its own axis."""
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_facecolor(colour("card"))
    axes.tick_params(length=0, labelsize=11 * POINT, labelcolor=colour("soft"), pad=3)
    for side in axes.spines.values():
        side.set_visible(False)
    up = panel.axis

    def part(units: Sequence[float], of: Axis) -> list[float]:
        return [(unit - of.low) / (of.high - of.low) for unit in units]

    axes.set_yticks(part([u for u, _ in up.ticks], up), [label for _, label in up.ticks])
    axes.set_xticks(part([u for u, _ in across.ticks], across), [label for _, label in across.ticks] if last else [])
    for y in part(up.minor, up):
        axes.axhline(y, color=colour("grid"), linewidth=0.5 * POINT, zorder=0)
    for y in part([u for u, _ in up.ticks], up):
        axes.axhline(y, color=colour("grid"), linewidth=POINT, zorder=0, clip_on=False)
    if not any(v is not None for s in panel.series for v in s.y):
        axes.text(0.5, 0.5, "no values", ha="center", va="center", color=colour("soft"), fontsize=11 * POINT)
    for step in panel.marks:
        x = across.at(step) or 0.0
        axes.axvline(x, color=colour("bad"), linewidth=POINT, alpha=0.28, zorder=1)
        axes.plot([x], [1], "x", color=colour("bad"), markersize=6 * POINT, markeredgewidth=1.5 * POINT, clip_on=False)
    if panel.stacked:
        _stack(axes, panel, across)
    else:
        for series in panel.series:
            _curve(axes, series, up, across)


def _placed(axis: Axis, values: Sequence[float | None]) -> np.ndarray:
    """Places between 0 and 1; NaN, which breaks a line, where there is no value or none on this axis."""
    places = [None if v is None else axis.at(v) for v in values]
    return np.array([np.nan if p is None else p for p in places], dtype=float)


def _curve(axes: Axes, series: Series, up: Axis, across: Axis) -> None:
    ink, x, y = colour(series.colour), _placed(across, series.x), _placed(up, series.y)
    if series.band is not None:
        low, high = (_placed(up, side) for side in series.band)
        axes.fill_between(x, low, high, color=ink, alpha=0.18, linewidth=0)
    alone = ~np.isnan(y) & np.isnan(np.r_[np.nan, y[:-1]]) & np.isnan(np.r_[y[1:], np.nan])
    if series.sparse:
        x, y = x[~np.isnan(y)], y[~np.isnan(y)]
        alone = np.ones(len(y), dtype=bool)
    faint = series.style == "faint"
    width = 1.0 if faint else 1.2 if series.sparse else 1.7
    axes.plot(
        x, y, color=ink, linewidth=width * POINT, alpha=0.42 if faint else 1, linestyle=DASHES.get(series.style, "-"),
        drawstyle="steps-post" if series.style == "stairs" else "default", solid_joinstyle="round", clip_on=False,
    )  # fmt: skip
    axes.plot(x[alone], y[alone], "o", color=ink, markersize=4.8 * POINT, markeredgewidth=0, clip_on=False)


def _stack(axes: Axes, panel: Panel, across: Axis) -> None:
    base = np.zeros(len(panel.series[0].x) if panel.series else 0)
    for series in panel.series:
        top = base + np.array([v or 0.0 for v in series.y])
        low, high = (_placed(panel.axis, side.tolist()) for side in (base, top))
        axes.fill_between(_placed(across, series.x), low, high, color=colour(series.colour), linewidth=0, step="mid")
        base = top


def _names(panel: Panel, frame: Frame) -> list[tuple[Series, float]]:
    """The names at the ends of the curves, moved apart as in the SVG. Piles are named from the bottom up."""
    ends: list[tuple[Series, float]] = []
    total = 0.0
    for series in chart.named_at_end(panel):
        known = [v for v in series.y if v is not None]
        total += known[-1] if panel.stacked else 0.0
        y = frame.y(total - known[-1] / 2 if panel.stacked else known[-1])
        if y is not None:
            ends.append((series, y))
    places = spread([y for _, y in ends], LINE, frame.top, frame.bottom)
    return [(series, y) for (series, _), y in zip(ends, places, strict=True)]
