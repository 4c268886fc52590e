"""The same tokens under both policies: sampled by an engine (log mu), scored by the training backend (log pi).

    scored = sample_and_score(recipe, model, Precision.parse("bf16"), prompts)
    measured(scored).metrics()                        the numbers of `mismatch.py`

`model` holds FP32 masters and is never changed: the engine gets them cast by the plan, the trainer works on a copy.
The steps are also there one by one, because a study may sample once and score in several formats.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tenbit.backends.single import SingleBackend
from tenbit.batching import collate, micro_batches, ungraded
from tenbit.engines.choose import make_engine
from tenbit.mismatch import Mismatch, measure
from tenbit.models.experts import routed, routers
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.recipe import Recipe
from tenbit.routing import compare as compare_routing
from tenbit.types import Completion, Overflow, Prompt, Stats

PADDED = 1 << 20  # elements of the padded rectangles that are measured at a time
Sequence2 = tuple[Sequence[int], Sequence[int]]  # prompt ids, response ids


@dataclass(frozen=True)
class Scored:
    """A response of T tokens with both log-probabilities of each, ``[T]`` float32 on the CPU."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logp_rollout: Tensor
    logp_train: Tensor
    temperature: float | None = None  # what it was sampled at, where known
    version: int | None = None  # weight updates the sampler had received, where known
    routing: Stats = field(default_factory=dict)  # of a mixture: how differently the two sides chose experts

    @property
    def length(self) -> int:
        return len(self.response_ids)

    @property
    def measurable(self) -> Tensor:
        """Where both log-probabilities are finite, ``[T]`` bool: everywhere, unless they came from elsewhere."""
        return self.logp_train.isfinite() & self.logp_rollout.isfinite()

    @property
    def logratio(self) -> Tensor:
        """l = log pi - log mu, ``[T]`` float64."""
        return self.logp_train.double() - self.logp_rollout.double()


def sample(recipe: Recipe, model: Model, precision: Precision, prompts: Sequence[Prompt]) -> list[Completion]:
    """One response per prompt, by an engine of its own with the masters cast by the plan; closed again.

    Raises Overflow if the weights or the sampler's log-probabilities do not fit `precision.rollout`.
    """
    longest = max((len(p.ids) for p in prompts), default=0) + recipe.rollout.max_tokens
    with make_engine(recipe.rollout, model, precision, recipe.seed, longest=longest) as engine:
        engine.load_weights(precision.to_engine(model.weights(engine.wants)), version=0)
        completions = engine.generate(prompts, recipe.sampling(model.stop_token_ids))
    for c in completions:
        if not bool(c.logp.isfinite().all()):
            raise Overflow(f"the sampler's log-probabilities are not finite in {precision.rollout.value}")
    return completions


def train_logps(
    model: Model,
    precision: Precision,
    recipe: Recipe,
    sequences: Sequence[Sequence2],
    temperature: float | None = None,
) -> list[Tensor]:
    """log pi of each response token, ``[T]`` float32 on the CPU per (prompt ids, response ids) pair, in order.

    By `SingleBackend` on a copy of the FP32 model, in micro-batches of `optim.token_budget` tokens; at
    `rollout.temperature` unless another one is given. Raises Overflow on one that is not finite.
    """
    given = [_unscored(tuple(prompt), tuple(response)) for prompt, response in sequences]
    return [logp for logp, _ in _trained(model, precision, recipe, given, temperature)]


def _trained(
    model: Model, precision: Precision, recipe: Recipe, completions: Sequence[Completion], temperature: float | None
) -> list[tuple[Tensor, Stats]]:
    """log pi of each response, and how differently a mixture routed it from what the completion says, if it does."""
    module: Any = copy.deepcopy(model.module)
    own = replace(model, module=module.to(model.device))
    heat = recipe.rollout.temperature if temperature is None else temperature
    backend = SingleBackend(own, precision, recipe.optim, heat, 1)
    rows = [ungraded(c) for c in completions]
    found: list[tuple[Tensor, Stats]] = [(torch.zeros(0), {})] * len(rows)
    for part in micro_batches([r.length for r in rows], recipe.optim.token_budget)[0] if rows else ():
        batch = collate([rows[i] for i in part], model.pad_token_id)
        with routed(routers(module), batch.experts if recipe.rollout.replay else None) as routes:
            logp = backend.logprobs(batch).cpu()
        for place, (i, values, mask) in enumerate(zip(part, logp, batch.mask, strict=True)):
            routing: Stats = {}
            if batch.experts is not None and routes.chosen is not None:
                own = routes.chosen.unflatten(0, batch.tokens.shape)[place].cpu()
                routing = compare_routing(own, batch.experts[place])
            found[i] = (values[mask].clone(), routing)
    if not all(bool(logp.isfinite().all()) for logp, _ in found):
        raise Overflow(f"the trainer's log-probabilities are not finite in {precision.compute.value}")
    return found


def score(recipe: Recipe, model: Model, precision: Precision, completions: Sequence[Completion]) -> list[Scored]:
    """The trainer's log-probabilities next to those that the completions came with."""
    found = _trained(model, precision, recipe, completions, None)
    heat = recipe.rollout.temperature
    return [
        Scored(c.prompt_ids, c.response_ids, c.logp, l, heat, routing=routing)
        for c, (l, routing) in zip(completions, found, strict=True)
    ]


def sample_and_score(recipe: Recipe, model: Model, precision: Precision, prompts: Sequence[Prompt]) -> list[Scored]:
    """Samples with one side of the plan and scores with the other."""
    return score(recipe, model, precision, sample(recipe, model, precision, prompts))


def measured(scored: Sequence[Scored]) -> Mismatch:
    """What the two policies differ by. Tokens with a log-probability that is not finite are left out."""
    found = Mismatch()
    for part in micro_batches([s.length for s in scored], PADDED)[0] if scored else ():
        some = [scored[i] for i in part]
        width = max(s.length for s in some)
        pi, mu = torch.zeros(len(some), width), torch.zeros(len(some), width)
        mask = torch.zeros(len(some), width, dtype=torch.bool)
        for row, s in enumerate(some):
            pi[row, : s.length], mu[row, : s.length] = s.logp_train, s.logp_rollout
            mask[row, : s.length] = s.measurable
        found += measure(pi, mu, mask)
    return found


def _unscored(prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> Completion:
    return Completion(prompt_ids, response_ids, torch.zeros(len(response_ids)), "stop")
