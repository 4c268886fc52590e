"""What attribution switches and measures with: both policies under chosen settings, and gaps with bootstrap intervals.

A `Gap` is KL(mu || pi) by k3 per token, with one value per bootstrap resample of whole sequences, for the tokens of
a sequence are not independent. Gaps over the same sequences share their resamples, so differences and ratios of them
are paired: what is common to both cancels, and their intervals are as narrow as they should be.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tenbit.backends.single import SingleBackend
from tenbit.engines import Engine
from tenbit.engines.choose import make_engine
from tenbit.engines.sampling import log_mu
from tenbit.models.loading import Model
from tenbit.models.logprobs import Head, response_hidden
from tenbit.precision import Precision
from tenbit.recipe import Recipe
from tenbit.rollout import seed_of
from tenbit.scoring import train_logps
from tenbit.types import Prompt, Sampling

Ids = tuple[tuple[int, ...], tuple[int, ...]]  # prompt, response
Logps = Sequence[Tensor]

RESAMPLES = 1000
LEVEL = 0.95
LOGITS_AT_ONCE = 1 << 25  # numbers


# --- gaps


@dataclass(frozen=True)
class Bootstrap:
    """How often each of n sequences occurs in each resample, ``[RESAMPLES, n]`` float64."""

    counts: Tensor

    @classmethod
    def of(cls, n: int, *seed: object) -> Bootstrap:
        generator = torch.Generator().manual_seed(seed_of("bootstrap", n, *seed))
        drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
        once = torch.ones(RESAMPLES, n, dtype=torch.float64)
        return cls(torch.zeros_like(once).scatter_add_(1, drawn, once))


@dataclass(frozen=True)
class Gap:
    """A number, and what it would be in each resample ``[RESAMPLES]``."""

    value: float
    draws: Tensor

    @property
    def interval(self) -> tuple[float, float]:
        return interval(self.draws)

    def __add__(self, other: Gap) -> Gap:
        return Gap(self.value + other.value, self.draws + other.draws)

    def __sub__(self, other: Gap) -> Gap:
        return Gap(self.value - other.value, self.draws - other.draws)

    def __mul__(self, other: Gap) -> Gap:
        return Gap(self.value * other.value, self.draws * other.draws)

    def larger(self, other: Gap) -> Gap:
        return Gap(max(self.value, other.value), torch.maximum(self.draws, other.draws))

    def over(self, other: Gap) -> Gap:
        """The ratio; 0 over nothing, for no gap has no parts."""
        zero = other.draws == 0
        draws = torch.where(zero, 0.0, self.draws / torch.where(zero, 1.0, other.draws))
        return Gap(self.value / other.value if other.value else 0.0, draws)


def interval(draws: Tensor) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return low, high


def gap(mu: Logps, pi: Logps, bootstrap: Bootstrap, first: Sequence[int] | None = None) -> Gap:
    """KL(mu || pi) per token by k3, over each sequence's tokens, or over the `first` so many of each."""
    ends: Sequence[int | None] = first if first is not None else [None] * len(mu)
    ratios = [(p.double() - m.double())[:end] for m, p, end in zip(mu, pi, ends, strict=True)]
    total = torch.stack([(r.expm1() - r).sum() for r in ratios])
    tokens = torch.tensor([float(len(r)) for r in ratios], dtype=torch.float64)
    draws = (bootstrap.counts @ total) / (bootstrap.counts @ tokens).clamp_min(1.0)
    return Gap(float(total.sum() / tokens.sum().clamp_min(1.0)), draws)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


# --- both sides


def variant(model: Model, attention: str | None = None, plain: bool = False) -> Model:
    """A copy with another attention, and, if `plain`, computing with the library's own modules only.

    `models/fused.py` leaves alone whatever has hooks, for it could not honour them; so hooks that do nothing keep
    every layer as the library wrote it.
    """
    module = copy.deepcopy(model.module)
    if attention is not None:
        module.set_attn_implementation(attention)
    if plain:
        for part in module.modules():
            part.register_forward_pre_hook(_nothing)
    return replace(model, module=module)


def _nothing(module: object, args: object) -> None:
    return None


