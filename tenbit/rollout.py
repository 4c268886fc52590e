"""Sampling a step's rollouts: prompts -> responses -> rewards -> groups with advantages.

    stream = ProblemStream(asked, seed)               an endless, seeded order of problems
    policy = Policy(engine, tokenizer, grader, sampling)
    found = collect(policy, stream, recipe, step, clock)     enough groups for one step, shaped and filtered
    rows(found.groups, ADVANTAGES["leave-one-out"])          the same groups, with advantages

Every response has its own seed, made from the run's seed, the step and its place; so a step samples the same
responses whether the run was interrupted before it or not, and whatever else is in the engine's batch.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedTokenizerBase

from tenbit import world
from tenbit.advantages import Advantage
from tenbit.batching import Row
from tenbit.clock import Clock
from tenbit.engines import Engine
from tenbit.prompts import Asked
from tenbit.recipe import Recipe
from tenbit.tasks.grading import Grade, Grader
from tenbit.types import Completion, Problem, Prompt, Rollout, Sampling

Group = list[Rollout]


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any parts, the same in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def prompts_of(asked: Sequence[Asked], samples: int, seed: tuple[object, ...], first: int = 0) -> list[Prompt]:
    """`samples` prompts for each problem, in order, each with its own seed.

    `seed` names the call; `first` is the first problem's place in its set, for a set that is sampled in parts.
    """
    return [
        Prompt(a.ids, seed_of(*seed, place, sample))
        for place, a in enumerate(asked, first)
        for sample in range(samples)
    ]


class ProblemStream:
    """Problems for ever, each epoch in a new order that depends on the seed and the epoch alone.

    `position` counts the problems taken; a stream made anew at a position goes on as the old one would have.
    """

    def __init__(self, asked: Sequence[Asked], seed: int, position: int = 0) -> None:
        self._asked = asked
        self._seed = seed
        self.position = position
        self._epoch: int | None = None  # the one that `_places` is the order of
        self._places: list[int] = []

    def take(self, n: int) -> list[Asked]:
        taken = []
        for i in range(self.position, self.position + n):
            epoch, place = divmod(i, len(self._asked))
            taken.append(self._asked[self._order(epoch)[place]])
        self.position += n
        return taken

    def _order(self, epoch: int) -> list[int]:
        if self._epoch != epoch:
            self._epoch = epoch
            self._places = list(range(len(self._asked)))
            random.Random(seed_of(self._seed, "order", epoch)).shuffle(self._places)
        return self._places


@dataclass(frozen=True)
class Policy:
    """mu, as something that answers problems: an engine with its tokenizer, its grader and its sampling.

    `divided`: on several ranks each grades a share and gets all grades. Not so where one rank samples by itself.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    grader: Grader
    sampling: Sampling
    divided: bool = True

    def grade(self, answered: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """One grade per (problem, response text), in order."""
        return world.divide(answered, self.grader.grade) if self.divided else self.grader.grade(answered)

    def respond(self, asked: Sequence[tuple[Problem, Prompt]], clock: Clock) -> list[tuple[Completion, str, Grade]]:
        """One response to each prompt with its text and its grade, in order."""
        with clock("rollout"):
            completions = self.engine.generate([prompt for _, prompt in asked], self.sampling)
        with clock("grade"):
            texts = [str(self.tokenizer.decode(list(c.response_ids), skip_special_tokens=True)) for c in completions]
            grades = self.grade([(problem, text) for (problem, _), text in zip(asked, texts, strict=True)])
        return list(zip(completions, texts, grades, strict=True))

    def answer(self, asked: Sequence[Asked], samples: int, seed: tuple[object, ...], clock: Clock) -> list[Group]:
        """`samples` graded responses to each problem, in order. `seed` names this call."""
        problems = [a.problem for a in asked for _ in range(samples)]
        responses = self.respond(list(zip(problems, prompts_of(asked, samples, seed), strict=True)), clock)
        rollouts = [
            Rollout(problem, completion, text, grade.reward, grade.correct, i // samples)
            for i, (problem, (completion, text, grade)) in enumerate(zip(problems, responses, strict=True))
        ]
        return [rollouts[i : i + samples] for i in range(0, len(rollouts), samples)]


@dataclass(frozen=True)
class Collected:
    """A step's rollouts: `groups` to train on, and all that were `sampled`, dropped ones included."""

    groups: list[Group]
    sampled: list[Group]
    rounds: int
    metrics: dict[str, float] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)  # of the grader, by kind; in this process


def collect(policy: Policy, stream: ProblemStream, recipe: Recipe, step: int, clock: Clock) -> Collected:
    """Samples `rollout.prompts` groups; with dynamic sampling, goes on until so many have unequal rewards.

    After `rollout.max_rounds` it makes do with the groups it has; there may be none.
    """
    wanted = recipe.rollout.prompts
    failed_before = Counter(policy.grader.failures)
    kept: list[Group] = []
    sampled: list[Group] = []
    rounds = 0
    while len(kept) < wanted and rounds < recipe.rollout.max_rounds:
        groups = policy.answer(stream.take(wanted), recipe.rollout.samples, (recipe.seed, step, rounds), clock)
        # judged by the grader's rewards: a length penalty alone does not make a group worth training on
        useful = [informative(g) or not recipe.dynamic_sampling for g in groups]
        groups = [[shape_overlong(r, recipe) for r in group] for group in groups]
        rounds += 1
        sampled += groups
        kept += [g for g, is_useful in zip(groups, useful, strict=True) if is_useful]
    failures = policy.grader.failures - failed_before
    return Collected(kept[:wanted], sampled, rounds, _describe(kept, sampled, rounds), failures)


def informative(group: Group) -> bool:
    """Whether the rewards differ: equal ones give a zero advantage (DAPO's dynamic sampling)."""
    return any(r.reward != group[0].reward for r in group)


def shape_overlong(rollout: Rollout, recipe: Recipe) -> Rollout:
    """DAPO's soft overlong punishment: -p (L - (Lmax - b)) / b for a response that reaches into the buffer."""
    penalty = overlong_penalty(
        rollout.completion.length, recipe.rollout.max_tokens, recipe.overlong_buffer, recipe.rollout.overlong_penalty
    )
    return replace(rollout, reward=rollout.reward + penalty) if penalty else rollout


def overlong_penalty(length: int, longest: int, buffer: int, penalty: float) -> float:
    """0 up to longest - buffer tokens, then falling linearly, to -penalty at `longest` and beyond."""
    if buffer == 0:
        return 0.0
    return -penalty * min(1.0, max(0, length - (longest - buffer)) / buffer)


def rows(groups: Sequence[Group], advantage: Advantage) -> list[list[Row]]:
    """Groups of rollouts -> groups of rows with advantages."""
    out = []
    for group in groups:
        values = advantage(torch.tensor([r.reward for r in group], dtype=torch.double))
        out.append([Row(r, float(a)) for r, a in zip(group, values, strict=True)])
    return out


def _describe(kept: list[Group], sampled: list[Group], rounds: int) -> dict[str, float]:
    every = [r for group in sampled for r in group]
    n = len(every)
    return {
        "train/reward": sum(r.reward for r in every) / n,
        "train/accuracy": sum(r.correct for r in every) / n,
        "train/response_length": sum(r.completion.length for r in every) / n,
        "train/truncated": sum(r.completion.finish == "length" for r in every) / n,
        "train/informative_groups": sum(map(informative, sampled)) / len(sampled),
        "train/kept_groups": float(len(kept)),
        "train/rounds": float(rounds),
        "train/logp_repaired": float(sum(r.completion.repaired for r in every)),
    }
