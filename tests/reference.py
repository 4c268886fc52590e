"""Independent float64 references, written from the equations as plain loops over sequences and tokens.

Nothing here imports tenbit or torch or uses automatic differentiation: gradients are the analytic ones of a tabular
softmax policy, so that an error in the code cannot cancel against the same error in its test. All thresholds are
written out as the paper has them; if a default changes in the code, the tests notice.

The policy is a bigram table theta [V, V]: pi(y | previous) = softmax(theta[previous])[y]. Every gradient estimator in
the paper has the form  sum_b sum_t c_bt grad log pi(y_bt);  `coefficients` gives the c_bt of each method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

C = 3.0  # section 4.1
EPS_LOW, EPS_HIGH = 0.2, 0.28  # Table 3
GSPO_LOW, GSPO_HIGH = 3e-4, 4e-4  # Zheng et al. 2025, section 5.1
DUAL = 10.0  # Table 3, actor.clip_ratio_c
BOUND = math.exp(20.0)  # the documented saturation of every ratio


@dataclass
class Row:
    """One response: its tokens with the token before each of them, log-probabilities as given, and its advantage."""

    previous: list[int]
    tokens: list[int]
    old: list[float]
    rollout: list[float]
    advantage: float


def exp(x: float) -> float:
    return BOUND if x > 20.0 else math.exp(x)


def log_softmax(z: Sequence[float]) -> list[float]:
    top = max(z)
    total = math.log(sum(math.exp(v - top) for v in z))
    return [v - top - total for v in z]


def logp(theta: np.ndarray, row: Row) -> list[float]:
    return [log_softmax(theta[p].tolist())[y] for p, y in zip(row.previous, row.tokens, strict=True)]


def flat(ratio: float, advantage: float, low: float, high: float) -> bool:
    """Where min(r A, clip(r) A) does not depend on r. On the border itself it still does (one-sided)."""
    return (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)


def surrogate(ratio: float, advantage: float, low: float, high: float) -> float:
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def sequence_ratio(top: Sequence[float], bottom: Sequence[float]) -> float:
    return exp(sum(a - b for a, b in zip(top, bottom, strict=True)))


def coefficients(name: str, pi: list[float], row: Row) -> list[float]:
    """c_t of one response. `pi` holds log pi(y_t | theta)."""
    a, n = row.advantage, len(pi)
    if name in ("reinforce", "rloo"):  # Eq 3
        return [a] * n
    if name in ("pg-is", "pg-tis", "pg-mis"):  # Eqs 5, 6, 7: pi(theta) over mu(theta'), whole sequence
        rho = sequence_ratio(pi, row.rollout)
        if name == "pg-tis":
            rho = min(rho, C)
        if name == "pg-mis" and rho > C:
            return [0.0] * n
        return [rho * a] * n
    if name == "gspo":
        s = exp(sum(p - o for p, o in zip(pi, row.old, strict=True)) / n)
        # the sequence's term is min(s A, clip(s) A); grad s = s / T sum_t grad log pi. It stands once for each of
        # the T tokens, and a sum over them gives back the factor T
        return [0.0 if flat(s, a, GSPO_LOW, GSPO_HIGH) else s * a] * n
    ratios = [exp(p - o) for p, o in zip(pi, row.old, strict=True)]
    if name == "cispo":
        return [min(max(r, 1 - EPS_LOW), 1 + EPS_HIGH) * a for r in ratios]
    term = [0.0 if flat(r, a, EPS_LOW, EPS_HIGH) else r * a for r in ratios]  # Eq 8
    if name == "dapo":
        return [0.0 if a < 0 and r > DUAL else c for r, c in zip(ratios, term, strict=True)]
    return [w * c for w, c in zip(grpo_weights(name, row), term, strict=True)]


def grpo_weights(name: str, row: Row) -> list[float]:
    """What stands before the gradient in Equations 8 to 10 and their relatives: of pi(theta') over mu(theta')."""
    n = len(row.old)
    if name == "grpo":
        return [1.0] * n
    tokens = [exp(o - m) for o, m in zip(row.old, row.rollout, strict=True)]
    rho = sequence_ratio(row.old, row.rollout)
    if name == "grpo-token-tis":  # Eq 9
        return [min(w, C) for w in tokens]
    if name == "icepop":
        return [w if 0.5 <= w <= 5.0 else 0.0 for w in tokens]
    if name == "grpo-seq-mis":  # Eq 10
        return [rho if rho <= C else 0.0] * n
    if name == "grpo-seq-tis":
        return [min(rho, C)] * n
    raise KeyError(name)


def objective(name: str, pi: list[float], row: Row) -> list[float]:
    """The maximised per-token terms, for the methods that have an objective and not only a gradient."""
    a, n = row.advantage, len(pi)
    if name == "gspo":
        s = exp(sum(p - o for p, o in zip(pi, row.old, strict=True)) / n)
        return [surrogate(s, a, GSPO_LOW, GSPO_HIGH)] * n
    ratios = [exp(p - o) for p, o in zip(pi, row.old, strict=True)]
    terms = [surrogate(r, a, EPS_LOW, EPS_HIGH) for r in ratios]
    if name == "dapo":
        return [max(t, DUAL * a) if a < 0 else t for t in terms]
    return [w * t for w, t in zip(grpo_weights(name, row), terms, strict=True)]


def row_weight(reduction: str, row: Row, rows: Sequence[Row], longest: int) -> float:
    """What a token of this row is multiplied by."""
    if reduction == "dr-grpo":
        return 1.0 / (len(rows) * longest)
    if reduction == "token-mean":
        return 1.0 / sum(len(r.tokens) for r in rows)
    return 1.0 / (len(rows) * len(row.tokens))


def value(name: str, reduction: str, theta: np.ndarray, rows: Sequence[Row], longest: int) -> float:
    """J, for the methods of `objective`."""
    return sum(row_weight(reduction, r, rows, longest) * sum(objective(name, logp(theta, r), r)) for r in rows)


def gradient(name: str, reduction: str, theta: np.ndarray, rows: Sequence[Row], longest: int) -> np.ndarray:
    """grad J with respect to theta [V, V], to be *ascended*."""
    out = np.zeros_like(theta)
    for row in rows:
        w = row_weight(reduction, row, rows, longest)
        for t, c in enumerate(coefficients(name, logp(theta, row), row)):
            out[row.previous[t]] += w * c * grad_logp(theta[row.previous[t]], row.tokens[t])
    return out


def grad_logp(z: np.ndarray, token: int) -> np.ndarray:
    """d log softmax(z)[token] / dz = 1{v = token} - softmax(z)_v"""
    p = [math.exp(v) for v in log_softmax(z.tolist())]
    return np.array([float(v == token) - p[v] for v in range(len(p))])


def advantages(kind: str, rewards: Sequence[float]) -> list[float]:
    """Equation 8's leave-one-out; the authors' code's group mean; either over the group's standard deviation."""
    n = len(rewards)
    if kind == "reward":
        return list(rewards)
    out = []
    mean = math.fsum(rewards) / n
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (n - 1))
    for i, r in enumerate(rewards):
        others = [x for j, x in enumerate(rewards) if j != i]
        a = r - (math.fsum(others) / (n - 1) if kind.startswith("leave-one-out") else mean)
        out.append(a / (std + 1e-6) if kind.endswith("std") else a)
    return out
