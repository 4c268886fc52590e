"""`tenbit ablate`: one recipe as a grid of precision, algorithm and seed, and one report of it (sections 4.2 to 4.4).

    grid = make_grid(Path("recipes/cpu/sanity.toml"), [], precisions=["fp16", "bf16"], algorithms=["grpo"], seeds="3")
    ablate(grid, Path("runs/ablation"), jobs=2)

A cell is a run like any other: `tenbit train` in a process of its own, in a folder of its own, with checkpoints. So a
cell that was killed goes on where it was, finished ones are not run again, and a cell that fails takes no other with
it. Seeds are the same in every cell, and with them the order of problems and every response's own seed: what differs
between two cells of a seed is what the grid varies.

    FOLDER/recipes/CELL.toml    what each cell runs, written and checked before the first one starts
    FOLDER/CELL/                its run folder
    FOLDER/logs/CELL.txt        what it printed
    FOLDER/ablation.json        the grid
    FOLDER/report.html, .json   Figures 1, 3, 4, 5 and 6 over all cells, and what became of each
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenbit.algorithms import ALGORITHMS
from tenbit.console import default_console
from tenbit.folder import check_same, locked, make_folder
from tenbit.keys import one_of
from tenbit.precision import Precision
from tenbit.recipe import Recipe
from tenbit.report.many import write_many
from tenbit.report.many_cells import read_cells
from tenbit.report.many_table import Summary
from tenbit.runlog import write_atomic
from tenbit.studies.ablation_run import Job, run_jobs
from tenbit.studies.options import said_in_options

GRID_FILE = "ablation.json"


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `recipe` is whole: nothing of it comes from elsewhere."""

    precision: str
    algorithm: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return cell_name(self.algorithm, self.precision, self.seed)


def cell_name(algorithm: str, precision: str, seed: int) -> str:
    """``grpo-bf16-fp32-seed0``: a folder's name."""
    return f"{algorithm}-{precision.replace('/', '-').replace('~', '-')}-seed{seed}"


def make_grid(
    recipe: Path, overrides: Sequence[str], *, precisions: Sequence[str], algorithms: Sequence[str], seeds: str
) -> list[Cell]:
    """The cells, seed by seed, so that an ablation that is stopped early has whole grids of the first seeds.

    Empty `precisions` or `algorithms`: the recipe's own. `seeds` is how many, from the recipe's on, or which: "3",
    "0,5,7". Raises ValueError naming the option.
    """
    base = Recipe.load(recipe, overrides)
    tree = base.tree()
    names = [one_of("--algorithm", name, ALGORITHMS) for name in _distinct("--algorithm", algorithms)]
    pairs = _distinct("--precision", [_canonical(p) for p in precisions])
    cells = []
    for seed in _seeds(seeds, base.seed):
        for algorithm in names or [base.algorithm.name]:
            for precision in pairs or [None]:
                cells.append(_cell(tree, base, algorithm, precision, seed))
    return cells


def _cell(tree: dict[str, Any], base: Recipe, algorithm: str, precision: str | None, seed: int) -> Cell:
    """A cell's recipe. Keys of `[algorithm]` belong to the recipe's own algorithm; another one comes as published."""
    own = tree["algorithm"] if algorithm == base.algorithm.name else {"name": algorithm}
    label = precision or base.precision.name
    changed = {"name": cell_name(algorithm, label, seed), "seed": seed, "algorithm": own}
    if precision is not None:
        changed["precision"] = _in_plan(base.precision, precision)
    with said_in_options({"precision.preset": "--precision", "algorithm.name": "--algorithm"}):
        recipe = Recipe.of({**tree, **changed}, f"{algorithm}, {label}")
    return Cell(label, algorithm, seed, recipe)


def _canonical(precision: str) -> str:
    """``fp16/fp16`` is ``fp16``. Raises ValueError for what is no precision."""
    try:
        plan = Precision.parse(precision)
    except ValueError as error:
        raise ValueError(f"--precision {precision}: {error}") from None
    return plan.name


