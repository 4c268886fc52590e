"""The mismatch of several formats on the same weights: the engine samples, the backend scores the same tokens.

Each format gets an engine and a backend of its own, made from the same FP32 weights; prompts and seeds are equal.
The numbers are those of `mismatch.py`; the paper's finding is that FP16's are far smaller than BF16's (Figure 2).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tenbit import mismatch
from tenbit.backends.single import SingleBackend
from tenbit.batching import Row, collate, micro_batches
from tenbit.engines.choose import make_engine
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.prompts import Asked
from tenbit.recipe import Recipe
from tenbit.rollout import seed_of
from tenbit.types import Overflow, Problem, Prompt, Rollout

LENGTHS = (1, *(2**i for i in range(5, 21)))  # buckets of response lengths: 1-31, 32-63, 64-127, ...


def compare(recipe: Recipe, model: Model, asked: Sequence[Asked], name: str) -> dict[str, Any]:
    """Mismatch metrics of one precision, also by response length. `model` holds FP32 weights and is not changed.

    Raises Overflow if the model does not fit the format.
    """
    precision = Precision.parse(name)
    prompts = [
        Prompt(a.ids, seed_of(recipe.seed, "compare", place, sample))
        for place, a in enumerate(asked[: recipe.compare.prompts])
        for sample in range(recipe.compare.samples)
    ]
    own = replace(model, module=copy.deepcopy(model.module))
    backend = SingleBackend(own, precision, recipe.optim, recipe.rollout.temperature, 1)
    with make_engine(recipe.rollout, model, precision, recipe.seed) as engine:
        engine.load_weights(precision.to_engine(backend.weights()), version=0)
        completions = engine.generate(prompts, recipe.sampling(model.stop_token_ids))
    nothing = Problem("", "", "")
    rows = [Row(Rollout(nothing, c, "", 0.0, False, 0), 0.0) for c in completions]
    seen = mismatch.Mismatch()
    for part in micro_batches([r.length for r in rows], recipe.optim.token_budget)[0]:
        batch = collate([rows[i] for i in part], model.pad_token_id)
        seen += mismatch.measure(backend.logprobs(batch).cpu(), batch.logp_rollout, batch.mask)
    tokens = sum(c.length for c in completions)
    if not math.isfinite(seen.tokens["k3"].total):
        raise Overflow(f"the trainer's log-probabilities are not finite in {precision.compute.value}")
    return {
        "precision": precision.name,
        **seen.metrics(recipe.algorithm.build().cap),
        "by_length": seen.by_length(LENGTHS),
        "tokens": tokens,
        "sequences": len(rows),
    }
