"""What `tenbit probe` is asked to do, as values: the options become a recipe, so that they are checked as a run's are.

    plan = make_plan("builtin", precision="fp16,bf16", samples=4)
    model, asked, plan = plan.open()               the longest response is settled once the model's context is known

MODEL is 'builtin', a Hugging Face folder or name, or a run folder: then the run's exported model is probed, on the
run's data, template and sampling unless an option says otherwise. A message names the option, not the recipe's key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tenbit.models import loading
from tenbit.precision import Precision
from tenbit.prompts import Asked, ask
from tenbit.recipe import Recipe, override
from tenbit.studies.options import said_in_options

PROMPTS, SAMPLES = 32, 4
LONGEST = 1024  # tokens of a response where nothing says otherwise, or half of the model's context
PRECISIONS = "fp16,bf16"
OWN_KEYS = ("head", "router", "fp32", "residual_scale")  # of a precision plan: how the model computes, in any format
OPTIONS = {
    "model.path": "MODEL",
    "task.data": "--data",
    "task.template": "--template",
    "task.limit": "--limit",
    "rollout.engine": "--engine",
    "rollout.prompts": "--prompts",
    "rollout.samples": "--samples",
    "rollout.max_tokens": "--max-tokens",
    "rollout.temperature": "--temperature",
}


@dataclass(frozen=True)
class Plan:
    """`recipe` says how to sample and score; `precisions` are the pairs, in the order asked for."""

    recipe: Recipe
    precisions: tuple[Precision, ...]
    longest_given: bool
    taken: Mapping[str, Any] = field(default_factory=dict)  # keys of the precision plan that a run brought

    def open(self) -> tuple[loading.Model, list[Asked], Plan]:
        """Loads model and problems. Raises ValueError for what does not fit together."""
        with said_in_options(OPTIONS):
            model = loading.load(self.recipe.model, self.recipe.rollout.stop_tokens)
            plan = self if self.longest_given else self.with_longest(min(LONGEST, model.context // 2))
            task, longest = plan.recipe.task, plan.recipe.rollout.max_tokens
            asked = ask(task.data, plan.recipe, model, longest, task.limit)
        return model, asked, plan

    @property
    def notes(self) -> list[str]:
        """What was taken from a run and is not on the command line."""
        if not self.taken:
            return []
        keys = ", ".join(f"{k} = {list(v) if isinstance(v, tuple) else v!r}" for k, v in self.taken.items())
        return [f"the precision plan has the run's own keys: {keys}. --precision leaves them out"]

    def with_longest(self, tokens: int) -> Plan:
        rollout = self.recipe.rollout.model_copy(update={"max_tokens": max(1, tokens)})
        return replace(self, recipe=self.recipe.model_copy(update={"rollout": rollout}))


def parse_precisions(text: str) -> tuple[Precision, ...]:
    """``"fp16,bf16,bf16/fp16"`` -> plans, each once."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError("--precision: name at least one, such as fp16,bf16,bf16/fp16")
    found: dict[str, Precision] = {}
    for name in names:
        try:
            plan = Precision.parse(name)
        except ValueError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            said = next((line for line in lines if "there is no format" in line), lines[-1])
            said = re.sub(r"^Value error, |\s*\[type=.*$", "", said)
            raise ValueError(f"--precision {text}: {said}") from None
        found[plan.name] = plan
    return tuple(found.values())


def _with_keys(precision: Precision, overrides: Sequence[str], command: str) -> Precision:
    """A plan with keys of it as they were given, ``precision.head=fp32``; they hold for every plan that is compared."""
    keys = {key: getattr(precision, key) for key in OWN_KEYS}
    tree: dict[str, Any] = {"precision": {"preset": precision.name, **keys}}
    for item in overrides:
        if not item.partition("=")[0].strip().startswith("precision."):
            raise ValueError(f"{item!r}: write --precision instead, and here keys of it, such as precision.head=fp32")
        override(tree, item)
    made = Recipe.of({"steps": 1, "rollout": {"max_tokens": 1}, **tree}, command).precision if overrides else precision
    if made.name != precision.name:
        raise ValueError(f"{' '.join(overrides)}: makes {made.name} of {precision.name}. Write --precision instead")
    return made


