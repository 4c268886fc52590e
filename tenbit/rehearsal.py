"""`tenbit train RECIPE --dry-run`: what a run would be, with everything checked that can be without weights.

    found = rehearse(recipe, out=None, resume=False)
    show(found, console)

Goes through what `run.open_run` goes through before it makes a folder: the folder's name, the model's architecture and
tokenizer, data read and tokenised, prompts against the context, the grader, the precision plan. Bad input raises the
same ValueErrors. Weights are not read and nothing is written. What only this machine lacks, such as vLLM or a
launcher's other processes, is said and not raised: a recipe is often written elsewhere than where it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenbit.backends.choose import check_backend
from tenbit.console import plan_table
from tenbit.engines.choose import check_engine
from tenbit.models import loading
from tenbit.prompts import Asked, ask, ask_evals
from tenbit.recipe import Recipe
from tenbit.run import find_folder, make_grader, refuse_comparison


@dataclass(frozen=True)
class Rehearsal:
    """`model` has no weights. `lacking` is what a run would stop at on this machine, as messages with the remedy."""

    recipe: Recipe
    folder: Path
    model: loading.Model
    train: Sequence[Asked]
    evals: Mapping[str, Sequence[Asked]]
    lacking: Sequence[str]


def rehearse(recipe: Recipe, out: Path | None = None, resume: bool = False) -> Rehearsal:
    """Checks a recipe. Raises ValueError with the remedy, as a run would."""
    if recipe.backend.name == "deepspeed":
        recipe.precision.deepspeed()
    refuse_comparison(recipe)
    folder = find_folder(recipe, out, resume)
    model = loading.load_outline(recipe.model, recipe.rollout.stop_tokens)
    train = ask(recipe.task.data, recipe, model, recipe.rollout.max_tokens, recipe.task.limit)
    evals = ask_evals(recipe, model)
    with make_grader(recipe):
        pass
    lacking = []
    for check in (
        lambda: check_engine(recipe.rollout),
        lambda: check_backend(recipe.backend, recipe.precision, model.device),
    ):
        try:
            check()
        except ValueError as error:
            lacking.append(str(error))
    return Rehearsal(recipe, folder, model, train, evals, lacking)


def rows(found: Rehearsal) -> list[tuple[str, str]]:
    """(what, in words), for the screen."""
    recipe, rollout, optim = found.recipe, found.recipe.rollout, found.recipe.optim
    responses = rollout.prompts * rollout.samples
    module = found.model.module
    size = sum(p.numel() for p in module.parameters())
    longest = max(len(a.ids) for a in found.train)
    seen = recipe.steps * rollout.prompts / len(found.train)  # groups that are dropped come on top
    passes = "two passes" if recipe.algorithm.build().needs_old else "one pass"
    most = f", up to {responses * rollout.max_rounds:,} where groups are dropped" if recipe.dynamic_sampling else ""
    per_update = -(-rollout.prompts // optim.updates) * rollout.samples
    model = f"{module.config.model_type}, {size:,} parameters, context {found.model.context:,}, {found.model.device}"
    out = [
        ("model", f"{recipe.model.path}: {model}"),
        ("problems", f"{len(found.train):,} of {recipe.task.data}, prompts up to {longest:,} tokens"),
        (
            "sampling",
            f"{rollout.engine}; {rollout.prompts:,} × {rollout.samples} = {responses:,} responses a step{most}, of up "
            f"to {rollout.max_tokens:,} tokens",
        ),
        (
            "training",
            f"{recipe.algorithm.name}, {passes}; gradient steps in each step: {optim.updates}, of {per_update:,} "
            f"responses; backend {recipe.backend.name}",
        ),
        (
            "run",
            f"{recipe.steps:,} steps, {recipe.steps * responses:,} responses, {recipe.steps * optim.updates:,} "
            f"gradient steps; each problem {seen:.3g} times",
        ),
    ]
    for name, asked in found.evals.items():
        spec = recipe.eval
        often = recipe.steps // spec.every + 1 + (recipe.steps % spec.every > 0)
        out.append(("evaluation", f"{name}: {len(asked):,} × {spec.samples}, {often} times"))
    return out


def show(found: Rehearsal, console: Console) -> None:
    console.print(
        Text.assemble(
            ("dry run", "bold"), f"  {found.recipe.name}  it would run in {found.folder}; nothing is written"
        ),
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for what, words in rows(found):
        table.add_row(Text(what), Text(words))
    console.print(table)
    console.print()
    console.print(plan_table(found.recipe.precision, {}))
    for text in found.lacking:
        console.print(Text.assemble(("\non this machine it would stop  ", "bold red"), text), soft_wrap=True)
