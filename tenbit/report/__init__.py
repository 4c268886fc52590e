"""Run folder -> one self-contained HTML page; several -> one page that compares them (`many.py`).

    write_report(Path("runs/demo"))        # runs/demo/report.html
    report([Path("runs/a"), Path("runs/b")], Path("page.html"))

The page reads without a network and without JavaScript; a small script adds the numbers of the step under the
pointer, in all figures at once. Everything that came from a model, a data set or a recipe is escaped, and the
page's content-security policy allows that one script only.

    reading  the folder, as one value          axis, svg, chart   series -> drawing
    target   where a page may lie
    figures  metrics -> figures, in sections   words, verdict     numbers and sentences
    compare  formats on the same weights       page.html.jinja    the page
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tenbit.report import axis
from tenbit.report.chart import draw
from tenbit.report.compare import compare
from tenbit.report.figures import sections
from tenbit.report.judged import alarms, sanity
from tenbit.report.reading import Run, read_run
from tenbit.report.target import refuse_no_page, writing
from tenbit.report.template import HERE, style, template
from tenbit.report.verdict import key_numbers, verdict
from tenbit.report.words import number, whole
from tenbit.runlog import Row, rows_file, write_atomic

_UNKNOWN: Row = {key: "–" for key in ("problem", "prompt", "response", "reward", "length", "finish")}


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes ``report.html`` into the run folder, or `out`, and returns its path.

    Works on a run in progress. Raises ValueError if the folder holds no run, or `out` cannot be a page.
    """
    folder = Path(folder)
    target = Path(out) if out is not None else folder / "report.html"
    if out is not None:
        refuse_no_page(target)
    page = render(read_run(folder)).encode("utf-8", "replace")
    with writing(target) if out is not None else contextlib.nullcontext():
        write_atomic(target, page)
    return target


def report(paths: Sequence[Path], out: Path | None = None, *, png: bool = True) -> Path:
    """The page of one run folder, or, over several and over folders that hold some, the page that compares them."""
    if len(paths) == 1 and (rows_file(paths[0], "metrics") or not paths[0].is_dir()):
        return write_report(paths[0], out)
    if out is None and len(paths) > 1:
        raise ValueError("a page over several runs lies in none of their folders. Name it: --out page.html")
    from tenbit.report.many import write_many  # a page of one run, as training writes it, needs none of this

    return write_many(paths, out or paths[0] / "report.html", png=png)


def render(run: Run) -> str:
    """The page."""
    script = (HERE / "hover.js.jinja").read_text(encoding="utf-8").strip()
    across = axis.steps(min(run.steps, default=0), max(run.steps, default=0))
    drawn = []
    for i, section in enumerate(sections(run)):
        figures = [draw(figure, across, f"f{i}-{j}") for j, figure in enumerate(section.figures)]
        drawn.append({"title": section.title, "note": section.note, "figures": figures})
    titles = [section["title"] for section in drawn]
    return template("page.html.jinja").render(
        run=run,
        verdict=verdict(run),
        numbers=key_numbers(run),
        sanity=sanity(run),
        alarms=alarms(run),
        sections=drawn,
        comparison=compare(run.mismatch),
        compare_after=titles.index("Mismatch") if "Mismatch" in titles else len(titles) - 1,
        samples=chosen_samples(run.samples),
        plan=[_plan_row(*map(str, row)) for row in run.plan if len(row) == 3],
        summary=_leaves(run.summary),
        style=style(),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def chosen_samples(rows: list[Row]) -> list[tuple[int, list[Row]]]:
    """Of the first, the middle and the last step that have samples: the first right and the first wrong one."""
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return []
    wanted = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    out = []
    for step in wanted:
        here = [row for row in rows if row["step"] == step]
        firsts = [next((row for row in here if row.get("correct") is kind), None) for kind in (True, False)]
        out.append((step, [_UNKNOWN | row for row in firsts if row is not None]))
    return out


def _plan_row(part: str, shown: str, meaning: str) -> tuple[str, str, str]:
    """The loss scale's rules are a sentence; they go to what it is."""
    value, _, rules = shown.partition(", ")
    return part, value, f"{rules}; {meaning}" if rules else meaning


def _leaves(value: Any, name: str = "") -> list[tuple[str, str]]:
    """summary.json as (dotted name, value)."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{name}.{k}" if name else str(k))]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [(name, "–" if value is None else str(value))]
    return [(name, whole(value) if isinstance(value, int) else number(value))]


__all__ = ["render", "report", "write_report"]
