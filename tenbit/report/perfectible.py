"""A perfectible set's histogram, as a figure and as one self-contained HTML page.

    page("mine", summary)        the whole page; no script, loads nothing
    figure(summary)              the histogram as an SVG file

Both are light or dark by the reader's setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from tenbit.report.axis import linear
from tenbit.report.svg import group, path, tag
from tenbit.report.template import style, template
from tenbit.report.words import percent, whole
from tenbit.studies.perfectible_rule import VERDICTS
from tenbit.studies.perfectible_summary import remarks

COLOURS = {"kept": "accuracy", "too easy": "rest", "unsolvable": "extreme"}
WIDTH, LEFT, RIGHT, TOP, HEIGHT = 640.0, 46.0, 8.0, 34.0, 210.0


def histogram(summary: Mapping[str, Any]) -> Markup:
    """Problems by initial accuracy, in tenths; those with none and with all right have bars of their own."""
    bins = summary["histogram"]
    totals = [sum(b[v] for v in VERDICTS) for b in bins]
    up = linear([0.0, float(max(totals))], low=0.0)
    bottom, slot = TOP + HEIGHT, (WIDTH - LEFT - RIGHT) / len(bins)

    def y(value: float) -> float:
        return bottom - (up.at(value) or 0.0) * HEIGHT

    parts = []
    for unit, label in up.ticks:
        parts.append(tag("path", d=path([(LEFT, y(unit)), (WIDTH - RIGHT, y(unit))]), class_="grid"))
        parts.append(tag("text", label, x=LEFT - 6, y=y(unit) + 3.5, class_="tick", text_anchor="end"))
    for place, (b, total) in enumerate(zip(bins, totals, strict=True)):
        x, base = LEFT + place * slot + 2, 0
        for verdict in VERDICTS:
            if b[verdict]:
                top = y(base + b[verdict])
                height = y(base) - top
                shape = tag("rect", x=x, y=top, width=slot - 4, height=height, class_=f"area c-{COLOURS[verdict]}")
                parts.append(shape)
                base += b[verdict]
        middle = x + slot / 2 - 2
        if total:
            parts.append(tag("text", whole(total), x=middle, y=y(total) - 4, class_="tick", text_anchor="middle"))
        if place in (0, len(bins) - 1):
            name = "none" if place == 0 else "all"
            parts.append(tag("text", name, x=middle, y=bottom + 15, class_="tick", text_anchor="middle"))
    for tenth in range(1, 10):
        x = LEFT + (1 + tenth) * slot
        parts.append(tag("text", f"{10 * tenth}%", x=x, y=bottom + 15, class_="tick", text_anchor="middle"))
    for place, verdict in enumerate(VERDICTS):
        x, colour = LEFT + 110.0 * place, COLOURS[verdict]
        parts.append(tag("rect", x=x, y=4.0, width=10.0, height=10.0, class_=f"area c-{colour}"))
        parts.append(tag("text", verdict, x=x + 15, y=13.0, class_="tick"))
    said = "; ".join(f"{b['accuracy']}: {total}" for b, total in zip(bins, totals, strict=True))
    return tag(
        "svg",
        tag("title", "Problems by initial accuracy", id="histogram-t"),
        tag("desc", said, id="histogram-d"),
        group(parts),
        viewBox=f"0 0 {WIDTH:.0f} {bottom + 24:.0f}",
        role="img",
        aria_labelledby="histogram-t histogram-d",
        xmlns="http://www.w3.org/2000/svg",
    )


def figure(summary: Mapping[str, Any]) -> str:
    """The histogram as a file of its own, which carries the pages' style sheet."""
    own = Markup("<style>{}\nsvg {{ background: var(--card); font-family: system-ui, sans-serif; }}</style>")
    start, end, rest = histogram(summary).partition(">")
    return str(start + end + own.format(style()) + rest) + "\n"


def page(name: str, summary: Mapping[str, Any]) -> str:
    keeps, responses = summary["keeps"], summary["responses"]
    n, kept = summary["problems"], summary["kept"]
    borders = f"{keeps['fewest']} to {keeps['most']} of {summary['samples']} responses"
    numbers = [
        ("kept", whole(kept), percent(kept / n)),
        ("too easy", whole(summary["too_easy"]), percent(summary["too_easy"] / n)),
        ("unsolvable", whole(summary["unsolvable"]), percent(summary["unsolvable"] / n)),
        ("accuracy, all problems", percent(summary["accuracy"]), ""),
        ("responses saved", percent(responses["saved"] / responses["of"]), f"{responses['saved']:,}"),
    ]
    return template("perfectible.html.jinja").render(
        name=name,
        title=f"{summary['model']} on {summary['data']}",
        verdict=f"{kept:,} of {n:,} problems are perfectible: {borders} are right.",
        numbers=numbers,
        remarks=remarks(summary),
        picture=histogram(summary),
        early=summary["stopped_early"],
        verdicts=VERDICTS,
        bins=[(b["accuracy"], [whole(b[v]) for v in VERDICTS]) for b in summary["histogram"]],
        settings=[(key, str(value)) for key, value in summary["settings"].items()],
        style=style(),
    )
