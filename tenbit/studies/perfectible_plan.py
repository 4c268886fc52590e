"""What `tenbit perfectible` is asked to do, as one value; and where it writes.

Options become a recipe in the same way as `tenbit evaluate`'s, so models, sets, engines, formats and graders are named
and checked alike; sampling is at temperature 1 and untruncated unless asked otherwise, as training samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tenbit.models import loading
from tenbit.prompts import Asked
from tenbit.recipe import Recipe
from tenbit.studies import evaluation_plan
from tenbit.studies.perfectible_rule import Rule

SAMPLES, LOW, HIGH = 40, 0.2, 0.8  # section 4 of the paper
ROUND = 4
RESPONSES_A_CHUNK = 2048  # about so many, where the plan does not say: later rounds still fill an engine


@dataclass(frozen=True)
class Plan:
    """`recipe.eval` holds the set and how it is sampled; `budget` is the longest response, None: see `fit`. `round`
    responses are sampled at least of a problem at a time, `chunk` problems are sampled and written together."""

    recipe: Recipe
    rule: Rule
    low: float
    high: float
    round: int
    chunk: int
    budget: int | None = None

    @property
    def full(self) -> bool:
        """Whether every response is sampled, whatever the first ones were."""
        return self.round >= self.rule.samples


def make_plan(
    model: str,
    *,
    data: str | None = None,
    samples: int = SAMPLES,
    low: float = LOW,
    high: float = HIGH,
    engine: str | None = None,
    precision: str | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int | None = None,
    template: str | None = None,
    grader: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    full: bool = False,
    round: int = ROUND,
    chunk: int | None = None,
    overrides: Sequence[str] = (),
) -> Plan:
    """The plan for `model`: 'builtin', a model folder or name, or a run folder, whose settings are then the defaults,
    but for the sampling. Raises ValueError naming the option."""
    rule = Rule.of(samples, low, high)
    if round < 1:
        raise ValueError(f"--round {round}: write a positive number of responses")
    asked = evaluation_plan.make_plan(
        model, data=[data] if data else (), samples=samples, engine=engine, precision=precision,
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, template=template, grader=grader, limit=limit,
        seed=seed, chunk=chunk, overrides=overrides, command="perfectible",
    )  # fmt: skip
    recipe = asked.recipe
    if len(recipe.eval.data) != 1:
        raise ValueError(f"--data: name one set; there are {', '.join(recipe.eval.data)}")
    if recipe.eval.samples != samples:
        raise ValueError("eval.samples: write --samples instead")
    if not recipe.eval.temperature:
        raise ValueError(
            "--temperature 0: all responses to a problem would be the same, so none would be solved only sometimes. "
            "Write a positive temperature, or leave it out: 1, as training samples"
        )
    if limit is None and not any(item.startswith("eval.limit") for item in overrides):
        # a run's evaluations may have been of a part of their set
        recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"limit": None})})
    recipe = recipe.model_copy(update={"name": recipe.name.replace("evaluate-", "perfectible-", 1)})
    return Plan(
        recipe,
        rule,
        low,
        high,
        round=samples if full else min(round, samples),
        chunk=chunk or max(1, RESPONSES_A_CHUNK // samples),
        budget=max(asked.budgets, default=None),
    )


def fit(plan: Plan, model: loading.Model) -> tuple[Plan, str, list[Asked]]:
    """The plan with a token budget, the set's name, and its problems, tokenised. Raises ValueError for one that does
    not fit the model's context."""
    budgets = () if plan.budget is None else (plan.budget,)
    fitted, sets = evaluation_plan.fit(evaluation_plan.Plan(plan.recipe, budgets), model)
    ((name, asked),) = sets.items()
    return replace(plan, recipe=fitted.recipe), name, asked


@dataclass(frozen=True)
class Files:
    """What is written, all beside `kept`, the file that was asked for: of `mine.jsonl`, `mine.all.jsonl` and so on."""

    kept: Path

    @classmethod
    def of(cls, out: Path | None) -> Files:
        if out is None:
            raise ValueError("--out: name the file for the kept problems, such as --out perfectible.jsonl")
        if out.name == ".jsonl":
            raise ValueError(f"--out {out}: nothing is before .jsonl. Name it, such as {out.with_name('mine.jsonl')}")
        if out.suffix != ".jsonl":
            raise ValueError(f"--out {out}: the file becomes a data set, so its name must end with .jsonl")
        return cls(out)

    def _beside(self, ending: str) -> Path:
        return self.kept.with_name(f"{self.kept.stem}.{ending}")

    @property
    def all(self) -> Path:
        """One row for every problem, in order: the state that `--resume` goes on from."""
        return self._beside("all.jsonl")

    @property
    def summary(self) -> Path:
        return self._beside("summary.json")

    @property
    def page(self) -> Path:
        return self._beside("html")

    @property
    def figure(self) -> Path:
        return self._beside("svg")

    @property
    def lock(self) -> str:
        return f".{self.kept.stem}.lock"

    def existing(self) -> list[Path]:
        return [path for path in (self.kept, self.all, self.summary, self.page, self.figure) if path.exists()]