def make_plan(
    model: str,
    *,
    data: str | None = None,
    engine: str | None = None,
    precision: str | None = None,
    prompts: int | None = None,
    samples: int | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    template: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    overrides: Sequence[str] = (),
    needs_data: bool = True,
    command: str = "tenbit probe",
) -> Plan:
    """Raises ValueError naming the option. `overrides` are a recipe's ``key=value``: rollout.vllm.memory=0.8."""
    tree = _defaults(model)
    if needs_data and data is None and "data" not in tree["task"]:
        raise ValueError(
            f"--data: name the problems that {model} is to answer: a shipped set (math500, gsm8k, aime24, ...), a "
            ".jsonl or .parquet file, or a Hugging Face dataset"
        )
    given = {
        "": {"seed": seed},
        "task": {"data": data, "template": template, "limit": limit},
        "rollout": {
            "engine": engine,
            "prompts": prompts,
            "samples": samples,
            "max_tokens": max_tokens,
            "temperature": temperature,
        },
    }
    for section, values in given.items():
        (tree[section] if section else tree).update({k: v for k, v in values.items() if v is not None})
    inside = [item for item in overrides if item.partition("=")[0].strip().partition(".")[0] == "precision"]
    for item in overrides:
        if item not in inside:
            override(tree, item)
    longest_given = "max_tokens" in tree["rollout"]
    tree["rollout"].setdefault("max_tokens", LONGEST)
    taken = keys_of_run(model) if precision is None else {}
    plans = [Precision.parse({"preset": p.name, **taken}) for p in parse_precisions(precision or PRECISIONS)]
    precisions = tuple(_with_keys(p, inside, command) for p in plans)
    with said_in_options(OPTIONS):
        recipe = Recipe.of(tree, command)
        return Plan(recipe, precisions, longest_given, taken)


def keys_of_run(model: str) -> dict[str, Any]:
    """How a run's model computes, where that is not what every model does: keys that hold in any format."""
    file = Path(model).expanduser() / "recipe.toml"
    if not file.is_file():
        return {}
    own, plain = Recipe.load(file).precision, Precision.parse("fp16")
    return {key: getattr(own, key) for key in OWN_KEYS if getattr(own, key) != getattr(plain, key)}


def _defaults(model: str) -> dict[str, Any]:
    """A probe's own settings; for a run folder on top of the run's."""
    tree: dict[str, Any] = {
        "name": "probe",
        "steps": 1,
        "model": {"path": model},
        "task": {"data": "arithmetic_perfectible"} if model == "builtin" else {},
        "rollout": {"prompts": PROMPTS, "samples": SAMPLES},
        "algorithm": {"advantage": "reward"},  # nothing is trained: one response to a prompt is enough
        "optim": {"updates": 1},
    }
    folder = Path(model).expanduser()
    if not (folder / "recipe.toml").is_file():
        return tree
    if not (folder / "model" / "config.json").is_file():
        raise ValueError(
            f"{model}: this run has no model/ yet; it is written when a run is finished. Finish it with "
            "`tenbit train RECIPE --out FOLDER --resume`"
        )
    own = Recipe.load(folder / "recipe.toml").tree()
    kept = ("engine", "vllm", "ray", "stop_tokens", "max_batch", "max_tokens", "temperature")
    tree["model"] = own["model"] | {"path": str(folder / "model")}
    tree["task"] = {k: v for k, v in own["task"].items() if k not in ("grader", "grade_workers")}
    tree["rollout"] |= {k: v for k, v in own["rollout"].items() if k in kept}
    tree["optim"]["token_budget"] = own["optim"]["token_budget"]
    tree["seed"] = own["seed"]
    return tree
