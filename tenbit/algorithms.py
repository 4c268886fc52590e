"""Every algorithm is a point in a small algebra:  objective x correction x reduction x advantage.

    PG(correction)            Equations 5, 6, 7:  rho A grad log pi(y | theta), no forward pass under theta'
    GRPO(clip, correction)    Equations 8, 9, 10: the clipped surrogate, its term weighted by rho under theta'
    GSPO(clip)                Zheng et al. 2025:  the clipped surrogate of the length-normalised sequence ratio
    CISPO(clip)               MiniMax-M1, 2025:   the clipped ratio as a constant weight on A grad log pi

    Correction(level, beyond, cap, floor)   rho = pi / mu per token or sequence; kept, truncated or masked beyond cap
    Reduction                               how per-token terms become one number (Dr.GRPO, DAPO, GRPO)

`ALGORITHMS` spells each published method in these words. Objectives are *maximised*; `loss` returns the negative,
already divided by the totals of the whole batch, so that losses add up over micro-batches and ranks.

Ratios live in log space. `saturating_exp` bounds e^x at e^20 and keeps its derivative, so a log-ratio of +-200
gives a finite value and a finite gradient; masks select, they are never multiplied into something infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from tenbit.advantages import ADVANTAGES
from tenbit.types import Batch, Stat, Stats, Totals

MAX_LOG_RATIO = 20.0  # e^20 = 4.9e8: far beyond any useful weight, far below what FP32 can square
Reduction = Literal["dr-grpo", "token-mean", "sequence-mean"]


def saturating_exp(x: Tensor) -> Tensor:
    """min(e^x, e^20) with derivative equal to its value everywhere: beyond the bound it does not go flat."""
    value = x.detach().clamp(max=MAX_LOG_RATIO).exp()
    return value * (1 + (x - x.detach()))


def over_sequence(x: Tensor, mask: Tensor) -> Tensor:
    """[B, T] -> [B, 1]: the sum over response tokens."""
    return x.masked_fill(~mask, 0.0).sum(-1, keepdim=True)


@dataclass(frozen=True)
class Correction:
    """An importance weight rho = pi / mu, and what becomes of it beyond `cap` (C in Equations 6, 7, 9, 10).

    `keep`: rho as it is. `truncate`: min(rho, C). `mask`: rho where floor <= rho <= C, else nothing.
    """

    level: Literal["token", "sequence"]
    beyond: Literal["keep", "truncate", "mask"]
    cap: float = 3.0
    floor: float = 0.0

    def weight(self, log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """log pi - log mu, [B, T] -> (weight, outside), each [B, T], constants. `outside`: beyond cap or floor."""
        x = log_ratio.detach()
        if self.level == "sequence":
            x = over_sequence(x, mask).expand_as(mask)
        low = math.log(self.floor) if self.floor > 0 else -math.inf
        outside = (x > math.log(self.cap)) | (x < low)
        rho = saturating_exp(x)
        if self.beyond == "truncate":
            rho = rho.clamp(max=self.cap)
        elif self.beyond == "mask":
            rho = rho.masked_fill(outside, 0.0)
        return rho, outside


@dataclass(frozen=True)
class Clip:
    """PPO's clip with separate bounds (DAPO's clip-higher), and DAPO's dual clip for negative advantages."""

    low: float = 0.2
    high: float = 0.28
    dual: float | None = None

    def __call__(self, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """(min(r A, clip(r) A), where that is flat). With `dual` = c: at least c A where A < 0."""
        value = torch.minimum(ratio * advantage, self.bound(ratio) * advantage)
        flat = torch.where(advantage > 0, ratio > 1 + self.high, (ratio < 1 - self.low) & (advantage < 0))
        if self.dual is not None:
            too_bad = (advantage < 0) & (ratio > self.dual)
            value = torch.where(too_bad, self.dual * advantage, value)
            flat = flat | too_bad
        return value, flat

    def bound(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(1 - self.low, 1 + self.high)


@dataclass(frozen=True)
class Terms:
    """What an objective says of each token, all [B, T]: its term, the correction's weight, what was cut off."""

    value: Tensor
    weight: Tensor
    outside: Tensor
    clipped: Tensor


class Objective(Protocol):
    """`logp` is log pi(y_t | theta), [B, T] float32, the only tensor that carries a gradient."""

    @property
    def needs_old(self) -> bool:
        """Whether the batch must hold log pi(y_t | theta'): one more forward pass per batch."""
        ...

    def terms(self, logp: Tensor, batch: Batch) -> Terms: ...


def _corrected(correction: Correction | None, log_ratio: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    if correction is None:
        return torch.ones_like(batch.logp_rollout), torch.zeros_like(batch.mask)
    return correction.weight(log_ratio, batch.mask)


@dataclass(frozen=True)
class PG:
    """rho A log pi, rho = pi(theta) / mu(theta') held constant (Equations 5 to 7; without correction Equation 3)."""

    correction: Correction | None = None
    needs_old: bool = field(default=False, init=False)

    def terms(self, logp: Tensor, batch: Batch) -> Terms:
        rho, outside = _corrected(self.correction, logp - batch.logp_rollout, batch)
        value = rho * batch.advantage[:, None] * logp
        return Terms(value, rho, outside, torch.zeros_like(batch.mask))


@dataclass(frozen=True)
class GRPO:
    """rho x min(r A, clip(r) A), r = pi(theta) / pi(theta'), rho = pi(theta') / mu(theta') (Equations 8 to 10)."""

    clip: Clip = Clip()
    correction: Correction | None = None
    needs_old: bool = field(default=True, init=False)

    def terms(self, logp: Tensor, batch: Batch) -> Terms:
        old = _old(batch)
        rho, outside = _corrected(self.correction, old - batch.logp_rollout, batch)
        surrogate, clipped = self.clip(saturating_exp(logp - old), batch.advantage[:, None])
        return Terms(rho * surrogate, rho, outside, clipped)


@dataclass(frozen=True)
class GSPO:
    """min(s A, clip(s) A), s = (pi(y | theta) / pi(y | theta'))^(1/T), one ratio for all tokens of a sequence."""

    clip: Clip = Clip(low=3e-4, high=4e-4)
    correction: Correction | None = None
    needs_old: bool = field(default=True, init=False)

    def terms(self, logp: Tensor, batch: Batch) -> Terms:
        old = _old(batch)
        rho, outside = _corrected(self.correction, old - batch.logp_rollout, batch)
        lengths = batch.mask.sum(-1, keepdim=True).clamp(min=1)
        ratio = saturating_exp(over_sequence(logp - old, batch.mask) / lengths).expand_as(batch.mask)
        surrogate, clipped = self.clip(ratio, batch.advantage[:, None])
        return Terms(rho * surrogate, rho, outside, clipped)


@dataclass(frozen=True)
class CISPO:
    """clip(r) A log pi with clip(r) held constant: no token's gradient is ever dropped."""

    clip: Clip = Clip()
    needs_old: bool = field(default=True, init=False)

    def terms(self, logp: Tensor, batch: Batch) -> Terms:
        ratio = saturating_exp((logp - _old(batch)).detach())
        weight = self.clip.bound(ratio)
        value = weight * batch.advantage[:, None] * logp
        return Terms(value, weight, torch.zeros_like(batch.mask), weight != ratio)


def _old(batch: Batch) -> Tensor:
    assert batch.logp_old is not None, "this objective needs log pi(theta'); score the batch first"
    return batch.logp_old


@dataclass(frozen=True)
class Algorithm:
    """An objective with the advantage, the reduction and the rollout shaping that its paper goes with.

    `dynamic_sampling`: drop groups of equal rewards and sample more. `overlong_share`: the last part of the maximum
    response length in which a response is penalised in proportion (DAPO: 4096 of 20480 tokens), 0 for none.
    """

    equation: str
    objective: PG | GRPO | GSPO | CISPO
    advantage: str = "leave-one-out"
    reduction: Reduction = "dr-grpo"
    dynamic_sampling: bool = False
    overlong_share: float = 0.0

    @property
    def needs_old(self) -> bool:
        return self.objective.needs_old

    @property
    def cap(self) -> float:
        """C of its correction; 3, as in section 4.1, where it has none: for what is measured, not what is done."""
        correction = getattr(self.objective, "correction", None)
        return Correction.cap if correction is None else correction.cap

    def __post_init__(self) -> None:
        assert self.advantage in ADVANTAGES, self.advantage


_token = Correction("token", "truncate")
_sequence = Correction("sequence", "mask")

ALGORITHMS: dict[str, Algorithm] = {
    "pg-is": Algorithm("Eq 5", PG(Correction("sequence", "keep"))),
    "pg-tis": Algorithm("Eq 6", PG(Correction("sequence", "truncate"))),
    "pg-mis": Algorithm("Eq 7", PG(_sequence)),
    "grpo": Algorithm("Eq 8", GRPO()),
    "grpo-token-tis": Algorithm("Eq 9", GRPO(correction=_token)),
    "grpo-seq-mis": Algorithm("Eq 10", GRPO(correction=_sequence)),
    "grpo-seq-tis": Algorithm("Eq 10, truncated", GRPO(correction=Correction("sequence", "truncate"))),
    "icepop": Algorithm("Eq 9, masked", GRPO(correction=Correction("token", "mask", cap=5.0, floor=0.5))),
    "gspo": Algorithm("Zheng 2025", GSPO(), "group-mean-std", "sequence-mean"),
    "dapo": Algorithm(
        "Yu 2025",
        GRPO(Clip(dual=10.0)),
        "group-mean-std",
        "token-mean",
        dynamic_sampling=True,
        overlong_share=0.2,
    ),
    "cispo": Algorithm("MiniMax 2025", CISPO(), "group-mean-std", "token-mean"),
    "rloo": Algorithm("Ahmadian 2024", PG()),
    "reinforce": Algorithm("Eq 3", PG(), advantage="reward"),
}


def reduce(per_token: Tensor, mask: Tensor, reduction: Reduction, totals: Totals) -> Tensor:
    """[B, T] terms -> a scalar, divided by the totals of the whole gradient step's batch, not of these rows.

    dr-grpo         sum / (sequences x the constant maximum response length)   (Dr.GRPO, the paper's)
    token-mean      sum / response tokens                                      (DAPO)
    sequence-mean   mean over tokens in each row, then sum / sequences         (GRPO, GSPO)
    """
    chosen = per_token.masked_fill(~mask, 0.0)
    if reduction == "dr-grpo":
        return chosen.sum() / (totals.sequences * totals.max_response_length)
    if reduction == "token-mean":
        return chosen.sum() / totals.tokens
    return (chosen.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / totals.sequences


def _without_padding(logp: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
    """Zeros outside the mask, selected *before* any arithmetic: 0 x NaN in a backward pass would be NaN again."""
    zeros = {"logp_rollout": batch.logp_rollout.masked_fill(~batch.mask, 0.0)}
    if batch.logp_old is not None:
        zeros["logp_old"] = batch.logp_old.masked_fill(~batch.mask, 0.0)
    return logp.masked_fill(~batch.mask, 0.0), replace(batch, **zeros)


def loss(algorithm: Algorithm, logp: Tensor, batch: Batch, totals: Totals) -> tuple[Tensor, Stats]:
    """The scalar to minimise for these rows, and what was seen: weights, share outside the cap, clip fraction."""
    terms = algorithm.objective.terms(*_without_padding(logp, batch))
    value = -reduce(terms.value, batch.mask, algorithm.reduction, totals)
    seen = {
        "correction/weight_mean": Stat.of(terms.weight[batch.mask]),
        "correction/outside": Stat.of(terms.outside[batch.mask]),
        "policy/clip_fraction": Stat.of(terms.clipped[batch.mask]),
    }
    return value, seen
