"""Evaluation on the engine that samples: avg@k, and pass@k without bias (Chen et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tenbit.clock import Clock
from tenbit.prompts import Asked
from tenbit.recipe import Recipe
from tenbit.rollout import Group, Policy


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that k of n responses, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def scores(groups: Sequence[Group], k: int) -> dict[str, float]:
    """avg@k and pass@k over problems with k graded responses each."""
    right = [sum(r.correct for r in group) for group in groups]
    return {
        f"avg@{k}": sum(right) / (k * len(groups)),
        f"pass@{k}": sum(pass_at_k(k, c, k) for c in right) / len(groups),
    }


def evaluate(policy: Policy, sets: Mapping[str, Sequence[Asked]], recipe: Recipe, clock: Clock) -> dict[str, float]:
    """``eval/SET/avg@k`` and ``eval/SET/pass@k`` of every set. The seeds are the same at every evaluation."""
    judge = replace(policy, sampling=recipe.eval_sampling(policy.sampling.stop_token_ids))
    metrics = {}
    for name, asked in sets.items():
        own_clock = Clock()
        with clock("eval"):
            groups = judge.answer(asked, recipe.eval.samples, (recipe.seed, "eval", name), own_clock)
        metrics |= {f"eval/{name}/{key}": value for key, value in scores(groups, recipe.eval.samples).items()}
    return metrics
