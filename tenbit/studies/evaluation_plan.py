"""What `tenbit evaluate` is asked to do, as one value: a recipe, and the little that a recipe has no place for.

The recipe carries model, sets, template, grader, engine, precision, sampling and seed, so that every option is checked
where a run's keys are checked; messages name the option instead of the key. A run folder as the model stands for its
`model/` with the run's own template, grader, precision, engine, seed and evaluation settings: evaluated so, the model
scores what the run's last evaluation scored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tenbit.models import loading
from tenbit.prompts import Asked, ask, set_name
from tenbit.recipe import Recipe, override
from tenbit.studies.options import said_in_options

LONGEST = 8192  # the token budget where nothing says otherwise, or what the model's context leaves
SAMPLES = 8


@dataclass(frozen=True)
class Plan:
    """An evaluation. `budgets` are token budgets, smallest first, the last one is sampled; None: see `fit`.

    `both` samples from the training policy too, `texts` keeps the responses' texts, `chunk` is how many problems are
    sampled at a time (None: about 512 responses).
    """

    recipe: Recipe
    budgets: tuple[int, ...] = ()
    both: bool = False
    texts: bool = False
    chunk: int | None = None


# The recipe's key -> the option that sets it, for messages.
OPTIONS = {
    "rollout.max_tokens": "--max-tokens",
    "eval.max_tokens": "--max-tokens",
    "rollout.engine": "--engine",
    "eval.samples": "--samples",
    "eval.temperature": "--temperature",
    "eval.top_p": "--top-p",
    "eval.limit": "--limit",
    "eval.data": "--data",
    "task.template": "--template",
    "task.grader": "--grader",
    "model.path": "MODEL",
}
# Of the recipe itself, where their names are no words of a sentence.
OWN_OPTIONS = {"seed": "--seed", "precision": "--precision"}
# Keys that say how training samples, and the options that say it here.
OF_TRAINING = {
    "rollout.max_tokens": "--max-tokens",
    "eval.max_tokens": "--max-tokens",
    "rollout.samples": "--samples",
    "rollout.temperature": "--temperature",
    "rollout.top_p": "--top-p",
    "task.data": "--data",
    "task.limit": "--limit",
}


def make_plan(
    model: str,
    *,
    data: Sequence[str] = (),
    samples: int | None = None,
    engine: str | None = None,
    precision: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: str | int | None = None,
    template: str | None = None,
    grader: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    both: bool = False,
    texts: bool = False,
    chunk: int | None = None,
    overrides: Sequence[str] = (),
    command: str = "evaluate",
) -> Plan:
    """The plan for `model`: 'builtin', a model folder or name, or a run folder, whose settings are then the defaults.

    `max_tokens` may hold several budgets, as "8192,32768". `overrides` are a recipe's ``key=value``, such as
    ``rollout.vllm.memory=0.8``. Raises ValueError naming the option; `command` is the one that has it.
    """
    _refuse_of_training(overrides)
    if chunk is not None and chunk < 1:
        raise ValueError(f"--chunk {chunk}: write a positive number of problems")
    tree = _defaults(model)
    given = {
        "seed": seed,
        "precision": precision,
        "task": {"template": template, "grader": grader},
        "rollout": {"engine": engine},
        "eval": {
            "data": list(data) or None,
            "samples": samples,
            "temperature": temperature,
            "top_p": top_p,
            "limit": limit,
        },
    }
    _put(tree, given)
    budgets = _budgets(max_tokens if max_tokens is not None else tree["eval"].get("max_tokens"))
    tree["rollout"]["max_tokens"] = tree["eval"]["max_tokens"] = budgets[-1] if budgets else LONGEST
    with said_in_options(OPTIONS | OWN_OPTIONS):
        if not tree["eval"].get("data"):
            raise ValueError("--data: name a set: a shipped one (arithmetic_test, math500, aime24, ...) or a file")
        if any(item.strip().startswith("precision.") for item in overrides):
            tree.setdefault("precision", "fp16")  # a part of the plan that holds where nothing is named
        for item in overrides:
            override(tree, item)
        recipe = Recipe.of(tree, f"tenbit {command}")
        names = [set_name(source) for source in recipe.eval.data]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"--data: two sets would both be called {twice[0]!r}. Rename one, or remove it")
    return Plan(recipe, budgets, both, texts, chunk)


def _refuse_of_training(overrides: Sequence[str]) -> None:
    """Raises ValueError for a key that nothing here would read: it must not seem to have been heard."""
    for item in overrides:
        key = item.partition("=")[0].strip()
        if key in OF_TRAINING:
            raise ValueError(f"{item!r}: this key is not read here. Write {OF_TRAINING[key]} instead")


def _defaults(model: str) -> dict[str, Any]:
    """What holds where no option says otherwise: a run's own settings, or those of Table 2 of the paper."""
    folder = Path(model).expanduser()
    name = re.sub(r"[^\w.-]", "-", folder.resolve().name if folder.is_dir() else model.rstrip("/").split("/")[-1])
    tree: dict[str, Any] = {"name": f"evaluate-{name}", "steps": 1, "model": {"path": model}}
    if not (folder / "recipe.toml").is_file():
        return tree | {"task": {}, "rollout": {}, "eval": {"samples": SAMPLES}}
    if not (folder / "model" / "config.json").is_file():
        raise ValueError(
            f"{model}: this run has no model/ yet; it is written when a run is finished. Finish it with "
            "`tenbit train RECIPE --out FOLDER --resume`"
        )
    own = Recipe.load(folder / "recipe.toml").tree()
    # Of sampling for training only what the engine is; the rest could contradict another token budget.
    engine = {k: v for k, v in own["rollout"].items() if k in ("engine", "vllm", "ray", "stop_tokens", "max_batch")}
    spec = {k: v for k, v in own["eval"].items() if k != "every"}
    spec.setdefault("max_tokens", own["rollout"]["max_tokens"])
    kept = {key: own[key] for key in ("seed", "precision", "task")}
    path = {"path": str(folder / "model")}
    return tree | kept | {"model": own["model"] | path, "rollout": engine, "eval": spec}


