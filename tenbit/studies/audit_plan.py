"""What `tenbit audit` is asked to do: a recipe to sample and train with, the plan that is judged, and what losses are
divided by.

Without a recipe the audit's own answers are one gradient step. With `--apply RECIPE` the plan, the algorithm, the
micro-batches and the size of a gradient step are those of that recipe, because all of them decide how large gradients
are; and the recipe with the remedies in it is written next to it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from tenbit.advantages import ADVANTAGES
from tenbit.batching import Row, totals
from tenbit.models.fit import fit
from tenbit.models.loading import Model, load_outline
from tenbit.precision import Precision
from tenbit.prompts import Asked
from tenbit.recipe import AlgorithmSpec, Recipe, RolloutSpec, override
from tenbit.runlog import write_atomic
from tenbit.studies import probe_plan
from tenbit.studies.audit_run import largest_advantage
from tenbit.studies.audit_verdict import changes
from tenbit.studies.options import said_in_options
from tenbit.types import Totals

PROMPTS, SAMPLES, LONGEST = 32, 2, 256


@dataclass(frozen=True)
class AuditPlan:
    """`probe`: how to sample and train; its recipe's precision is what is judged. `target` and `own`: the recipe that
    `--apply` named. `advantage`: the largest that its algorithm makes of rewards of 0 and 1."""

    probe: probe_plan.Plan
    target: Path | None = None
    own: Recipe | None = None
    advantage: float = 1.0

    @property
    def precision(self) -> Precision:
        return self.probe.recipe.precision

    def open(self) -> tuple[Model, list[Asked], Recipe]:
        """Loads model and problems. Raises ValueError, for what the plan says of the model before it is read."""
        if self.precision.alters:
            with said_in_options(probe_plan.OPTIONS):
                fit(load_outline(self.probe.recipe.model).module, self.precision)
        model, asked, plan = self.probe.open()
        return model, asked, plan.recipe

    def totals(self, rows: Sequence[Row]) -> Totals:
        """Of one gradient step: the recipe's that was named, or these rows."""
        if self.own is None:
            return totals(rows, self.probe.recipe.rollout.max_tokens)
        rollout, mean = self.own.rollout, sum(r.rollout.completion.length for r in rows) / len(rows)
        sequences = max(1, rollout.prompts * rollout.samples // self.own.optim.updates)
        return Totals(sequences, round(mean * sequences), rollout.max_tokens)


def make_plan(
    model: str,
    options: Mapping[str, Any],
    precision: str | None = None,
    apply: Path | None = None,
    overrides: Sequence[str] = (),
) -> AuditPlan:
    """`options`: data, prompts, samples, max_tokens, template, seed. Raises ValueError naming the option."""
    own = Recipe.load(apply) if apply is not None else None
    if apply is not None:
        refuse_taken(applied_path(apply))
    given = dict(options)
    given["prompts"] = PROMPTS if given.get("prompts") is None else given["prompts"]
    given["samples"] = SAMPLES if given.get("samples") is None else given["samples"]
    if precision is not None:
        probe_plan.parse_precisions(precision)
        if "," in precision:
            raise ValueError(f"--precision {precision}: an audit judges one plan. Name one, such as fp16")
    inside = [item for item in overrides if _section(item) == "precision"]
    others = [item for item in overrides if item not in inside]
    plan = probe_plan.make_plan(model, **given, overrides=others, command="tenbit audit")
    recipe = plan.recipe
    if own is not None:
        recipe = _trained_as(recipe, own, {_section(item) for item in others})
    judged = _judged(precision, apply, inside)
    if own is not None:
        Recipe.of(own.tree() | {"precision": table_of(judged)}, str(apply))  # or it could not be written in the end
    recipe = recipe.model_copy(update={"precision": judged})
    plan = probe_plan.Plan(recipe, (judged,), plan.longest_given)
    plan = plan if plan.longest_given else plan.with_longest(LONGEST)
    return AuditPlan(plan, apply, own, _advantage(recipe.algorithm, own, others))


def _advantage(spec: AlgorithmSpec, own: Recipe | None, overrides: Sequence[str]) -> float:
    """Of the algorithm that is audited, in groups as large as the recipe's, or as a recipe's are by default."""
    said = {item.partition("=")[0].strip() for item in overrides}
    if own is not None and not any(key.startswith("algorithm.") for key in said):
        spec = own.algorithm
    elif "algorithm.advantage" not in said:
        spec = spec.model_copy(update={"advantage": None})  # the audit's own is for sampling: without a baseline
    group = own.rollout.samples if own is not None else RolloutSpec.model_validate({"max_tokens": 1}).samples
    return largest_advantage(ADVANTAGES[spec.build().advantage], group)


def _section(item: str) -> str:
    return item.partition("=")[0].strip().partition(".")[0]


def _judged(precision: str | None, apply: Path | None, overrides: Sequence[str]) -> Precision:
    """What is named, else the recipe's, else FP16; with the keys that were given."""
    tree: dict[str, Any] = {"precision": "fp16"}
    if precision is not None:
        tree["precision"] = precision
    elif apply is not None:
        tree["precision"] = tomllib.loads(apply.read_text(encoding="utf-8")).get("precision", "fp16")
    for item in overrides:
        override(tree, item)
    return Recipe.of({"steps": 1, "rollout": {"max_tokens": 1}, **tree}, "tenbit audit").precision


def _trained_as(recipe: Recipe, own: Recipe, keys: set[str]) -> Recipe:
    """The audit's recipe with what decides gradients taken from a run's. Advantages are the audit's, so no baseline."""
    optim = own.optim.model_copy(update={"updates": 1})
    algorithm = own.algorithm.model_copy(update={"advantage": recipe.algorithm.advantage})
    rollout = recipe.rollout.model_copy(update={"temperature": own.rollout.temperature})
    model = own.model.model_copy(update={"path": recipe.model.path, "gradient_checkpointing": False})
    taken = {"optim": optim, "algorithm": algorithm, "rollout": rollout, "model": model}
    return recipe.model_copy(update={k: v for k, v in taken.items() if k not in keys})


def applied_path(recipe: Path) -> Path:
    """``recipes/mine.toml`` -> ``recipes/mine.audited.toml``"""
    return recipe.with_name(f"{recipe.stem}.audited.toml")


def refuse_taken(path: Path) -> None:
    if path.exists():
        raise ValueError(f"--apply: {path} is there already, of an earlier audit. Move or delete it")


def table_of(precision: Precision) -> dict[str, Any]:
    """A plan as a recipe's `[precision]` has it: the preset of its formats, and what differs from that."""
    return {"preset": precision.name, **changes(Precision.parse(precision.name), precision)}


def write_applied(recipe: Path, precision: Precision, said: str) -> Path:
    """The recipe as it was written, with this plan in its precision table. Comments are not kept."""
    tree = tomllib.loads(recipe.read_text(encoding="utf-8"))
    tree["precision"] = table_of(precision)
    assert Recipe.of(tree, str(recipe)).precision == precision
    target = applied_path(recipe)
    refuse_taken(target)
    head = "".join(f"# {line}\n" for line in said.splitlines())
    write_atomic(target, (head + tomli_w.dumps(tree)).encode())
    return target
