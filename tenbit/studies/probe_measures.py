"""The measures of `mismatch.py` with bootstrap confidence intervals, and the tokens that lie furthest apart.

    table = Table.of(scored)                       one row of sums a sequence; tokens are not needed again
    chosen = resamples(len(table), seed)           [R, n] which sequences each replicate is made of
    table.measures(cap=3.0, chosen=chosen)         {"kl_k3": Measure(value, low, high), ...}

The tokens of one response depend on each other, so whole sequences are drawn, with replacement. Every measure is a
function of sums over sequences or of the sequences' log-ratios; a replicate is therefore a row of a matrix product,
and 2000 of them take a fraction of a second. Intervals are the middle 95% of the replicates. Largest and smallest
values have none: no resample can exceed what was seen, so the bootstrap says nothing about them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenbit.mismatch import LARGEST_EXPONENT, VARIES
from tenbit.scoring import Scored, measured

LEVEL = 0.95
REPLICATES, FEWEST_REPLICATES, MOST_DRAWS = 2000, 200, 20_000_000
SUMS = ("k1", "k3", "abs", "diff_abs", "outside_half", "outside_tenth", "u", "v", "uu", "vv", "uv")
MEANS = {
    "kl_k1": "k1",
    "kl_k3": "k3",
    "logp_abs_mean": "abs",
    "prob_diff_abs_mean": "diff_abs",
    "outside_half": "outside_half",
    "outside_tenth": "outside_tenth",
}
EXTREMES = ("logp_abs_max", "prob_diff_min", "prob_diff_max", "seq_logratio_min", "seq_logratio_max")
SIZES = ("kl_k3", "logp_abs_mean", "prob_diff_abs_mean", "seq_logratio_std")  # of which ratios make sense
FEWEST = 20  # responses below which a spread has no interval: the bootstrap's is far too narrow
Array = np.ndarray


@dataclass(frozen=True)
class Measure:
    """A number and its interval, or None for both ends where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return {"value": finite(self.value), "low": finite(self.low), "high": finite(self.high)}


@dataclass(frozen=True)
class Table:
    """Per sequence: token sums ``[n, len(SUMS)]``, tokens ``[n]``, the log-ratio S ``[n]``; float64."""

    sums: Array
    tokens: Array
    logratio: Array
    scored: tuple[Scored, ...]

    @classmethod
    def of(cls, scored: Sequence[Scored]) -> Table:
        """Sequences without a token to measure are left out, and so are log-probabilities that are not finite."""
        found = [(s, measured([s])) for s in scored]
        found = [(s, m) for s, m in found if m.seq_logratio.numel()]
        return cls(
            np.array([[m.tokens[k].total for k in SUMS] for _, m in found]).reshape(len(found), len(SUMS)),
            np.array([float(m.seq_length[0]) for _, m in found]),
            np.array([float(m.seq_logratio[0]) for _, m in found]),
            tuple(s for s, _ in found),
        )

    def __len__(self) -> int:
        return len(self.scored)

    def measures(self, cap: float, chosen: Array) -> dict[str, Measure]:
        """Every measure of the specification, with intervals where the bootstrap gives any."""
        values = measured(self.scored).metrics(cap)
        drawn = self.replicates(cap, chosen) if len(self) > 1 else {}
        if len(self) < FEWEST:
            drawn.pop("seq_logratio_std", None)
        found = {key: Measure(value, *_not_empty(*interval(drawn.get(key)))) for key, value in values.items()}
        share = found["seq_above_cap"]
        if share.low is None and len(self) > 1:  # none is, or all are: the exact interval of a share, Clopper-Pearson's
            room = 1 - ((1 - LEVEL) / 2) ** (1 / len(self))
            ends = (0.0, room) if share.value == 0 else (1 - room, 1.0)
            found["seq_above_cap"] = Measure(share.value, *ends)
        return found

    @property
    def lengths(self) -> Array:
        """Tokens of each response, measurable or not, ``[n]``."""
        return np.array([s.length for s in self.scored], dtype=np.float64)

    def replicates(self, cap: float, chosen: Array) -> dict[str, Array]:
        """Every measure but the extremes for each row of `chosen` [R, n] sequence numbers: name -> ``[R]``."""
        weight = _counts(chosen, len(self))
        tokens = weight @ self.tokens
        mean: dict[str, Array] = dict(zip(SUMS, (weight @ self.sums / tokens[:, None]).T, strict=True))
        s = self.logratio[chosen]  # [R, n]
        n = s.shape[1]
        log_sum, log_sum_sq = _logsumexp(s), _logsumexp(2 * s)
        return {
            **{name: mean[key] for name, key in MEANS.items()},
            "pearson": _pearson(mean),
            "seq_logratio_mean": s.mean(1),
            "seq_logratio_std": s.std(1, ddof=1),
            "seq_ess": np.exp(2 * log_sum - log_sum_sq - math.log(n)),
            "seq_above_cap": (s > math.log(cap)).mean(1),
            "seq_chi2": np.expm1(np.minimum(log_sum_sq - math.log(n), LARGEST_EXPONENT)),
        }

    def by_length(self, edges: Sequence[int], seed: int) -> dict[str, dict[str, Any]]:
        """S by response length: bucket -> n, mean, std with an interval (from `FEWEST` responses up), min, max."""
        out: dict[str, dict[str, Any]] = {}
        for low, high in itertools.pairwise(edges):
            s = self.logratio[(self.lengths >= low) & (self.lengths < high)]
            if s.size:
                stds = s[resamples(s.size, seed)].std(1, ddof=1) if s.size >= FEWEST else None
                std = Measure(float(s.std(ddof=1)) if s.size > 1 else 0.0, *interval(stds))
                ends = {"min": float(s.min()), "max": float(s.max())}
                out[f"{low}-{high - 1}"] = {"n": s.size, "mean": float(s.mean()), "std": std.as_dict(), **ends}
        return out

    def half_ess_tokens(self) -> float | None:
        """At how many tokens the effective sample size would fall to a half, if S spread like a random walk.

        A normal S with variance v has an effective sample size of e^-v; v grows with the length by E[S^2] / E[T].
        """
        spread = float((self.logratio**2).sum() / self.tokens.sum())
        return finite(math.log(2) / spread) if spread > 0 else None