def _put(tree: dict[str, Any], given: dict[str, Any]) -> None:
    """Lays over the tree what is given; None is not."""
    for key, value in given.items():
        if isinstance(value, dict):
            _put(tree.setdefault(key, {}), value)
        elif value is not None:
            tree[key] = value


def _budgets(text: str | int | None) -> tuple[int, ...]:
    """``"32768,8192"`` -> (8192, 32768)."""
    if text is None:
        return ()
    try:
        budgets = sorted({int(part) for part in str(text).split(",")})
    except ValueError:
        budgets = [0]
    if budgets[0] < 1:
        raise ValueError(f"--max-tokens {text}: write a positive number of tokens, or several as 8192,32768")
    return tuple(budgets)


def fit(plan: Plan, model: loading.Model) -> tuple[Plan, dict[str, list[Asked]]]:
    """The sets, tokenised, by name, and the plan with a token budget. Raises ValueError for one that does not fit.

    Every problem is asked: leaving out those that do not fit would be an evaluation of another set.
    """
    recipe = plan.recipe
    own = {"problem_key": recipe.eval.problem_key, "answer_key": recipe.eval.answer_key, "split": recipe.eval.split}
    task = recipe.task.model_copy(update={k: v for k, v in own.items() if v is not None})
    asking = recipe.model_copy(update={"task": task})
    unbounded = -(1 << 62)  # the room is measured below, where the message can name this command's option
    with said_in_options(OPTIONS):
        sets = {set_name(s): ask(s, asking, model, unbounded, recipe.eval.limit) for s in recipe.eval.data}
    longest = max((a for asked in sets.values() for a in asked), key=lambda a: len(a.ids))
    room = model.context - len(longest.ids)
    budgets = plan.budgets or (max(1, min(LONGEST, room)),)
    if budgets[-1] > room:
        left = f"Lower --max-tokens to {room}" if room > 0 else "Remove the problem, or use a model with a longer one"
        raise ValueError(
            f"{longest.problem.id}: the prompt has {len(longest.ids)} tokens and the response up to {budgets[-1]}; "
            f"together they exceed the model's context of {model.context}. {left}"
        )
    most = {"max_tokens": budgets[-1]}
    rollout, spec = recipe.rollout.model_copy(update=most), recipe.eval.model_copy(update=most)
    recipe = recipe.model_copy(update={"rollout": rollout, "eval": spec})
    return replace(plan, recipe=recipe, budgets=budgets), sets
