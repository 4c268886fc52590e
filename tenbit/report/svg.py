"""The few lines of SVG writing that charts need. Whatever text goes in comes out escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from markupsafe import Markup, escape

Point = tuple[float, float]


def tag(name: str, *children: str | Markup, **attributes: str | float | None) -> Markup:
    """``tag("text", "a < b", x=1, class_="tick", text_anchor="end")``; attributes that are None are left out."""
    shown = []
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            shown.append(Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), text))
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(shown), inner)


def group(children: Iterable[Markup], **attributes: str | float | None) -> Markup:
    return tag("g", *children, **attributes)


def runs(points: Iterable[Point | None]) -> list[list[Point]]:
    """Cuts a line at its gaps."""
    out: list[list[Point]] = [[]]
    for point in points:
        if point is not None:
            out[-1].append(point)
        elif out[-1]:
            out.append([])
    return [run for run in out if run]


def path(points: Sequence[Point], close: bool = False) -> str:
    """Path data, to a tenth of a pixel."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points) + ("Z" if close else "")


def stairs(points: Sequence[Point]) -> list[Point]:
    """Each value holds until the next one."""
    held = [corner for (_, y), (x, after) in pairwise(points) for corner in ((x, y), (x, after))]
    return [*points[:1], *held]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves positions apart to `gap` at least, as little as it takes, inside [low, high] if there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed
