"""Problems as prompts: a recipe's sets, loaded and tokenised once, and checked against the model's context."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tenbit.models import loading
from tenbit.recipe import Recipe
from tenbit.tasks.datasets import load_problems, shipped
from tenbit.tasks.templates import encode_prompt
from tenbit.types import Problem

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A problem with its prompt's token ids. It is tokenised once, here."""

    problem: Problem
    ids: tuple[int, ...]


def ask(source: str, recipe: Recipe, model: loading.Model, longest: int, limit: int | None) -> list[Asked]:
    """Loads problems and tokenises their prompts, once. Raises ValueError for one that does not fit the context."""
    task = recipe.task
    keys = {} if source in shipped() else {"problem_key": task.problem_key, "answer_key": task.answer_key}
    problems = load_problems(source, **keys, split=task.split, limit=limit)
    asked = [Asked(p, _encode(p, task.template, model)) for p in problems]
    _refuse_foreign_tokens(asked, model)
    room = model.context - longest
    budget = "rollout.max_tokens (eval.max_tokens for an evaluation set)"
    fitting = [a for a in asked if len(a.ids) <= room]
    if len(fitting) < len(asked) and not task.drop_long_prompts:
        worst = max(asked, key=lambda a: len(a.ids))
        raise ValueError(
            f"{worst.problem.id}: the prompt has {len(worst.ids)} tokens and the response up to {longest}; together "
            f"they exceed the model's context of {model.context}. Lower {budget}, or set task.drop_long_prompts = true "
            "to leave such problems out"
        )
    if not fitting:
        raise ValueError(f"{source}: no prompt fits the model's context of {model.context}. Lower {budget}")
    if len(fitting) < len(asked):
        log.warning(
            "%s: %d of %d prompts do not fit the context and are left out",
            source,
            len(asked) - len(fitting),
            len(asked),
        )
    return fitting


def _encode(problem: Problem, template: str, model: loading.Model) -> tuple[int, ...]:
    try:
        problem.prompt.encode()  # half a surrogate pair: JSON can write it and no tokenizer can read it
    except UnicodeEncodeError as error:
        raise ValueError(f"{problem.id}: the problem is not Unicode text: {error.reason}. Correct the row") from None
    return encode_prompt(template, problem.prompt, model.tokenizer)


def _refuse_foreign_tokens(asked: list[Asked], model: loading.Model) -> None:
    """Both sides look token ids up in the same table; an id beyond its end belongs to another model's tokenizer."""
    rows = model.vocabulary
    for a in asked:
        if max(a.ids) >= rows:
            raise ValueError(
                f"{a.problem.id}: the tokenizer gives token id {max(a.ids)}, but the model has {rows} tokens: they do "
                "not belong together. Correct the tokenizer files in model.path"
            )


def ask_evals(recipe: Recipe, model: loading.Model) -> dict[str, list[Asked]]:
    """The evaluation sets by the name that metrics have, or none if there is never an evaluation."""
    spec = recipe.eval
    own = {"problem_key": spec.problem_key, "answer_key": spec.answer_key, "split": spec.split}
    task = recipe.task.model_copy(update={k: v for k, v in own.items() if v is not None})
    recipe = recipe.model_copy(update={"task": task})
    sets: dict[str, list[Asked]] = {}
    for source in spec.data if spec.every else ():
        name = set_name(source)
        if name in sets:
            raise ValueError(f"eval.data: two sets would both be eval/{name} in the metrics. Rename one, or remove it")
        sets[name] = ask(source, recipe, model, spec.max_tokens or recipe.rollout.max_tokens, spec.limit)
    return sets


def set_name(source: str) -> str:
    """``folder/amc.jsonl`` -> ``amc``; ``owner/name:config`` -> ``name:config``."""
    name = source.rstrip("/").rpartition("/")[2]
    return name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".parquet")
