"""`tenbit ablate`: one recipe as a grid of precision, algorithm and seed, and one report of it (sections 4.2 to 4.4).

    grid = make_grid(Path("recipes/cpu/sanity.toml"), [], precisions=["fp16", "bf16"], algorithms=["grpo"], seeds="3")
    ablate(grid, Path("runs/ablation"), jobs=2)

A cell is a run like any other: `tenbit train` in a process of its own, in a folder of its own, with checkpoints. So a
cell that was killed goes on where it was, finished ones are not run again, and a cell that fails takes no other with
it. Seeds are the same in every cell, and with them the order of problems and every response's own seed: what differs
between two cells of a seed is what the grid varies. More cells may be added later; all must be of one recipe.

    FOLDER/ablation.json        the grid
    FOLDER/recipes/CELL.toml    what each cell runs, checked before the first one starts
    FOLDER/CELL/                its run folder
    FOLDER/logs/CELL.txt        what it printed
    FOLDER/report.html, .json   Figures 1, 3, 4, 5 and 6 over all cells, and what became of each
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenbit.console import default_console
from tenbit.folder import MAY_CHANGE, check_same, flat, holds_something, locked, make_folder
from tenbit.recipe import Recipe
from tenbit.rehearsal import rehearse
from tenbit.report.many import write_many
from tenbit.report.many_cells import read_cells
from tenbit.report.many_table import Summary
from tenbit.report.words import number
from tenbit.runlog import write_atomic
from tenbit.studies.ablation_grid import VARIED, Cell, make_grid
from tenbit.studies.ablation_run import Job, run_jobs, side_by_side

GRID_FILE = "ablation.json"


def ablate(
    cells: Sequence[Cell], out: Path, *, jobs: int | None = None, ranks: int = 1, console: Console | None = None
) -> bool:
    """Runs what is not finished. True if every cell has finished.

    Raises ValueError if the folder holds something else, or cells of another recipe, before anything is written;
    KeyboardInterrupt after Ctrl-C, when all running cells have saved.
    """
    console = console or default_console()
    side_by_side(jobs, len(cells), ranks)
    _refuse_folder(out)
    _refuse_others(cells, out, _grid(out))
    rehearse(cells[0].recipe, out / cells[0].name, resume=True)  # data, prompts, model: the same in every cell
    make_folder(out)
    with locked(out):
        grid = _grid(out)
        for cell in cells:
            _recipe_file(out, cell.name).parent.mkdir(exist_ok=True)
            cell.recipe.dump(_recipe_file(out, cell.name))
        grid |= {cell.name: cell.place for cell in cells}
        write_atomic(out / GRID_FILE, json.dumps(grid, indent=1).encode() + b"\n")
        todo = [Job(c.name, _recipe_file(out, c.name), out / c.name, c.recipe.steps, ranks) for c in cells]
        return not run_jobs(todo, out / "logs", jobs, console)


def _refuse_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: this is a file. Name a folder")
    if holds_something(out) and not (out / GRID_FILE).is_file():
        raise ValueError(f"--out {out}: the folder holds something that is no ablation. Name another one")


def _grid(out: Path) -> dict[str, Any]:
    """The cells that the folder has so far, by name."""
    file = out / GRID_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}). Restore the file, or name another --out") from None


def _refuse_others(cells: Sequence[Cell], out: Path, grid: dict[str, Any]) -> None:
    """All cells of a folder are one recipe, varied; a cell that is there may only be made longer."""
    for name in grid:
        file = _recipe_file(out, name)
        differing = _differing(Recipe.load(file), cells[0].recipe) if file.is_file() else {}
        if differing:
            what = "; ".join(f"{k}: was {old}, is {new}" for k, (old, new) in differing.items())
            raise ValueError(
                f"--out {out}: its cells are of another recipe: {what}. Start this ablation in another folder"
            )
    for cell in cells:
        check_same(cell.recipe, out / cell.name)
        done = Job(cell.name, Path(), out / cell.name, cell.recipe.steps).steps_done
        if done > cell.recipe.steps:
            raise ValueError(f"{out / cell.name}: {done} steps are done already, more than steps = {cell.recipe.steps}")


def _differing(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys in which two recipes differ, but for what the grid varies and what makes no other run."""
    free = (*VARIED, *MAY_CHANGE)
    a, b = flat(old.tree()), flat(new.tree())
    keys = [k for k in sorted(a.keys() | b.keys()) if not any(k == f or k.startswith(f"{f}.") for f in free)]
    return {k: (a.get(k), b.get(k)) for k in keys if a.get(k) != b.get(k)}


def _recipe_file(out: Path, name: str) -> Path:
    return out / "recipes" / f"{name}.toml"


def show(cells: Sequence[Summary], console: Console) -> None:
    """A line for each algorithm and precision."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for head in ("cell", "outcomes", "accuracy", "KL k3", "max |π−μ|", "s/step"):
        table.add_column(head, justify="left" if head in ("cell", "outcomes") else "right", no_wrap=head != "outcomes")
    for s in cells:
        outcomes = ", ".join(f"{n} {kind}" for kind, n in s.counts.items())
        mean, half, _ = s.accuracy or (None, None, 0)
        accuracy = "–" if mean is None else f"{mean:.1%}" + (f" ± {half * 100:.1f}" if half is not None else "")
        if s.unfinished and mean is not None:
            accuracy += " so far"
        numbers = ["–" if v is None else shown(v) for v, shown in ((s.kl, "{:.1e}".format), (s.extreme, number))]
        table.add_row(s.cell.label, outcomes, accuracy, *numbers, "–" if s.seconds is None else f"{s.seconds:.2f}")
    console.print(table)


def ablate_command(
    recipe: Path,
    overrides: Sequence[str],
    precision: str,
    algorithm: str,
    seeds: str,
    jobs: int | None,
    ranks: int,
    out: Path | None,
) -> bool:
    """What `tenbit ablate` does: the runs, the page of all of them, and the table on the screen."""
    cells = make_grid(recipe, overrides, precisions=_listed(precision), algorithms=_listed(algorithm), seeds=seeds)
    folder = out or Path("runs", f"ablation-{Recipe.load(recipe, overrides).name}")
    console = default_console()
    finished = ablate(cells, folder, jobs=jobs, ranks=ranks, console=console)
    begun = [folder / name for name in _grid(folder) if (folder / name / "metrics.jsonl").is_file()]
    if begun:
        page = write_many(begun, folder / "report.html")
        show([Summary.of(cell) for cell in read_cells(begun)], console)
        console.print(Text.assemble(("report  ", "dim"), str(page)), soft_wrap=True)
    return finished


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
