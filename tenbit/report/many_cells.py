"""Many run folders -> cells: runs that differ in nothing but the seed.

    cells = read_cells([Path("runs/ablation"), Path("runs/demo")])
    cells[0].label           # "grpo bf16"
    cells[0].members         # one run for each seed, each with its recipe's keys and its outcome

Whether two runs belong together is read off their resolved recipes: keys that do not make another run
(`folder.MAY_CHANGE`) and the seed are left aside, all others must be equal. A cell is named by algorithm and precision,
and by whatever else tells cells apart.
"""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenbit.algorithms import ALGORITHMS
from tenbit.folder import MAY_CHANGE, flat
from tenbit.outcome import Outcome, judge, stopped_by
from tenbit.recipe import Recipe
from tenbit.report.reading import Run, read_run
from tenbit.runlog import rows_file

UNSET = "–"  # a key that a recipe does not have
PRECISIONS = ("bf16", "fp16", "fp32")  # the order in which they are named
NO_RUN = "Name run folders that `tenbit train` printed, or a folder that holds some."


@dataclass(frozen=True)
class Member:
    """One run. `keys` is its recipe, flat: ``{"optim.lr": 2e-05, ...}``; empty where the folder has none. `precision`
    is the name of its plan, such as ``fp16`` or ``bf16/fp32``."""

    run: Run
    keys: dict[str, Any]
    precision: str
    outcome: Outcome

    @classmethod
    def of(cls, run: Run) -> Member:
        """A recipe that this version does not understand is taken as it is written."""
        try:
            tree = tomllib.loads(run.recipe)
        except tomllib.TOMLDecodeError:
            tree = {}
        precision = run.title
        if tree:
            with contextlib.suppress(ValueError):
                recipe = Recipe.of(tree)
                tree, precision = recipe.tree(), recipe.precision.name
        outcome = judge(run.rows, None if run.finished else run.total_steps, stopped_by(run.summary))
        return cls(run, flat(tree), precision, outcome)

    @property
    def algorithm(self) -> str:
        return str(self.keys.get("algorithm.name", ""))

    @property
    def seed(self) -> str:
        return text(self.keys.get("seed", "?"))


@dataclass(frozen=True, eq=False)
class Cell:
    """Runs of one recipe. `extras` are the keys, besides algorithm and precision, that set it apart."""

    members: tuple[Member, ...]
    extras: tuple[tuple[str, str], ...] = ()

    @property
    def algorithm(self) -> str:
        return self.members[0].algorithm

    @property
    def precision(self) -> str:
        return self.members[0].precision

    @property
    def kin(self) -> tuple[str, ...]:
        """What it shares with the cells that differ from it in precision alone."""
        return (self.algorithm, *(f"{self.brief(key)}={value}" for key, value in self.extras if value != UNSET))

    def brief(self, key: str) -> str:
        """``lr`` for ``optim.lr``, where no other key that sets cells apart ends so."""
        last = key.rpartition(".")[2]
        return last if sum(k.rpartition(".")[2] == last for k, _ in self.extras) == 1 else key

    @property
    def runs(self) -> list[Run]:
        return [m.run for m in self.members]

    @property
    def label(self) -> str:
        parts = [self.algorithm, self.precision, *self.kin[1:]]
        return " ".join(filter(None, parts)) or self.members[0].run.name


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among `paths` and anywhere below them, each once. Raises ValueError where there is none."""
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path}: there is no such folder. {NO_RUN}")
        here = [path] if rows_file(path, "metrics") else sorted({f.parent for f in path.rglob("metrics.jsonl*")})
        here = [folder for folder in here if rows_file(folder, "metrics")]
        if not here:
            raise ValueError(f"{path}: no metrics.jsonl here or in any folder below. {NO_RUN}")
        for folder in here:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


@dataclass(frozen=True)
class Collected:
    """All runs of some folders, in cells. `remarks` says which were left out, and why."""

    cells: list[Cell]
    remarks: list[str]


def read_cells(paths: Iterable[Path]) -> list[Cell]:
    """All runs of these folders in cells, in the order in which a page shows them."""
    return collect(paths).cells


def collect(paths: Iterable[Path]) -> Collected:
    """The same, with remarks on what was left out: runs with a damaged file, copies, and reruns of a seed.

    Raises ValueError if no run is left.
    """
    members: list[Member] = []
    remarks: list[str] = []
    seen: dict[str, Path] = {}
    for folder in find_runs(paths):
        try:
            member = Member.of(read_run(folder))
        except (ValueError, OSError) as error:
            remarks.append(f"{folder} is left out: {error}")
            continue
        content = json.dumps([member.run.recipe, member.run.rows]) if member.run.rows else str(folder)
        first = seen.setdefault(content, folder)
        if first is folder:
            members.append(member)
        else:
            remarks.append(f"{folder} is a copy of {first} and not counted again")
    if not members:
        raise ValueError(remarks[0].replace(" is left out", "", 1) if len(remarks) == 1 else "\n".join(remarks))
    groups = []
    for group in _grouped(members):
        kept, again = _one_a_seed(group)
        groups.append(Cell(tuple(kept)))
        remarks += again
    return Collected(_named(groups), remarks)


def text(value: Any) -> str:
    """A recipe's value as a person writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or "none"
    return str(value)