def _in_plan(plan: Precision, precision: str) -> dict[str, Any]:
    """The recipe's plan with another pair of formats. What it says beyond formats stays."""
    pair = Precision.parse(precision)
    kept: dict[str, Any] = {"head": plan.head, "casting": plan.casting}
    if plan.reduce == plan.compute:
        kept["reduce"] = pair.compute.value
    if plan.loss_scale is not None and pair.loss_scale is not None:
        kept["loss_scale"] = plan.loss_scale.model_dump(exclude_none=True)
    return {"preset": precision} | kept


def _distinct(option: str, values: Sequence[str]) -> list[str]:
    twice = sorted({v for v in values if list(values).count(v) > 1})
    if twice:
        raise ValueError(f"{option}: {twice[0]} is there twice. Name each once")
    return list(values)


def _seeds(text: str, first: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0 or numbers == [0]:
        raise ValueError(f"--seeds {text}: write how many, such as 3, or which ones, such as 0,5,7")
    return list(range(first, first + numbers[0])) if len(numbers) == 1 else sorted(set(numbers))


def ablate(
    cells: Sequence[Cell], out: Path, *, jobs: int | None = None, ranks: int = 1, console: Console | None = None
) -> bool:
    """Runs what is not finished. True if every cell has finished.

    Raises ValueError if the folder holds other cells of the same names, KeyboardInterrupt after Ctrl-C, when all
    running cells have saved.
    """
    console = console or default_console()
    make_folder(out)
    with locked(out):
        for cell in cells:
            _place(cell, out)
        grid = {
            cell.name: {"algorithm": cell.algorithm, "precision": cell.precision, "seed": cell.seed} for cell in cells
        }
        write_atomic(out / GRID_FILE, json.dumps(grid, indent=1).encode() + b"\n")
        todo = [Job(cell.name, _recipe_file(out, cell), out / cell.name, cell.recipe.steps, ranks) for cell in cells]
        failed = run_jobs(todo, out / "logs", jobs, console)
    for name, why in failed.items():
        console.print(Text.assemble((f"{name}: ", "bold red"), why), soft_wrap=True)
    return not failed


def _recipe_file(out: Path, cell: Cell) -> Path:
    return out / "recipes" / f"{cell.name}.toml"


def _place(cell: Cell, out: Path) -> None:
    """Writes a cell's recipe. Raises ValueError if its folder holds a run of another one."""
    check_same(cell.recipe, out / cell.name)
    file = _recipe_file(out, cell)
    file.parent.mkdir(exist_ok=True)
    cell.recipe.dump(file)


def show(cells: Sequence[Summary], console: Console) -> None:
    """A line for each algorithm and precision."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for head in ("cell", "outcomes", "accuracy", "KL k3", "max |π−μ|", "s/step"):
        table.add_column(head, justify="left" if head in ("cell", "outcomes") else "right", no_wrap=head != "outcomes")
    for s in cells:
        outcomes = ", ".join(f"{n} {kind}" for kind, n in s.counts.items())
        mean, half, _ = s.accuracy or (None, None, 0)
        accuracy = "–" if mean is None else f"{mean:.1%}" + (f" ± {half:.1%}" if half is not None else "")
        numbers = [(s.kl, ".1e"), (s.extreme, ".3f"), (s.seconds, ".2f")]
        table.add_row(s.cell.label, outcomes, accuracy, *("–" if v is None else f"{v:{form}}" for v, form in numbers))
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
    begun = [folder / cell.name for cell in cells if (folder / cell.name / "metrics.jsonl").is_file()]
    if begun:
        page = write_many(begun, folder / "report.html")
        show([Summary.of(cell) for cell in read_cells(begun)], console)
        console.print(Text.assemble(("report  ", "dim"), str(page)), soft_wrap=True)
    return finished


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