def resamples(n: int, seed: int) -> Array:
    """[R, n] numbers below n. The same for the same n and seed: precisions with the same prompts are paired by it.

    R is `REPLICATES`, and fewer for more than 10,000 sequences, so that it fits into memory.
    """
    replicates = max(FEWEST_REPLICATES, min(REPLICATES, MOST_DRAWS // max(1, n)))
    return np.random.default_rng([seed, n]).integers(0, max(1, n), (replicates, n))


def interval(drawn: Array | None) -> tuple[float | None, float | None]:
    """The middle `LEVEL` of the replicates."""
    if drawn is None or not drawn.size or not np.isfinite(drawn).all():
        return None, None
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _not_empty(low: float | None, high: float | None) -> tuple[float | None, float | None]:
    """No interval where all replicates are equal: what was not seen once, no resample can show, but it may exist."""
    return (None, None) if low == high else (low, high)


def ratios(
    above: Table, below: Table, chosen: tuple[Array, Array], cap: float, values: Sequence[Mapping[str, Measure]]
) -> dict[str, Measure]:
    """How many times as large a mismatch is as another one, with intervals; measures that are 0 are left out.

    With as many sequences on both sides, sequence i of one is drawn together with sequence i of the other: they
    answer the same prompt.
    """
    drawn = [t.replicates(cap, c) if len(t) > 1 else {} for t, c in zip((above, below), chosen, strict=True)]
    out = {}
    for key in SIZES:
        high, low = (v[key].value for v in values)
        if low > 0 and math.isfinite(high / low):
            bounds: tuple[float | None, float | None] = (None, None)
            if key in drawn[0] and key in drawn[1] and (drawn[1][key] > 0).all():
                bounds = interval(drawn[0][key] / drawn[1][key])
            out[key] = Measure(high / low, *bounds)
    return out


def worst(scored: Sequence[Scored], most: int) -> list[tuple[int, int]]:
    """(sequence, position) of the tokens with the largest |log pi - log mu|, largest first."""
    sizes = np.concatenate([np.nan_to_num(s.logratio.abs().numpy(), nan=-1.0, posinf=-1.0) for s in scored])
    starts = np.cumsum([0, *(s.length for s in scored)])
    order = np.argsort(-sizes, kind="stable")[:most]
    order = order[sizes[order] > 0]
    sequence = np.searchsorted(starts, order, side="right") - 1
    return [(int(i), int(at - starts[i])) for i, at in zip(sequence, order, strict=True)]


def finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _counts(chosen: Array, n: int) -> Array:
    """How often each replicate holds each sequence, ``[R, n]``."""
    rows = len(chosen)
    flat = (chosen + n * np.arange(rows)[:, None]).ravel()
    return np.bincount(flat, minlength=rows * n).reshape(rows, n).astype(np.float64)


def _logsumexp(x: Array) -> Array:
    top = x.max(1)
    return top + np.log(np.exp(x - top[:, None]).sum(1))


def _pearson(mean: Mapping[str, Array]) -> Array:
    """As `mismatch.metrics` does it: from 1 - pi and 1 - mu; 1 where neither varies, 0 where one alone does."""
    u, v = mean["u"], mean["v"]
    var_u, var_v = mean["uu"] - u * u, mean["vv"] - v * v
    varies_u, varies_v = var_u > VARIES * mean["uu"], var_v > VARIES * mean["vv"]
    both = varies_u & varies_v
    r = (mean["uv"] - u * v) / np.sqrt(np.where(both, var_u * var_v, 1.0))
    return np.where(both, r.clip(-1, 1), np.where(varies_u | varies_v, 0.0, 1.0))
