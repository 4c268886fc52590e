"""Evaluation on the engine that samples: avg@k, pass@k and maj@k, from responses to scores.

    completions = draw(policy, asked, samples, seed)       one engine call
    judged = judge(policy, asked, completions)             graded, with the class of answers that each one votes for
    scores = per_problem(judged, ks)                       {"avg@8": [P], "pass@1": [P], ..., "maj@8": [P]}
    low, high = interval(values)                           95%, over problems

`evaluate` is what training calls; `studies/evaluation.py`, the command, uses the same parts and adds intervals.

**avg@k** is the share of right responses. **pass@k** is the chance that k of a problem's n responses, drawn without
replacement, hold a right one, 1 - C(n-c, k) / C(n, k): unbiased (Chen et al. 2021). **maj@k** is the chance that the
majority of k of them, drawn in the same way, is right: the class of equal answers with the most votes wins, of tied
classes each is as likely (the expected value over them, so the order of responses does not matter), and what it earns
is its share of right responses. A response without an answer does not vote; where none votes the majority is wrong.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tenbit.clock import Clock
from tenbit.prompts import Asked
from tenbit.recipe import Recipe
from tenbit.rollout import Policy, prompts_of
from tenbit.tasks.votes import Ballot, Class, answer_of, classes
from tenbit.types import Completion, Finish

Scores = dict[str, NDArray[np.float64]]  # by metric, [P]: one number a problem

MOST_VOTERS = 64  # maj@k for k below the number of responses is computed up to here; its time grows with k^3


@dataclass(frozen=True)
class Judged:
    """One graded response. `answer` is what it votes for and `vote` the class of it, None for a response without one;
    `failure` is the grader's, where it hung, crashed or raised."""

    correct: bool
    reward: float
    answer: str | None
    vote: Class
    length: int
    finish: Finish
    failure: str | None
    text: str


# --- sampling and grading


def draw(
    policy: Policy, asked: Sequence[Asked], samples: int, seed: tuple[object, ...], first: int = 0
) -> list[list[Completion]]:
    """`samples` responses to each problem. `first` is the first problem's place in its set: it enters the seeds, so
    a set sampled in parts gives the same responses."""
    drawn = policy.engine.generate(prompts_of(asked, samples, seed, first), policy.sampling)
    return [drawn[i : i + samples] for i in range(0, len(drawn), samples)]


def cut(completion: Completion, budget: int) -> Completion:
    """The response under a smaller token budget: its first tokens. With the same seed an engine draws these, but for
    what a batch of other sizes rounds differently."""
    if completion.length <= budget:
        return completion
    ids, logp = completion.response_ids[:budget], completion.logp[:budget]
    return replace(completion, response_ids=ids, logp=logp, finish="length")


def judge(policy: Policy, asked: Sequence[Asked], drawn: Sequence[Sequence[Completion]]) -> list[list[Judged]]:
    """Grades the responses to each problem and sorts their answers into classes."""
    grader = policy.grader
    every = [(a.problem, completion) for a, group in zip(asked, drawn, strict=True) for completion in group]
    texts = [str(policy.tokenizer.decode(list(c.response_ids), skip_special_tokens=True)) for _, c in every]
    grades = policy.grade([(problem, text) for (problem, _), text in zip(every, texts, strict=True)])
    singles = iter(
        Judged(g.correct, g.reward, answer_of(grader, text), None, c.length, c.finish, g.failure, text)
        for (_, c), text, g in zip(every, texts, grades, strict=True)
    )
    groups = [[next(singles) for _ in group] for group in drawn]
    ballots = [
        Ballot(
            a.problem,
            [j.answer for j in group],
            [j.correct for j in group],
            [j.failure is not None for j in group],
        )
        for a, group in zip(asked, groups, strict=True)
    ]
    failures = grader.failures.copy()
    votes = classes(grader, ballots)
    grader.failures = failures  # a comparison of two answers that hangs is no failure to grade a response
    return [[replace(j, vote=v) for j, v in zip(*pair, strict=True)] for pair in zip(groups, votes, strict=True)]


# --- scores of one problem


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that k of n responses, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def maj_at_k(correct: Sequence[bool], votes: Sequence[Class], k: int) -> float:
    """The expected correctness of the majority of k responses, drawn without replacement from these; see above.

    Exact, by counting; ``correct`` and ``votes`` are ``[n]``, k at most n.
    """
    size = Counter(v for v in votes if v is not None)
    right = Counter(v for v, is_right in zip(votes, correct, strict=True) if v is not None and is_right)
    parts = tuple(sorted((n, right[v] / n) for v, n in size.items()))
    return _majority(parts, len(votes) - size.total(), k)


@functools.lru_cache(maxsize=1 << 14)
def _majority(parts: tuple[tuple[int, float], ...], silent: int, k: int) -> float:
    """`parts` are (size, share of right responses) of each class, `silent` the responses without a vote."""
    n = sum(size for size, _ in parts) + silent
    if not parts:
        return 0.0
    if k == n:
        top = parts[-1][0]
        winners = [share for size, share in parts if size == top]
        return sum(winners) / len(winners)
    won = sum(_won_with(parts, silent, k, most) for most in range(1, min(k, parts[-1][0]) + 1))
    return won / float(math.comb(n, k))