def under(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _free(keys: dict[str, Any]) -> tuple[str, ...]:
    """Keys that do not make another run. With a schedule the number of steps does: it shapes the learning rate."""
    constant = keys.get("optim.schedule", "constant") == "constant"
    return ("seed", *(k for k in MAY_CHANGE if constant or k != "steps"))


def _grouped(members: Sequence[Member]) -> list[list[Member]]:
    groups: dict[str, list[Member]] = {}
    for m in members:
        fixed = {k: v for k, v in m.keys.items() if not under(k, _free(m.keys))}
        name = json.dumps(fixed, sort_keys=True, default=str) if m.keys else str(m.run.folder.resolve())
        groups.setdefault(name, []).append(m)
    return [sorted(part, key=_by_seed) for group in groups.values() for part in _apart(group)]


def _apart(group: list[Member]) -> list[list[Member]]:
    """Two runs of one seed are no two seeds: what else they differ in, such as the backend, is then compared. Where
    they differ in nothing, `_one_a_seed` leaves one of them."""
    if len({m.seed for m in group}) == len(group):
        return [group]
    parts: dict[str, list[Member]] = {}
    for m in group:
        rest = {k: v for k, v in m.keys.items() if not under(k, ("seed", "name", "checkpoint", "log_samples"))}
        parts.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(m)
    return list(parts.values())


def _one_a_seed(group: Sequence[Member]) -> tuple[list[Member], list[str]]:
    """A rerun of a seed is no second sample: counted is the run that finished, or else the longest."""
    best: dict[Any, Member] = {}
    for m in group:
        key = m.keys.get("seed", m.run.folder)
        best[key] = max(best.get(key, m), m, key=_how_far)
    kept = list(best.values())
    remarks = [
        f"{m.run.folder} is a rerun of seed {m.seed} of {best[m.keys['seed']].run.folder} and not counted again"
        for m in group
        if not any(m is one for one in kept)
    ]
    return kept, remarks


def _how_far(member: Member) -> tuple[bool, int]:
    run = member.run
    return run.finished and stopped_by(run.summary) is None, max(run.steps, default=0)


def _by_seed(member: Member) -> tuple[float, str]:
    seed = member.keys.get("seed")
    return (seed if isinstance(seed, int) else float("inf"), member.run.name)


def _named(cells: list[Cell]) -> list[Cell]:
    """The cells, sorted, with the keys that tell those of one algorithm and precision apart."""
    out = []
    for algorithm in dict.fromkeys(c.algorithm for c in cells):
        same = [c for c in cells if c.algorithm == algorithm]
        keys = _telling(same)
        for cell in same:
            extras = [(key, said(cell, key)) for key in keys]
            if not cell.members[0].keys:
                extras = [("run", cell.members[0].run.name)]
            out.append(Cell(cell.members, tuple(extras)))
    return sorted(out, key=_order)


_LAST = ("steps", "name")  # they say little of what was tried


def _telling(cells: list[Cell]) -> list[str]:
    """Few keys that tell cells of one precision apart, the most telling first. Two keys that always change together
    are not both needed for a name; the page lists all that differ."""
    pairs = [(a, b) for i, a in enumerate(cells) for b in cells[:i] if a.precision == b.precision]
    left = {key for a, b in pairs for key in _differing(a, b)}
    chosen: list[str] = []

    def apart(keys: list[str]) -> int:
        return len({(cell.precision, *(said(cell, key) for key in keys)) for cell in cells})

    while left and apart(chosen) < len(cells):
        best = min(left, key=lambda key: (key in _LAST, -apart([*chosen, key]), key != "optim.lr", key))
        left.remove(best)
        if apart([*chosen, best]) > apart(chosen):
            chosen.append(best)
    return chosen


def _differing(a: Cell, b: Cell) -> set[str]:
    """Keys in which two cells differ: those that make another run, or, where none does, any but the seed."""
    every = set(a.members[0].keys) | set(b.members[0].keys)
    differ = {k for k in every if k != "seed" and said(a, k) != said(b, k)}
    return {k for k in differ if not under(k, _free(a.members[0].keys))} or differ


def said(cell: Cell, key: str) -> str:
    """A key's value in a cell; where its runs differ, all values."""
    return " or ".join(dict.fromkeys(text(m.keys[key]) if key in m.keys else UNSET for m in cell.members))


def _order(cell: Cell) -> tuple[Any, ...]:
    known = list(ALGORITHMS)
    algorithm = known.index(cell.algorithm) if cell.algorithm in known else len(known)
    precision = PRECISIONS.index(cell.precision) if cell.precision in PRECISIONS else len(PRECISIONS)
    return (algorithm, cell.algorithm, tuple(map(_natural, cell.extras)), precision, cell.precision)


def _natural(extra: tuple[str, str]) -> tuple[str, float, str]:
    """Numbers in their order, before words."""
    key, value = extra
    try:
        return (key, float(value), "")
    except ValueError:
        return (key, float("inf"), value)
