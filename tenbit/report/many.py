"""Several runs -> one self-contained HTML page, every plot also as a PNG, the tables also as JSON.

write_many([Path("runs/ablation")], Path("page.html"))   # page.html, page.json, page-figures/*.png

many_cells    run folders -> cells, runs that differ in the seed alone
many_curves   seeds -> a mean and a band          many_table   outcomes, differing keys, alarms
many_figures  cells -> the paper's figures        png          the same figures by matplotlib
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tenbit.report import axis
from tenbit.report.chart import draw
from tenbit.report.many_cells import Cell, collect
from tenbit.report.many_figures import Desk, Section, sections
from tenbit.report.many_table import Summary, alarms, as_json, differences, table, verdict
from tenbit.report.target import MARK, refuse_foreign, refuse_no_page, writing
from tenbit.report.template import HERE, style, template
from tenbit.runlog import write_atomic

MOST_NAMES = 3  # folders that the page's title names
log = logging.getLogger(__name__)


def write_many(paths: Sequence[Path], out: Path, *, png: bool = True) -> Path:
    """Writes the page over all runs in these folders and below, and returns its path.

    Beside ``page.html``: ``page.json``, and with `png` ``page-figures/NAME.png``. A run whose files are damaged is left
    out, with a remark. Raises ValueError if a folder holds no run, or none is left.
    """
    out = Path(out)
    data = out.with_suffix(".json")
    refuse_no_page(out)
    refuse_foreign(data, out)
    found = collect(paths)
    for remark in found.remarks:
        log.warning("%s", remark)
    cells = found.cells
    summaries = [Summary.of(cell) for cell in cells]
    desk = Desk.of(cells)
    made = sections(desk)
    with writing(out):
        if png:
            write_pngs(cells, made, out.with_name(f"{out.stem}-figures"))
        tree = as_json(summaries, desk.width) | {"remarks": found.remarks}
        text = json.dumps(dict([MARK]) | tree, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(data, text.encode("utf-8", "replace") + b"\n")
        page = render(summaries, desk, made, title(paths), found.remarks)
        write_atomic(out, page.encode("utf-8", "replace"))
    return out


def title(paths: Sequence[Path]) -> str:
    """The folders by name; many by the folder that they lie in."""
    folders = [Path(path).resolve() for path in paths]
    if len(folders) <= MOST_NAMES:
        return ", ".join(folder.name for folder in folders)
    parents = {folder.parent for folder in folders}
    return parents.pop().name if len(parents) == 1 else f"{len(folders)} folders"


def write_pngs(cells: Sequence[Cell], made: Sequence[Section], folder: Path) -> None:
    """Every plot as NAME.png. Files of an earlier page that had other plots stay; nothing else is touched."""
    try:
        from tenbit.report.png import png
    except ImportError as error:
        raise ValueError(f"PNGs are drawn by matplotlib ({error}). pip install matplotlib, or add --no-png") from None
    folder.mkdir(exist_ok=True)
    across = steps_of(cells)
    for section in made:
        for plot in (p for group in section.groups for p in group.plots):
            write_atomic(folder / f"{plot.name}.png", png(plot.figure, across, plot.title, plot.caption))


def steps_of(cells: Sequence[Cell]) -> axis.Axis:
    """One axis of steps for the whole page."""
    steps = [step for cell in cells for run in cell.runs for step in run.steps]
    return axis.steps(min(steps, default=0), max(steps, default=0))


def render(
    summaries: Sequence[Summary], desk: Desk, made: Sequence[Section], name: str, remarks: Sequence[str] = ()
) -> str:
    """The page. `remarks` are on runs that are not on it."""
    script = (HERE / "hover.js.jinja").read_text(encoding="utf-8").strip()
    cells = [s.cell for s in summaries]
    differing, equal = differences(cells)
    return template("many.html.jinja").render(
        name=name,
        subject=_subject(cells),
        verdict=verdict(summaries),
        remarks=remarks,
        table=table(summaries),
        seeds=max(len(cell.members) for cell in cells),
        stopped=any(s.counts.get("stopped") for s in summaries),
        smoothing=desk.width if desk.reach else 0,
        sections=_drawn(cells, made),
        differing=differing,
        equal=equal,
        alarms=alarms(cells),
        style=style(),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _subject(cells: Sequence[Cell]) -> str:
    """``30 runs, 5 algorithms, 2 precisions``"""

    def count(n: int, what: str) -> str:
        return f"{n:,} {what}{'' if n == 1 else 's'}"

    algorithms, precisions = ({getattr(c, what) for c in cells} - {""} for what in ("algorithm", "precision"))
    parts = [count(sum(len(c.members) for c in cells), "run")]
    parts += [next(iter(a)) if len(a) == 1 else count(len(a), what)
              for a, what in ((algorithms, "algorithm"), (precisions, "precision")) if a]  # fmt: skip
    return ", ".join(parts)


def _drawn(cells: Sequence[Cell], made: Sequence[Section]) -> list[dict[str, Any]]:
    across = steps_of(cells)
    out = []
    for i, section in enumerate(made):
        groups = []
        for j, group in enumerate(section.groups):
            figures = [(draw(p.figure, across, f"f{i}-{j}-{k}"), p.ref) for k, p in enumerate(group.plots)]
            groups.append({"title": group.title, "note": group.note, "beside": group.beside, "folded": group.folded,
                           "figures": figures})  # fmt: skip
        out.append({"title": section.title, "ref": section.ref, "note": section.note, "groups": groups})
    return out
