"""How far the rollout policy mu and the training policy pi are apart on the tokens that mu sampled.

With l_t = log pi(y_t) - log mu(y_t), at the *same* weights, so that what differs is numerics alone:

    token level       |l|, pi - mu, the KL(mu || pi) estimators k1 = -l and k3 = e^l - 1 - l, shares of e^l outside
                      [0.5, 2] and [0.9, 1.1], the Pearson correlation of pi and mu
    sequence level    S = sum_t l_t with its mean, spread and extremes, also by length; rho = e^S with its effective
                      sample size (sum rho)^2 / (n sum rho^2), the share above the cap C, chi^2 = E[rho^2] - 1

All of it is raw: nothing is clipped or corrected before it is measured, and sequence ratios stay in log space.
A `Mismatch` is a value that can be added to another one (micro-batches, ranks) before it is turned into numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tenbit.types import Stat, Stats, merge

LARGEST_EXPONENT = 700.0  # e^700 = 1e304: chi^2 stays finite, so that metrics.jsonl stays JSON
VARIES = 1e-12  # a variance below this share of the mean square is rounding


@dataclass(frozen=True)
class Mismatch:
    """Token-level sums, and per sequence: the log-ratio S ``[n]`` and the length ``[n]``, float64."""

    tokens: Stats = field(default_factory=dict)
    seq_logratio: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    seq_length: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def __add__(self, other: Mismatch) -> Mismatch:
        return Mismatch(
            merge([self.tokens, other.tokens]),
            torch.cat([self.seq_logratio, other.seq_logratio]),
            torch.cat([self.seq_length, other.seq_length]),
        )

    def metrics(self, cap: float = 3.0) -> dict[str, float]:
        """The numbers, named as in metrics.jsonl without the prefix ``mismatch/``. Empty if nothing was measured."""
        if not self.seq_logratio.numel():
            return {}
        t = self.tokens
        return {
            "kl_k1": t["k1"].mean,
            "kl_k3": t["k3"].mean,
            "logp_abs_mean": t["abs"].mean,
            "logp_abs_max": t["abs"].high,
            "prob_diff_min": t["diff"].low,
            "prob_diff_max": t["diff"].high,
            "prob_diff_abs_mean": t["diff_abs"].mean,
            "outside_half": t["outside_half"].mean,
            "outside_tenth": t["outside_tenth"].mean,
            "pearson": _pearson(t),
            **sequence_metrics(self.seq_logratio, cap),
        }

    def by_length(self, edges: Sequence[int]) -> dict[str, dict[str, float]]:
        """S by response length: ``"64-127"`` -> n, mean, std, min, max, for buckets edges[i] <= T < edges[i + 1]."""
        out = {}
        for low, high in itertools.pairwise(edges):
            s = self.seq_logratio[(self.seq_length >= low) & (self.seq_length < high)]
            if s.numel():
                out[f"{low}-{high - 1}"] = {"n": float(s.numel()), **_spread(s)}
        return out


def measure(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Mismatch:
    """log pi, log mu [B, T] and the response mask [B, T] -> what they differ by. Rows without tokens are left out."""
    pi, mu = logp.detach().double(), logp_rollout.double()
    l = (pi - mu)[mask]
    p, q = pi[mask].exp(), mu[mask].exp()
    u, v = -pi[mask].expm1(), -mu[mask].expm1()  # 1 - p, 1 - q, with all their digits where p and q are near 1
    low, high = math.log(0.9), math.log(1.1)
    tokens = {
        "k1": Stat.of(-l),
        "k3": Stat.of(l.expm1() - l),
        "abs": Stat.of(l.abs()),
        "diff": Stat.of(p - q),
        "diff_abs": Stat.of((p - q).abs()),
        "outside_half": Stat.of(l.abs() > math.log(2.0)),
        "outside_tenth": Stat.of((l < low) | (l > high)),
        "u": Stat.of(u),
        "v": Stat.of(v),
        "uu": Stat.of(u * u),
        "vv": Stat.of(v * v),
        "uv": Stat.of(u * v),
    }
    rows = mask.any(-1)
    s = (pi - mu).masked_fill(~mask, 0.0).sum(-1)
    return Mismatch(tokens, s[rows].cpu(), mask.sum(-1)[rows].double().cpu())


def sequence_metrics(s: Tensor, cap: float) -> dict[str, float]:
    """Sequence log-ratios [n] -> spread, effective sample size (as a share of n), share above the cap, chi^2."""
    n = s.numel()
    log_sum, log_sum_sq = s.logsumexp(0), (2 * s).logsumexp(0)
    spread = {f"seq_logratio_{k}": v for k, v in _spread(s).items()}
    return {
        **spread,
        "seq_ess": float((2 * log_sum - log_sum_sq - math.log(n)).exp()),
        "seq_above_cap": float((s > math.log(cap)).double().mean()),
        "seq_chi2": float((log_sum_sq - math.log(n)).clamp(max=LARGEST_EXPONENT).expm1()),
    }


def _spread(s: Tensor) -> dict[str, float]:
    std = float(s.std()) if s.numel() > 1 else 0.0
    return {"mean": float(s.mean()), "std": std, "min": float(s.min()), "max": float(s.max())}


def _pearson(t: Stats) -> float:
    """Correlation of pi and mu, from sums of 1 - pi and 1 - mu, which cancel less for policies that are nearly certain.

    1 if neither varies, as for a policy that is certain everywhere; 0 if only one does.
    """
    u, v = t["u"].mean, t["v"].mean
    var_u, var_v = t["uu"].mean - u * u, t["vv"].mean - v * v
    varies = (var_u > VARIES * t["uu"].mean, var_v > VARIES * t["vv"].mean)
    if all(varies):
        r = (t["uv"].mean - u * v) / math.sqrt(var_u * var_v)
        return max(-1.0, min(1.0, r))
    return 0.0 if any(varies) else 1.0
