"""What `tenbit audit` is asked to do: a recipe to sample and train with, the plan that is judged, and what losses are
divided by.

Without a recipe the audit's own answers are one gradient step. With `--apply RECIPE` the plan, the algorithm, the
micro-batches, the size of a gradient step and the way problems are put are those of that recipe, because all of them
decide how large gradients are; and the recipe with the remedies in it is written next to it.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from tenbit.advantages import ADVANTAGES
from tenbit.batching import Row, micro_batches, totals
from tenbit.models.fit import fit
from tenbit.models.loading import Model, load_outline
from tenbit.precision import Precision
from tenbit.prompts import Asked
from tenbit.recipe import AlgorithmSpec, Recipe, RolloutSpec, override
from tenbit.runlog import write_atomic
from tenbit.studies import probe_plan
from tenbit.studies.audit_run import largest_advantage
from tenbit.studies.audit_verdict import AS_SEEN, Stretch, changes
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
        rollout, mean = self.own.rollout, _mean(rows)
        sequences = max(1, rollout.prompts * rollout.samples // self.own.optim.updates)
        return Totals(sequences, round(mean * sequences), rollout.max_tokens)

    def cut_off(self, rows: Sequence[Row]) -> int:
        """How many answers ended at the audit's limit where the recipe's is larger."""
        if self.own is None or self.own.rollout.max_tokens <= self.probe.recipe.rollout.max_tokens:
            return 0
        return sum(r.rollout.completion.finish == "length" for r in rows)

    def stretch(self, rows: Sequence[Row]) -> Stretch:
        """What gradients may be with answers as long as the recipe allows, where the audit's were cut off.

        Losses that divide by lengths have gradients so many times smaller. One that divides by a constant has them as
        large of each token, and adds up more tokens, as many as a micro-batch holds.
        """
        if self.own is None or not self.cut_off(rows):
            return AS_SEEN
        recipe, longest = self.probe.recipe, self.own.rollout.max_tokens
        longer = longest / _mean(rows)
        if recipe.algorithm.build().reduction != "dr-grpo":
            return Stretch(low=_power(longer))
        lengths, budget = [r.length for r in rows], recipe.optim.token_budget
        held = max(sum(lengths[i] for i in part) for part in micro_batches(lengths, budget)[0])
        return Stretch(high=_power(min(longer, max(budget, longest) / held)))


def _mean(rows: Sequence[Row]) -> float:
    """Tokens of an answer."""
    return sum(r.rollout.completion.length for r in rows) / len(rows)


def _power(times: float) -> float:
    """The next power of two, at least 1."""
    return 2.0 ** math.ceil(math.log2(max(1.0, times)))


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
    _refuse_engines(others)
    plan = probe_plan.make_plan(model, **given, engine="torch", overrides=others, command="tenbit audit")
    recipe = plan.recipe
    if own is not None:
        said = {item.partition("=")[0].strip() for item in others}
        said |= {"task.template"} if given.get("template") is not None else set()
        recipe = _trained_as(recipe, own, said)
    taken = {} if precision is not None or apply is not None else probe_plan.keys_of_run(model)
    judged = _judged(precision, apply, taken, inside)
    if own is not None:
        Recipe.of(own.tree() | {"precision": table_of(judged)}, str(apply))  # or it could not be written in the end
    recipe = recipe.model_copy(update={"precision": judged})
    plan = replace(plan, recipe=recipe, precisions=(judged,), taken=taken)
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


def _refuse_engines(overrides: Sequence[str]) -> None:
    """Raises ValueError for an engine that would seem to have been heard."""
    for item in overrides:
        key, _, value = item.partition("=")
        own = key.strip() == "rollout.engine" and value.strip().strip("'\"") == "torch"
        if not own and key.strip().startswith(("rollout.engine", "rollout.vllm", "rollout.ray")):
            raise ValueError(
                f"{item!r}: an audit samples and scores with the built-in engine, and starts no other. Remove the key; "
                "with --apply RECIPE it says which remedies that recipe's engine does not follow"
            )


def _judged(precision: str | None, apply: Path | None, taken: Mapping[str, Any], overrides: Sequence[str]) -> Precision:
    """What is named, else the recipe's, else FP16 with a run's keys (`taken`); with the keys that were given."""
    tree: dict[str, Any] = {"precision": {"preset": "fp16", **taken} if taken else "fp16"}
    if precision is not None:
        tree["precision"] = precision
    elif apply is not None:
        tree["precision"] = tomllib.loads(apply.read_text(encoding="utf-8")).get("precision", "fp16")
    for item in overrides:
        override(tree, item)
    return Recipe.of({"steps": 1, "rollout": {"max_tokens": 1}, **tree}, "tenbit audit").precision


def _trained_as(recipe: Recipe, own: Recipe, said: set[str]) -> Recipe:
    """The audit's recipe with what decides prompts and gradients taken from a run's, where the command does not say it
    (`said`, dotted keys). Advantages are the audit's, so no baseline; of an algorithm all keys go together."""
    algorithm = own.algorithm.model_copy(update={"advantage": recipe.algorithm.advantage})
    wanted: dict[str, dict[str, Any]] = {
        "optim": {**dict(own.optim), "updates": 1},
        "rollout": {"temperature": own.rollout.temperature, "stop_tokens": own.rollout.stop_tokens},
        "model": {**dict(own.model), "path": recipe.model.path, "gradient_checkpointing": False},
        "task": {"template": own.task.template, "drop_long_prompts": own.task.drop_long_prompts},
    }
    parts: dict[str, Any] = {}
    for section, values in wanted.items():
        update = {key: v for key, v in values.items() if f"{section}.{key}" not in said}
        parts[section] = getattr(recipe, section).model_copy(update=update)
    if not any(key.startswith("algorithm.") for key in said):
        parts["algorithm"] = algorithm
    return recipe.model_copy(update=parts)


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