@torch.no_grad()
def transformed(
    model: Model, precision: Precision, recipe: Recipe, sequences: Sequence[Ids], samplings: Sequence[Sampling]
) -> list[list[Tensor]]:
    """The trainer's log-probabilities under each of several samplings: ``out[sampling][sequence]`` is ``[T]``.

    One forward pass serves all of them. A token outside what top-p or top-k leave has -inf.
    """
    own = replace(model, module=copy.deepcopy(model.module))
    SingleBackend(own, precision, recipe.optim, 1.0, 1)  # casts the copy and fuses its layers, as in training
    head = Head.of(own.module, precision.head_dtype("train"))
    out: list[list[Tensor]] = [[] for _ in samplings]
    size = max(1, LOGITS_AT_ONCE // len(head.weight))
    for prompt, response in sequences:
        tokens = torch.tensor([[*prompt, *response]], device=model.device)
        length, mask = torch.tensor([len(prompt)]), torch.ones(1, len(response), dtype=torch.bool)
        with precision.autocast(model.device):
            hidden = response_hidden(own.module, tokens, length.to(model.device), mask.to(model.device))
        parts = [head.logits(part) for part in hidden.split(size)]
        targets = torch.tensor(response, device=model.device).split(size)
        for found, sampling in zip(out, samplings, strict=True):
            scored = [log_mu(logits, ids, sampling) for logits, ids in zip(parts, targets, strict=True)]
            found.append(torch.cat(scored).cpu())
    return out


@dataclass(frozen=True)
class Bench:
    """A model and a plan, and how the samples are taken to have been drawn."""

    recipe: Recipe
    model: Model
    precision: Precision
    sampling: Sampling

    @property
    def plain(self) -> Sampling:
        """The same temperature, nothing truncated."""
        return replace(self.sampling, top_p=1.0, top_k=0)

    def trainer(
        self,
        sequences: Sequence[Ids],
        *,
        precision: Precision | None = None,
        model: Model | None = None,
        alone: bool = False,
    ) -> list[Tensor]:
        """log pi of each response token, in micro-batches as in training, or `alone`: one row at a time."""
        recipe = self.recipe
        if alone:
            recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"token_budget": 1})})
        logps = train_logps(
            model or self.model, precision or self.precision, recipe, sequences, self.sampling.temperature
        )
        return self._truncate(logps, sequences)

    def prefill(self, engine: Engine, sequences: Sequence[Ids], alone: bool = False) -> list[Tensor]:
        """log mu of the same tokens by the engine's pass over whole sequences, all in one call or one a call."""
        calls = [[s] for s in sequences] if alone else [list(sequences)]
        return self._truncate([logp for call in calls for logp in engine.score(call, self.plain)], sequences)

    def _truncate(self, logps: list[Tensor], sequences: Sequence[Ids]) -> list[Tensor]:
        """Renormalises over what top-p and top-k leave.

        The mass that they leave out is taken from the trainer for both sides, so it cancels between them: a token at
        the border, inside for one side and outside for the other, must not make a gap of infinity.
        """
        if not self.sampling.truncated:
            return logps
        whole, cut = transformed(self.model, self.precision, self.recipe, sequences, (self.plain, self.sampling))
        shifts = [(c - w).masked_fill(~c.isfinite(), 0.0) for w, c in zip(whole, cut, strict=True)]
        return [logp + shift for logp, shift in zip(logps, shifts, strict=True)]

    @contextmanager
    def engine(self, precision: Precision | None = None, engine: Engine | None = None) -> Iterator[Engine]:
        """A fresh engine of the recipe's kind, or the one given, with the model's weights loaded into it."""
        plan = precision or self.precision
        with engine or make_engine(self.recipe.rollout, self.model, plan, self.recipe.seed) as fresh:
            fresh.load_weights(plan.to_engine(self.model.module.state_dict().items()), version=0)
            yield fresh


@dataclass(frozen=True)
class Control:
    """Responses drawn here and now, from prompts of the samples: `decoded` is what the engine says of them."""

    prompts: tuple[Prompt, ...]
    sequences: tuple[Ids, ...]
    decoded: tuple[Tensor, ...]
    trained: tuple[Tensor, ...]
    bootstrap: Bootstrap
    gap: Gap

    @classmethod
    def draw(cls, bench: Bench, engine: Engine, sequences: Sequence[Ids], n: int, *salt: str) -> Control:
        """n responses to evenly spaced prompts of the given sequences, to each several where there are fewer."""
        chosen = [sequences[i * len(sequences) // n][0] for i in range(n)]
        prompts = tuple(
            Prompt(ids, seed_of(bench.recipe.seed, "attribution", *salt, i)) for i, ids in enumerate(chosen)
        )
        longest = max(len(response) for _, response in sequences)
        room = bench.model.context - max(len(p.ids) for p in prompts)
        drawn = engine.generate(prompts, replace(bench.sampling, max_tokens=max(1, min(longest, room))))
        own = tuple((c.prompt_ids, c.response_ids) for c in drawn)
        decoded = tuple(c.logp for c in drawn)
        trained = tuple(bench.trainer(own))
        bootstrap = Bootstrap.of(n, "control", *salt)
        return cls(prompts, own, decoded, trained, bootstrap, gap(decoded, trained, bootstrap))

    def part(self, n: int) -> Control:
        """The first n of it."""
        bootstrap = Bootstrap.of(min(n, len(self.prompts)), "control")
        decoded, trained = self.decoded[:n], self.trained[:n]
        return Control(
            self.prompts[:n], self.sequences[:n], decoded, trained, bootstrap, gap(decoded, trained, bootstrap)
        )

    def replay(self, bench: Bench, engine: Engine, alone: bool = False) -> tuple[list[Tensor], list[int]]:
        """Draws with the same seeds again, by another engine or `alone`, and says how far the tokens are the same.

        Log-probabilities (those of tokens that differ are of no use) and the length of the common beginning.
        """
        longest = max(len(response) for _, response in self.sequences)
        sampling = replace(bench.sampling, max_tokens=longest)
        calls = [[p] for p in self.prompts] if alone else [list(self.prompts)]
        drawn = [c for call in calls for c in engine.generate(call, sampling)]
        kept = [common(c.response_ids, own) for c, (_, own) in zip(drawn, self.sequences, strict=True)]
        logps = [torch.cat([c.logp[:k], own[k:]]) for c, own, k in zip(drawn, self.decoded, kept, strict=True)]
        return logps, kept
