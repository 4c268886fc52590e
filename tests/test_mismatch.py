"""The mismatch measurements against NumPy and exact arithmetic on the concatenated tokens."""

from __future__ import annotations

import itertools
import json
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from tenbit.mismatch import Mismatch, measure, sequence_metrics

LENGTHS = [5, 1, 9, 3, 7, 2, 9, 4]


def batch(seed: int = 0, scale: float = 0.3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """log pi, log mu, mask, with NaN and inf where there are no tokens."""
    rng = np.random.default_rng(seed)
    mask = np.arange(9) < np.array(LENGTHS)[:, None]
    mu = -rng.exponential(1.0, mask.shape)
    pi = np.minimum(mu + rng.normal(0, scale, mask.shape), -1e-9)
    pi[~mask], mu[~mask] = math.nan, math.inf
    return torch.tensor(pi, dtype=dtype), torch.tensor(mu, dtype=dtype), torch.tensor(mask)


def test_token_metrics_equal_numpy_on_the_concatenated_tokens():
    pi, mu, mask = batch()
    got = measure(pi, mu, mask).metrics()
    p, q = pi[mask].numpy(), mu[mask].numpy()
    l = p - q
    want = {
        "kl_k1": np.mean(-l),
        "kl_k3": np.mean(np.exp(l) - 1 - l),
        "logp_abs_mean": np.mean(np.abs(l)),
        "logp_abs_max": np.max(np.abs(l)),
        "prob_diff_min": np.min(np.exp(p) - np.exp(q)),
        "prob_diff_max": np.max(np.exp(p) - np.exp(q)),
        "prob_diff_abs_mean": np.mean(np.abs(np.exp(p) - np.exp(q))),
        "outside_half": np.mean((np.exp(l) < 0.5) | (np.exp(l) > 2)),
        "outside_tenth": np.mean((np.exp(l) < 0.9) | (np.exp(l) > 1.1)),
        "pearson": np.corrcoef(np.exp(p), np.exp(q))[0, 1],
    }
    assert {k: got[k] for k in want} == pytest.approx(want, rel=1e-12)
    assert 0 < want["outside_half"] < want["outside_tenth"] < 1


def test_sequence_metrics_equal_numpy():
    pi, mu, mask = batch(1)
    got = measure(pi, mu, mask).metrics(cap=1.5)
    s = np.array([np.sum((pi - mu)[b][mask[b]].numpy()) for b in range(len(LENGTHS))])
    rho = np.exp(s)
    want = {
        "seq_logratio_mean": s.mean(),
        "seq_logratio_std": s.std(ddof=1),
        "seq_logratio_min": s.min(),
        "seq_logratio_max": s.max(),
        "seq_ess": rho.sum() ** 2 / (len(rho) * (rho**2).sum()),
        "seq_above_cap": np.mean(rho > 1.5),
        "seq_chi2": np.mean(rho**2) - 1,
    }
    assert {k: got[k] for k in want} == pytest.approx(want, rel=1e-10)
    assert 0 < want["seq_above_cap"] < 1


def test_names_of_the_specification_are_there():
    names = [
        "kl_k1",
        "kl_k3",
        "logp_abs_mean",
        "logp_abs_max",
        "prob_diff_min",
        "prob_diff_max",
        "prob_diff_abs_mean",
        "seq_logratio_mean",
        "seq_logratio_std",
        "seq_ess",
        "seq_above_cap",
    ]
    assert set(names) <= set(measure(*batch()).metrics())


@pytest.mark.parametrize("cuts", [[0, 8], [0, 1, 8], [0, 3, 5, 8], list(range(9))])
def test_any_split_adds_up_to_the_whole(cuts: list[int]):
    """Over micro-batches and ranks: also Pearson and the effective sample size, which are not means of parts."""
    pi, mu, mask = batch(2)
    total = Mismatch()
    for a, b in itertools.pairwise(cuts):
        total = total + measure(pi[a:b], mu[a:b], mask[a:b])
    whole = measure(pi, mu, mask)
    assert total.metrics() == pytest.approx(whole.metrics(), rel=1e-12)
    edges = [1, 4, 8, 16]
    assert total.by_length(edges) == whole.by_length(edges)


def exact_ess(s: list[float]) -> float:
    """(sum rho)^2 / (n sum rho^2) in 60-digit decimals, which do not overflow."""
    with localcontext() as context:
        context.prec = 60
        rho = [Decimal(x).exp() for x in s]
        return float(sum(rho) ** 2 / (len(rho) * sum(r * r for r in rho)))


@pytest.mark.parametrize(
    "s",
    [
        [800.0, 799.5, 700.0, -900.0],
        [-700.0, -701.0, -699.0],
        [300.0, 300.0, 300.0],
        [0.0, 0.0, 0.0, 0.0],
        [5000.0, 0.0, -5000.0],
        [1e-9, -1e-9],
        [3.0],
    ],
)
def test_pitfall_14_effective_sample_size_is_of_unclamped_weights(s: list[float]):
    """Log-ratios of hundreds, exactly: a clamp anywhere would show as a larger sample."""
    got = sequence_metrics(torch.tensor(s, dtype=torch.float64), cap=3.0)
    assert got["seq_ess"] == pytest.approx(exact_ess(s), rel=1e-9)
    assert 1 / len(s) - 1e-9 <= got["seq_ess"] <= 1 + 1e-9
    assert all(math.isfinite(v) for v in got.values()), got
    json.loads(json.dumps(got), parse_constant=pytest.fail)


def test_pitfall_14_nothing_is_clipped_before_it_is_measured():
    """A sequence ratio of e^40, twice the correction's saturation, is reported as it is."""
    pi, mu = torch.full((2, 4), -1.0), torch.full((2, 4), -1.0)
    mu[0] = -11.0
    got = measure(pi, mu, torch.ones(2, 4, dtype=torch.bool)).metrics()
    assert got["seq_logratio_max"] == pytest.approx(40.0)
    assert got["logp_abs_max"] == pytest.approx(10.0)
    assert got["seq_above_cap"] == 0.5
    assert got["seq_ess"] == pytest.approx(0.5)
    assert got["seq_chi2"] == pytest.approx((math.exp(80) + 1) / 2 - 1)


def test_k3_is_never_negative_and_exact_for_tiny_differences():
    """e^l - 1 - l cancels completely at l = 1e-9 unless expm1 is used; the truth is l^2 / 2."""
    for l in (1e-3, 1e-5, 1e-7, -1e-7, 1e-9):
        mu = torch.tensor([[-1.0]], dtype=torch.float64)
        got = measure(mu + l, mu, torch.ones(1, 1, dtype=torch.bool)).metrics()["kl_k3"]
        assert got >= 0
        exact = float((mu + l - mu)[0, 0])
        assert got == pytest.approx(exact**2 / 2, rel=2e-3, abs=2e-17)
    for seed in range(5):
        assert measure(*batch(seed, scale=1e-6)).tokens["k3"].low >= 0


def test_k1_and_k3_estimate_the_kl_of_mu_to_pi():
    """The expectation over mu, listed token by token, is KL(mu || pi) for both: direction and sign."""
    mu, pi = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    kl = float(np.sum(mu * np.log(mu / pi)))
    drawn = np.repeat([0, 1, 2], [5, 3, 2])  # each token as often as mu has it
    logp, logp_rollout = (torch.tensor(np.log(x[drawn]))[None] for x in (pi, mu))
    got = measure(logp, logp_rollout, torch.ones(1, 10, dtype=torch.bool)).metrics()
    assert got["kl_k1"] == pytest.approx(kl, rel=1e-12)
    assert got["kl_k3"] == pytest.approx(kl, rel=1e-12)


def test_direction_is_pi_minus_mu():
    pi, mu = torch.tensor([[math.log(0.9)]]), torch.tensor([[math.log(0.1)]])
    got = measure(pi, mu, torch.ones(1, 1, dtype=torch.bool)).metrics()
    assert got["prob_diff_max"] == pytest.approx(0.8)
    assert got["seq_logratio_mean"] == pytest.approx(math.log(9.0), rel=1e-6)
    assert got["seq_above_cap"] == 1.0


def test_identical_policies_have_no_mismatch():
    pi, _, mask = batch(3)
    got = measure(pi, pi, mask).metrics()
    assert got["pearson"] == pytest.approx(1.0)
    assert got["seq_ess"] == pytest.approx(1.0)
    zero = set(got) - {"pearson", "seq_ess"}
    assert {k: got[k] for k in zero} == pytest.approx(dict.fromkeys(zero, 0.0), abs=1e-15)


@pytest.mark.parametrize("certainty", [1e-1, 1e-4, 1e-7, 1e-10, 1e-14])
def test_pearson_of_nearly_certain_policies(certainty: float):
    """Probabilities 1 - 1e-10: sums of p and p^2 cancel to noise, sums of 1 - p do not."""
    rng = np.random.default_rng(4)
    miss = certainty * rng.uniform(0, 1, (2, 500))
    miss[1] = 0.6 * miss[0] + 0.4 * miss[1]
    logs = torch.tensor(np.log1p(-miss))
    got = measure(logs[:1], logs[1:], torch.ones(1, 500, dtype=torch.bool)).metrics()
    want = float(np.corrcoef(miss[0], miss[1])[0, 1])
    assert 0.7 < want < 0.95
    assert got["pearson"] == pytest.approx(want, rel=1e-4)


def test_pearson_where_it_is_undefined():
    """1 where neither varies, 0 where one does: a constant tells nothing about the other."""
    ones = torch.ones(1, 3, dtype=torch.bool)
    certain, half = torch.zeros(1, 3), torch.full((1, 3), math.log(0.5))
    varied = torch.tensor([[-0.1, -1.0, -2.0]])
    assert measure(certain, certain, ones).metrics()["pearson"] == 1.0
    assert measure(certain, half, ones).metrics()["pearson"] == 1.0
    assert measure(varied, half, ones).metrics()["pearson"] == 0.0
    assert measure(half, varied, ones).metrics()["pearson"] == 0.0
    assert measure(varied, varied, ones).metrics()["pearson"] == pytest.approx(1.0)


def test_nothing_measured_gives_no_metrics():
    assert Mismatch().metrics() == {}
    assert Mismatch().by_length([0, 10]) == {}
    pi, mu, mask = batch()
    nothing = measure(pi, mu, torch.zeros_like(mask))
    assert nothing.metrics() == {}
    assert (nothing + measure(pi, mu, mask)).metrics() == measure(pi, mu, mask).metrics()


def test_rows_without_tokens_are_no_sequences():
    pi, mu, mask = batch()
    mask = mask.clone()
    mask[[0, 3]] = False
    keep = [1, 2, 4, 5, 6, 7]
    assert measure(pi, mu, mask).metrics() == measure(pi[keep], mu[keep], mask[keep]).metrics()


def test_by_length_buckets():
    pi, mu, mask = batch(5)
    s = np.array([np.sum((pi - mu)[b][mask[b]].numpy()) for b in range(len(LENGTHS))])
    lengths = np.array(LENGTHS)
    got = measure(pi, mu, mask).by_length([1, 4, 9, 10, 50])
    assert set(got) == {"1-3", "4-8", "9-9"}  # the empty bucket is left out
    for name, inside in (("1-3", lengths < 4), ("4-8", (lengths >= 4) & (lengths < 9)), ("9-9", lengths == 9)):
        x = s[inside]
        want = {"n": len(x), "mean": x.mean(), "std": x.std(ddof=1), "min": x.min(), "max": x.max()}
        assert got[name] == pytest.approx(want, rel=1e-12)


def test_float32_log_probabilities_are_measured_in_float64():
    """Sums over many tokens keep the digits that the inputs have."""
    rng = np.random.default_rng(6)
    pi = torch.tensor(-rng.exponential(1.0, (2, 4000)), dtype=torch.float32)
    mu = pi + torch.tensor(rng.normal(0, 1e-3, (2, 4000)), dtype=torch.float32)
    got = measure(pi, mu, torch.ones(2, 4000, dtype=torch.bool)).metrics()
    s = (pi.double() - mu.double()).sum(-1).numpy()
    assert got["seq_logratio_mean"] == pytest.approx(s.mean(), rel=1e-12)


def test_no_gradient_is_kept():
    pi, mu, mask = batch()
    measured = measure(pi.requires_grad_(), mu, mask)
    assert not measured.seq_logratio.requires_grad
