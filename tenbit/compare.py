"""The mismatch of several formats on the same weights: the engine samples, the backend scores the same tokens.

Each format gets an engine and a backend of its own, made from the same FP32 weights; prompts and seeds are equal.
The numbers are those of `mismatch.py`; the paper's finding is that FP16's are far smaller than BF16's (Figure 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.prompts import Asked
from tenbit.recipe import Recipe
from tenbit.rollout import prompts_of
from tenbit.scoring import measured, sample_and_score
from tenbit.types import Overflow

LENGTHS = (1, *(2**i for i in range(5, 21)))  # buckets of response lengths: 1-31, 32-63, 64-127, ...


def _alone(recipe: Recipe) -> Recipe:
    """With an engine in this process: a run's pool fills its Ray cluster, and one engine of its kind will do."""
    rollout = recipe.rollout
    if rollout.engine != "ray":
        return recipe
    alone = rollout.model_copy(update={"engine": rollout.ray.engine, "ahead": 0})
    return recipe.model_copy(update={"rollout": alone})


def compare(recipe: Recipe, model: Model, asked: Sequence[Asked], name: str) -> dict[str, Any]:
    """Mismatch metrics of one precision, also by response length. `model` holds FP32 weights and is not changed.

    Raises Overflow if the model does not fit the format.
    """
    precision = Precision.parse(name)
    prompts = prompts_of(asked[: recipe.compare.prompts], recipe.compare.samples, (recipe.seed, "compare"))
    scored = sample_and_score(_alone(recipe), model, precision, prompts)
    seen = measured(scored)
    if not math.isfinite(seen.tokens["k3"].total):
        raise Overflow(f"the trainer's log-probabilities are not finite in {precision.compute.value}")
    return {
        "precision": precision.name,
        **seen.metrics(recipe.algorithm.build().cap),
        "by_length": seen.by_length(LENGTHS),
        "tokens": sum(s.length for s in scored),
        "sequences": len(scored),
    }