def _won_with(parts: Sequence[tuple[int, float]], silent: int, k: int, most: int) -> float:
    """The sum over draws of k whose largest class has `most` votes of the mean share of their largest classes.

    `ways[j, t]` counts draws of j from the classes so far, none above `most` and t of them at it; `shares[j, t]` sums
    over those draws the shares of the classes at it. All terms are positive, so nothing cancels.
    """
    shape = k + 1, k // most + 1
    ways, shares = np.zeros(shape), np.zeros(shape)
    ways[0, 0] = 1.0
    for size, share in parts:
        next_ways, next_shares = np.zeros(shape), np.zeros(shape)
        for count in range(min(most, size) + 1):
            choices, rest = float(math.comb(size, count)), k + 1 - count
            if count < most:
                next_ways[count:] += choices * ways[:rest]
                next_shares[count:] += choices * shares[:rest]
            else:
                next_ways[count:, 1:] += choices * ways[:rest, :-1]
                next_shares[count:, 1:] += choices * (shares[:rest, :-1] + share * ways[:rest, :-1])
        ways, shares = next_ways, next_shares
    quiet = np.array([float(math.comb(silent, k - j)) if k - j <= silent else 0.0 for j in range(k + 1)])
    tied = np.arange(1, shape[1])
    return float((quiet @ shares[:, 1:] / tied).sum())


# --- scores of a set


def ks_of(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of responses itself."""
    powers = [1 << i for i in range(samples.bit_length())]
    return sorted({*powers, samples})


def per_problem(groups: Sequence[Sequence[Judged]], ks: Sequence[int]) -> Scores:
    """Scores of each problem: ``avg@n`` over its n responses, ``pass@k`` and ``maj@k`` for each k. Arrays ``[P]``."""
    n = len(groups[0])
    right = [sum(j.correct for j in group) for group in groups]
    scores = {f"avg@{n}": [c / n for c in right]}
    for k in ks:
        scores[f"pass@{k}"] = [pass_at_k(n, c, k) for c in right]
    for k in ks:
        if k <= MOST_VOTERS or k == n:
            scores[f"maj@{k}"] = [maj_at_k([j.correct for j in g], [j.vote for j in g], k) for g in groups]
    return {name: np.array(values, dtype=np.float64) for name, values in scores.items()}


def interval(
    values: NDArray[np.float64],
    *,
    low: float | NDArray[np.float64] = 0.0,
    high: float | NDArray[np.float64] = 1.0,
    seed: int = 0,
    draws: int = 10_000,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95% intervals for the means of `values` ``[P, M]``, M scores of P problems between `low` and `high`: two ``[M]``.

    A bootstrap over problems with continuous weights (Dirichlet(1, ..., 1), the Bayesian bootstrap), in which one
    more problem takes part: one that scores `low` for the lower end, one that scores `high` for the upper. With many
    problems it weighs nothing and this is the ordinary bootstrap. With few, or with equal scores, from which a plain
    bootstrap would conclude that nothing is uncertain, it keeps the interval honest: for scores of only 0 and 1 the
    result is Clopper and Pearson's exact interval (Learned-Miller and Thomas 2019, "A new confidence interval for the
    mean of a bounded random variable"). All M are weighted by the same draws.
    """
    problems, metrics = values.shape
    chance = np.random.default_rng(seed)
    lower, upper = np.empty((draws, metrics)), np.empty((draws, metrics))
    step = max(1, (1 << 22) // (problems + 1))  # draws at a time: 32 MB of weights
    for start in range(0, draws, step):
        weight = chance.standard_exponential((min(step, draws - start), problems + 1))
        weight /= weight.sum(1, keepdims=True)
        mean, extra = weight[:, :-1] @ values, weight[:, -1:]
        lower[start : start + step] = mean + extra * low
        upper[start : start + step] = mean + extra * high
    found = np.quantile(lower, 0.025, axis=0), np.quantile(upper, 0.975, axis=0)
    return np.clip(found[0], low, high), np.clip(found[1], low, high)  # weights add up to 1 only within rounding


def difference_interval(
    values: NDArray[np.float64], samples: int, *, seed: int = 0, draws: int = 10_000
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95% intervals for the means of paired differences ``[P, M]`` of scores, each of `samples` responses a problem.

    As `interval`; the additional problem differs by as much as the most different one here, in the direction of the
    end, and at least by what one response can change. (By a whole 1, as the bounds of a difference would have it, would
    drown any gap in thirty problems.) Six problems that differ equally and in one direction are told from zero, five
    are not: the sign test.
    """
    most = np.maximum(np.abs(values).max(0), 1.0 / samples)
    return interval(values, low=-most, high=most, seed=seed, draws=draws)


def evaluate(policy: Policy, sets: Mapping[str, Sequence[Asked]], recipe: Recipe, clock: Clock) -> dict[str, float]:
    """``eval/SET/avg@k``, ``pass@k`` and ``maj@k`` of every set. The seeds are the same at every evaluation."""
    k = recipe.eval.samples
    sampler = replace(policy, sampling=recipe.eval_sampling(policy.sampling.stop_token_ids))
    metrics: dict[str, float] = {}
    for name, asked in sets.items():
        with clock("eval"):
            drawn = draw(sampler, asked, k, (recipe.seed, "eval", name))
            scores = per_problem(judge(sampler, asked, drawn), [k])
        metrics |= {f"eval/{name}/{metric}": float(values.mean()) for metric, values in scores.items()}
    return metrics
