"""The cells of an ablation: one recipe, varied in precision, algorithm and seed, and in nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tenbit.algorithms import ALGORITHMS
from tenbit.keys import explain, one_of
from tenbit.precision import Format, Precision
from tenbit.recipe import Recipe
from tenbit.studies.options import said_in_options

VARIED = ("name", "seed", "precision", "algorithm")  # by the grid; all else is the recipe's
FORMATS = ("preset", "compute", "rollout", "sync", "export", "rollout_bits", "rollout_weights")


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

    @property
    def place(self) -> dict[str, Any]:
        """Where in the grid it is."""
        return {"algorithm": self.algorithm, "precision": self.precision, "seed": self.seed}


def cell_name(algorithm: str, precision: str, seed: int) -> str:
    """``grpo-bf16-fp32-seed0``: a folder's name."""
    return f"{algorithm}-{precision.replace('/', '-').replace('~', '-')}-seed{seed}"


def make_grid(
    recipe: Path, overrides: Sequence[str], *, precisions: Sequence[str], algorithms: Sequence[str], seeds: str
) -> list[Cell]:
    """The cells, seed by seed, so that an ablation that is stopped early has whole grids of the first seeds.

    Empty `precisions` or `algorithms`: the recipe's own. `seeds` is how many, from the recipe's on, or which: "3",
    "0,5,7", "7,". Raises ValueError naming the option, also for overrides that no cell would follow.
    """
    base = Recipe.load(recipe, overrides)
    names = [one_of("--algorithm", name, ALGORITHMS) for name in _distinct("--algorithm", algorithms)]
    pairs = _distinct("--precision", [_canonical(p) for p in precisions])
    _refuse_lost(overrides, base, names, pairs)
    cells = []
    for seed in _seeds(seeds, base.seed):
        for algorithm in names or [base.algorithm.name]:
            for precision in pairs or [base.precision.name]:
                cells.append(_cell(base, algorithm, precision if pairs else None, seed))
    return cells


def _refuse_lost(overrides: Sequence[str], base: Recipe, names: Sequence[str], pairs: Sequence[str]) -> None:
    """What was set by hand and would reach no cell is a mistake."""
    for item in overrides:
        key = item.partition("=")[0].strip()
        if names and key == "algorithm.name":
            raise ValueError(f"{item}: --algorithm says which algorithms there are. Leave one of them out")
        if key.startswith("algorithm.") and names and base.algorithm.name not in names:
            raise ValueError(
                f"{item}: belongs to the recipe's own algorithm, {base.algorithm.name!r}, which is not in --algorithm; "
                "others come as published. Add it there, or leave the key out"
            )
        part = key.removeprefix("precision.")
        if pairs and (key == "precision" or (part != key and part in FORMATS)):
            raise ValueError(f"{item}: --precision says which formats there are. Leave one of them out")


def _cell(base: Recipe, algorithm: str, precision: str | None, seed: int) -> Cell:
    """A cell's recipe. Keys of `[algorithm]` belong to the recipe's own algorithm; another one comes as published."""
    tree = base.tree()
    own = tree["algorithm"] if algorithm == base.algorithm.name else {"name": algorithm}
    plan = base.precision if precision is None else _in_plan(base.precision, precision)
    changed = {"name": cell_name(algorithm, plan.name, seed), "seed": seed, "algorithm": own}
    changed["precision"] = plan.model_dump(mode="json", exclude_none=True)
    with said_in_options({"algorithm.name": "--algorithm"}):
        recipe = Recipe.of({**tree, **changed}, f"{algorithm}, {plan.name}")
    return Cell(plan.name, algorithm, seed, recipe)


def _parsed(precision: str | dict[str, Any], said: str) -> Precision:
    try:
        return Precision.parse(precision)
    except ValidationError as error:
        why = "; ".join(explain(e, Precision) for e in error.errors())
        raise ValueError(f"--precision {said}: {why}") from None


def _canonical(precision: str) -> str:
    """``fp16/fp16`` is ``fp16``. Raises ValueError for what is no precision."""
    return _parsed(precision, precision).name


def _in_plan(plan: Precision, precision: str) -> Precision:
    """The recipe's plan with another pair of formats. What it says beyond formats stays."""
    pair = Precision.parse(precision)
    kept: dict[str, Any] = {key: getattr(plan, key) for key in ("head", "casting", "router", "residual_scale")}
    if pair.compute != Format.FP32 or pair.rollout != Format.FP32:
        kept["fp32"] = plan.fp32
    if plan.reduce == plan.compute:
        kept["reduce"] = pair.compute.value
    if plan.sync == Format.FP32:
        kept["sync"] = plan.sync.value
    if plan.rounds_weights and not pair.rounds_weights:
        kept |= {"rollout_bits": plan.rollout_bits, "rollout_weights": plan.rollout_weights}
    if plan.loss_scale is not None and pair.loss_scale is not None:
        kept["loss_scale"] = plan.loss_scale.model_dump(exclude_none=True)
    return _parsed({"preset": precision} | kept, precision)


def _distinct(option: str, values: Sequence[str]) -> list[str]:
    twice = sorted({v for v in values if list(values).count(v) > 1})
    if twice:
        raise ValueError(f"{option}: {twice[0]} is there twice. Name each once")
    return list(values)


def _seeds(text: str, first: int) -> list[int]:
    """``3`` is how many; with a comma they are named: ``7,`` is one."""
    named = "," in text
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or (numbers == [0] and not named):
        raise ValueError(f"--seeds {text}: write how many, such as 3, or which ones, such as 0,5,7 (one: 7,)")
    if not named:
        return list(range(first, first + numbers[0]))
    _distinct("--seeds", [str(n) for n in numbers])
    return sorted(numbers)
