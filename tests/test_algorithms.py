"""Every algorithm's gradient against an independent reference (tests/reference.py), and the mistakes of PITFALLS."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import get_args

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from tenbit.advantages import ADVANTAGES
from tenbit.algorithms import (
    ALGORITHMS,
    CISPO,
    GRPO,
    GSPO,
    MAX_LOG_RATIO,
    PG,
    Algorithm,
    Clip,
    Correction,
    Reduction,
    loss,
    saturating_exp,
)
from tenbit.types import Batch, Totals

V = 5
LONGEST = 9  # the constant maximum response length, longer than any response here
REDUCTIONS = get_args(Reduction)
ON_POLICY = [name for name, a in ALGORITHMS.items() if not a.needs_old]
GARBAGE = (math.nan, math.inf, -math.inf, 1e30)


@dataclasses.dataclass
class Case:
    theta: Tensor  # [V, V], the policy's table
    previous: Tensor  # [B, T]
    tokens: Tensor  # [B, T]
    batch: Batch

    @property
    def totals(self) -> Totals:
        return Totals(len(self.batch), int(self.batch.mask.sum()), LONGEST)

    def logp(self, theta: Tensor, garbage: bool = True) -> Tensor:
        """log pi under the table, garbage outside the mask."""
        lp = torch.log_softmax(theta, -1)[self.previous, self.tokens]
        return torch.where(self.batch.mask, lp, fill(lp)) if garbage else lp

    def rows(self) -> list[reference.Row]:
        out = []
        for b in range(len(self.batch)):
            n = int(self.batch.mask[b].sum())
            assert self.batch.logp_old is not None
            out.append(
                reference.Row(
                    self.previous[b, :n].tolist(),
                    self.tokens[b, :n].tolist(),
                    self.batch.logp_old[b, :n].double().tolist(),
                    self.batch.logp_rollout[b, :n].double().tolist(),
                    float(self.batch.advantage[b]),
                )
            )
        return out

    def gradient(self, algorithm: Algorithm) -> Tensor:
        theta = self.theta.clone().requires_grad_()
        value, _ = loss(algorithm, self.logp(theta), self.batch, self.totals)
        (grad,) = torch.autograd.grad(value, theta)
        return grad


def fill(x: Tensor) -> Tensor:
    return torch.tensor([GARBAGE[i % len(GARBAGE)] for i in range(x.numel())], dtype=x.dtype).view_as(x)


def log_ratios(kind: str, n: int, rng: random.Random) -> list[float]:
    """Per-token log-ratios: what numerics do, what updates do, just inside and outside C, and the absurd."""
    if kind == "none":
        return [0.0] * n
    if kind in ("tiny", "small", "large"):
        return [rng.gauss(0, {"tiny": 3e-4, "small": 0.15, "large": 2.0}[kind]) for _ in range(n)]
    x = [rng.gauss(0, 0.1) for _ in range(n)]
    if kind in ("below-cap", "above-cap"):  # the sequence's ratio just inside or outside C
        x[0] += math.log(2.99 if kind == "below-cap" else 3.01) - sum(x)
    elif kind in ("token+200", "token-200"):
        x[rng.randrange(n)] = 200.0 if "+" in kind else -200.0
    elif kind in ("sequence+200", "sequence-200"):
        x = [(200.0 if "+" in kind else -200.0) / n] * n
    return x


MODEST = ("none", "tiny", "small", "large", "below-cap", "above-cap")
EXTREME = ("token+200", "token-200", "sequence+200", "sequence-200", "large")


def make(name: str, seed: int, kinds: tuple[str, ...], dtype: torch.dtype = torch.float64, size: int = 16) -> Case:
    """A ragged batch (1 to 7 tokens, every length there) whose ratios are of the given kinds."""
    rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [*range(1, 8), *(rng.randint(1, 7) for _ in range(size - 7))]
    rng.shuffle(lengths)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(V, (size, 7), generator=torch_rng)
    previous = torch.cat([torch.randint(V, (size, 1), generator=torch_rng), tokens[:, :-1]], 1)
    theta = torch.randn(V, V, generator=torch_rng, dtype=torch.float64).to(dtype)
    logp = torch.log_softmax(theta, -1)[previous, tokens].double()
    old, rollout = logp.clone(), logp.clone()
    for b, n in enumerate(lengths):
        old[b, :n] -= torch.tensor(log_ratios(rng.choice(kinds), n, rng), dtype=torch.float64)
        base = logp if name in ON_POLICY else old
        rollout[b, :n] = base[b, :n] - torch.tensor(log_ratios(rng.choice(kinds), n, rng), dtype=torch.float64)
    advantage = [1.5, -0.7, 0.0, 0.31, -1.0, *(rng.gauss(0, 1) for _ in range(size - 5))]
    batch = Batch(
        tokens=torch.cat([previous[:, :1], tokens], 1),
        prompt_length=torch.ones(size, dtype=torch.int64),
        mask=mask,
        logp_rollout=torch.where(mask, rollout, fill(rollout)).to(dtype),
        advantage=torch.tensor(advantage, dtype=dtype),
        logp_old=torch.where(mask, old, fill(old)).to(dtype),
    )
    return Case(theta, previous, tokens, batch)


def as_published(name: str, reduction: Reduction) -> Algorithm:
    return dataclasses.replace(ALGORITHMS[name], reduction=reduction)


def assert_near(got: Tensor, want: np.ndarray, tolerance: float) -> None:
    assert got.isfinite().all()
    scale = max(float(np.abs(want).max()), 1e-3)
    worst = float((got.double() - torch.from_numpy(want)).abs().max()) / scale
    assert worst < tolerance, f"off by {worst:.2e} of the largest entry"


def test_every_algorithm_of_the_specification_is_there():
    paper = {"pg-is", "pg-tis", "pg-mis", "grpo", "grpo-token-tis", "grpo-seq-mis", "gspo", "dapo"}
    assert set(ALGORITHMS) == paper | {"reinforce", "rloo", "grpo-seq-tis", "icepop", "cispo"}


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if ALGORITHMS[n].needs_old and n != "cispo"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reference_gradient_is_the_derivative_of_the_reference_objective(name: str, reduction: str):
    """The reference checks itself by finite differences, where there is an objective to differentiate."""
    case = make(name, 11, ("tiny", "small", "large"))
    rows, theta, h = case.rows(), case.theta.numpy(), 1e-7
    numeric = np.zeros_like(theta)
    for i, j in itertools.product(range(V), range(V)):
        up, down = theta.copy(), theta.copy()
        up[i, j] += h
        down[i, j] -= h
        difference = reference.value(name, reduction, up, rows, LONGEST) - reference.value(
            name, reduction, down, rows, LONGEST
        )
        numeric[i, j] = difference / (2 * h)
    analytic = reference.gradient(name, reduction, theta, rows, LONGEST)
    assert np.abs(analytic).max() > 1e-3
    np.testing.assert_allclose(numeric, analytic, atol=1e-6 * np.abs(analytic).max())


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kinds", [MODEST, EXTREME, MODEST + EXTREME], ids=["modest", "extreme", "mixed"])
def test_gradient_equals_the_equation(name: str, reduction: Reduction, kinds: tuple[str, ...]):
    """Ragged rows, NaN and inf as padding, advantages of both signs and zero, ratios of every kind."""
    for seed in range(4):
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
            case = make(name, seed, kinds, dtype)
            want = -reference.gradient(name, reduction, case.theta.double().numpy(), case.rows(), LONGEST)
            assert_near(case.gradient(as_published(name, reduction)), want, tolerance)


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if ALGORITHMS[n].needs_old and n != "cispo"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value_equals_the_equation(name: str, reduction: Reduction):
    for seed in range(4):
        case = make(name, seed, MODEST)
        got, _ = loss(as_published(name, reduction), case.logp(case.theta), case.batch, case.totals)
        want = -reference.value(name, reduction, case.theta.numpy(), case.rows(), LONGEST)
        assert float(got) == pytest.approx(want, rel=1e-11)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pitfall_01_log_ratios_of_200_stay_finite(name: str, dtype: torch.dtype):
    """inf x 0: value, statistics and the gradient with respect to log pi itself, padding included, are finite."""
    for seed in range(6):
        case = make(name, seed, EXTREME, dtype)
        logp = case.logp(case.theta).detach().requires_grad_()
        value, seen = loss(ALGORITHMS[name], logp, case.batch, case.totals)
        value.backward()
        assert value.isfinite()
        assert logp.grad is not None
        assert logp.grad.isfinite().all()
        assert (logp.grad[~case.batch.mask] == 0).all(), "padding must not receive a gradient"
        for stat in seen.values():
            assert math.isfinite(stat.total)
            assert stat.count == case.batch.mask.sum()


@pytest.mark.parametrize("name", ["pg-mis", "grpo-seq-mis", "icepop"])
def test_pitfall_01_an_overflowed_ratio_is_masked_not_multiplied(name: str):
    """exp(200) is inf in float32: selected away it leaves exactly zero, multiplied by a zero mask it leaves NaN."""
    batch = one_row([-201.0, -201.0], old=[-1.0, -1.0], advantage=1.0)
    logp = torch.full((1, 2), -1.0, requires_grad=True)
    value, seen = loss(ALGORITHMS[name], logp, batch, Totals(1, 2, 2))
    value.backward()
    assert value == 0
    assert logp.grad is not None
    assert (logp.grad == 0).all()
    assert seen["correction/outside"].mean == 1.0
    assert seen["correction/weight_mean"].mean == 0.0


def one_row(rollout: list[float], old: list[float] | None = None, advantage: float = 1.0) -> Batch:
    n = len(rollout)
    return Batch(
        tokens=torch.zeros(1, n + 1, dtype=torch.int64),
        prompt_length=torch.ones(1, dtype=torch.int64),
        mask=torch.ones(1, n, dtype=torch.bool),
        logp_rollout=torch.tensor([rollout]),
        advantage=torch.tensor([advantage]),
        logp_old=None if old is None else torch.tensor([old]),
    )


def gradient_at(name: str, logp: list[float], batch: Batch) -> list[float]:
    """Ascent direction per token, with nothing divided out."""
    x = torch.tensor([logp], requires_grad=True)
    value, _ = loss(dataclasses.replace(ALGORITHMS[name], reduction="token-mean"), x, batch, Totals(1, 1, 1))
    (grad,) = torch.autograd.grad(-value, x)
    return grad[0].tolist()


def test_pitfall_02_gspo_stays_in_log_space():
    """Sequence probabilities of e^-12000 underflow even in float64; their ratio is 1 + 1e-4 all the same."""
    n = 40
    logp, old = [-300.0] * n, [-300.0001] * n
    grad = gradient_at("gspo", logp, one_row(old, old, advantage=2.0))
    ratio = math.exp(float(np.float32(-300.0)) - float(np.float32(-300.0001)))
    assert grad == pytest.approx([2.0 * ratio] * n, rel=1e-5)


def test_pitfall_03_a_mask_is_zero_beyond_the_cap_and_does_not_clamp():
    """Equations 7 and 10 against 6: beyond C the weight is 0, not C; within, it is rho itself."""
    inside, beyond = [math.log(2.5) / 2] * 2, [math.log(4.0) / 2] * 2
    for log_ratio, masked, truncated in ((inside, 2.5, 2.5), (beyond, 0.0, 3.0)):
        rollout = [-1.0 - x for x in log_ratio]
        for name, weight in (("pg-mis", masked), ("pg-tis", truncated), ("pg-is", math.exp(sum(log_ratio)))):
            assert gradient_at(name, [-1.0, -1.0], one_row(rollout)) == pytest.approx([weight] * 2, rel=1e-5)
        for name, weight in (("grpo-seq-mis", masked), ("grpo-seq-tis", truncated)):
            got = gradient_at(name, [-1.0, -1.0], one_row(rollout, [-1.0, -1.0]))
            assert got == pytest.approx([weight] * 2, rel=1e-5)


def test_pitfall_04_bounds_act_on_pi_over_mu_not_on_mu_over_pi():
    """pi/mu = 4 is cut at C = 3; pi/mu = 1/4, whose inverse is 4, is kept as 1/4."""
    for name in ("pg-tis", "pg-mis", "grpo-token-tis", "grpo-seq-mis", "grpo-seq-tis"):
        low = gradient_at(name, [-2.0], one_row([-2.0 + math.log(4.0)], [-2.0]))
        assert low == pytest.approx([0.25], rel=1e-5), name
    assert gradient_at("icepop", [-2.0], one_row([-2.0 + math.log(4.0)], [-2.0])) == [0.0]  # below 0.5
    assert gradient_at("icepop", [-2.0], one_row([-2.0 - math.log(4.0)], [-2.0])) == pytest.approx([4.0], rel=1e-5)
    assert gradient_at("grpo-token-tis", [-2.0], one_row([-2.0 - math.log(4.0)], [-2.0])) == pytest.approx([3.0])
    assert gradient_at("grpo-seq-mis", [-2.0], one_row([-2.0 - math.log(4.0)], [-2.0])) == [0.0]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_pitfall_05_no_partition_into_micro_batches_or_ranks_changes_the_result(name: str, reduction: Reduction):
    algorithm = as_published(name, reduction)
    case = make(name, 3, MODEST)
    b = case.batch
    assert b.logp_old is not None
    rng = random.Random(5)
    logp = case.logp(case.theta).detach().requires_grad_()
    whole, whole_seen = loss(algorithm, logp, b, case.totals)
    (whole_grad,) = torch.autograd.grad(whole, logp)
    for parts in (1, 2, 3, 7, len(b)):
        order = rng.sample(range(len(b)), len(b))
        cuts = sorted(rng.sample(range(1, len(b)), parts - 1))
        total, grad, counts = torch.zeros(()).double(), torch.zeros_like(logp), dict.fromkeys(whole_seen, 0.0)
        for start, end in itertools.pairwise([0, *cuts, len(b)]):
            rows = torch.tensor(order[start:end])
            width = int(b.mask[rows].sum(-1).max())  # padded anew, as collate does
            part = Batch(
                tokens=b.tokens[rows, : width + 1],
                prompt_length=b.prompt_length[rows],
                mask=b.mask[rows, :width],
                logp_rollout=b.logp_rollout[rows, :width],
                advantage=b.advantage[rows],
                logp_old=b.logp_old[rows, :width],
            )
            piece, seen = loss(algorithm, logp[rows, :width], part, case.totals)
            grad += torch.autograd.grad(piece, logp)[0]
            total += piece.detach()
            counts = {k: counts[k] + seen[k].total for k in counts}
        assert float(total) == pytest.approx(float(whole.detach()), rel=1e-12, abs=1e-15)
        torch.testing.assert_close(grad, whole_grad, rtol=1e-12, atol=1e-15)
        assert counts == pytest.approx({k: s.total for k, s in whole_seen.items()}, rel=1e-12)


def test_pitfall_05_the_dr_grpo_normaliser_is_constant():
    """Sum over tokens, divided by sequences x the configured maximum: not by the lengths that happened to be there."""
    batch = one_row([-1.0] * 4)
    value, _ = loss(ALGORITHMS["rloo"], torch.full((1, 4), -1.0), batch, Totals(8, 123, 1000))
    assert float(value) == pytest.approx(4.0 / 8000)


@pytest.mark.parametrize("name", ["pg-mis", "grpo-seq-mis", "icepop"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_pitfall_06_rejecting_every_response_gives_zero_and_finite_statistics(name: str, reduction: Reduction):
    case = make(name, 2, ("sequence+200",))
    value, seen = loss(as_published(name, reduction), case.logp(case.theta), case.batch, case.totals)
    assert float(value) == 0.0
    assert case.gradient(as_published(name, reduction)).abs().max() == 0.0
    assert seen["correction/outside"].mean == 1.0
    assert all(math.isfinite(s.mean) for s in seen.values())


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_pitfall_06_rows_without_response_tokens_add_nothing(name: str, reduction: Reduction):
    """A micro-batch with an empty mask: zero, with a gradient (of zero) to run through the backward pass."""
    nothing = Batch(
        tokens=torch.zeros(2, 4, dtype=torch.int64),
        prompt_length=torch.ones(2, dtype=torch.int64),
        mask=torch.zeros(2, 3, dtype=torch.bool),
        logp_rollout=torch.full((2, 3), math.nan),
        advantage=torch.ones(2),
        logp_old=torch.full((2, 3), math.nan),
    )
    logp = torch.full((2, 3), math.nan, requires_grad=True)
    value, seen = loss(as_published(name, reduction), logp, nothing, Totals(2, 7, 3))
    value.backward()
    assert value == 0
    assert logp.grad is not None
    assert (logp.grad == 0).all()
    assert all(s.count == 0 and s.mean == 0 for s in seen.values())


def test_pitfall_06_what_a_correction_rejects_still_counts_in_equation_8s_baseline():
    """Equation 10's indicator is a weight on the gradient; its advantage is Equation 8's, over all G - 1 others.

    So rejecting one response must leave the others' gradients exactly as they were.
    """
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    advantage = ADVANTAGES[ALGORITHMS["grpo-seq-mis"].advantage](rewards)
    assert advantage.tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    old = torch.full((4, 2), -1.0)
    grads = []
    for shift in (0.0, -50.0):  # the first response inside the cap, then far outside
        rollout = old.clone()
        rollout[0] += shift
        batch = dataclasses.replace(
            one_row([0.0, 0.0]),
            tokens=torch.zeros(4, 3, dtype=torch.int64),
            prompt_length=torch.ones(4, dtype=torch.int64),
            mask=torch.ones(4, 2, dtype=torch.bool),
            logp_rollout=rollout,
            advantage=advantage.float(),
            logp_old=old,
        )
        logp = old.clone().requires_grad_()
        grads.append(torch.autograd.grad(loss(ALGORITHMS["grpo-seq-mis"], logp, batch, Totals(4, 8, 2))[0], logp)[0])
    assert (grads[1][0] == 0).all()
    assert torch.equal(grads[0][1:], grads[1][1:])


def test_pitfall_07_equations_3_5_6_7_need_no_forward_pass_under_old_weights():
    """They run without log pi(theta'), and do not look at it when it is there."""
    assert set(ON_POLICY) == {"pg-is", "pg-tis", "pg-mis", "rloo", "reinforce"}
    for name in ON_POLICY:
        case = make(name, 1, MODEST)
        without = dataclasses.replace(case, batch=dataclasses.replace(case.batch, logp_old=None))
        assert torch.equal(case.gradient(ALGORITHMS[name]), without.gradient(ALGORITHMS[name]))
    for name in set(ALGORITHMS) - set(ON_POLICY):
        case = make(name, 1, MODEST)
        with pytest.raises(AssertionError, match="score the batch"):
            dataclasses.replace(case, batch=dataclasses.replace(case.batch, logp_old=None)).gradient(ALGORITHMS[name])


def test_pitfall_08_the_papers_methods_use_the_leave_one_out_that_equation_8_prints():
    for name in ("pg-is", "pg-tis", "pg-mis", "grpo", "grpo-token-tis", "grpo-seq-mis", "grpo-seq-tis", "rloo"):
        assert ALGORITHMS[name].advantage == "leave-one-out"
        assert ALGORITHMS[name].reduction == "dr-grpo"
    for name in ("gspo", "dapo"):
        assert ALGORITHMS[name].advantage == "group-mean-std"
    got = ADVANTAGES["leave-one-out"](torch.tensor([1.0, 0.0, 0.0]))
    assert got.tolist() == pytest.approx(reference.advantages("leave-one-out", [1.0, 0.0, 0.0]))


@pytest.mark.parametrize("name", ["pg-is", "rloo"])
def test_equation_5_is_unbiased_and_equation_3_is_not(name: str):
    """All responses of up to three tokens are listed, so the expectation under mu is a sum, with no sampling error.

    The truth is grad E_{y ~ pi}[R(y)] (Equation 2), by finite differences over the same list. mu is another policy.
    """
    stop, v = 0, 3
    rng = np.random.default_rng(0)
    theta, mu = rng.normal(size=(v, v)), rng.normal(size=(v, v))
    responses = [
        y
        for n in (1, 2, 3)
        for y in itertools.product(range(v), repeat=n)
        if stop not in y[:-1] and (y[-1] == stop or n == 3)
    ]
    reward = dict(zip(responses, rng.normal(size=len(responses)), strict=True))

    def row(y: tuple[int, ...], policy: np.ndarray) -> list[float]:
        return reference.logp(policy, reference.Row([stop, *y[:-1]], list(y), [], [], 0.0))

    def probability(y: tuple[int, ...], policy: np.ndarray) -> float:
        return math.exp(sum(row(y, policy)))

    assert sum(probability(y, mu) for y in responses) == pytest.approx(1.0)

    def expected_reward(policy: np.ndarray) -> float:
        return sum(probability(y, policy) * reward[y] for y in responses)

    truth = np.zeros((v, v))
    for i, j in itertools.product(range(v), range(v)):
        step = np.zeros((v, v))
        step[i, j] = 1e-6
        truth[i, j] = (expected_reward(theta + step) - expected_reward(theta - step)) / 2e-6

    width, n = 3, len(responses)
    mask, tokens = torch.zeros(n, width, dtype=torch.bool), torch.zeros(n, width, dtype=torch.int64)
    rollout = torch.zeros(n, width, dtype=torch.float64)
    for b, y in enumerate(responses):
        mask[b, : len(y)], tokens[b, : len(y)] = True, torch.tensor(y)
        rollout[b, : len(y)] = torch.tensor(row(y, mu), dtype=torch.float64)
    weight = torch.tensor([probability(y, mu) * reward[y] for y in responses], dtype=torch.float64)
    previous = torch.cat([torch.zeros(n, 1, dtype=torch.int64), tokens[:, :-1]], 1)
    batch = Batch(tokens, torch.ones(n, dtype=torch.int64), mask, rollout, weight)
    table = torch.tensor(theta, requires_grad=True)
    logp = torch.log_softmax(table, -1)[previous, tokens]
    (grad,) = torch.autograd.grad(-loss(ALGORITHMS[name], logp, batch, Totals(1, 1, 1))[0], table)
    error = np.abs(grad.numpy() - truth).max()
    if name == "pg-is":
        assert error < 1e-8
    else:
        assert error > 0.05, "without a correction, samples from mu give another gradient"


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_where_all_policies_agree_all_methods_agree(reduction: Reduction):
    """theta = theta' and mu = pi: every ratio is 1 and every method is REINFORCE with its advantage."""
    case = make("grpo", 7, ("none",))
    want = case.gradient(as_published("reinforce", reduction))
    for name in ALGORITHMS:
        torch.testing.assert_close(case.gradient(as_published(name, reduction)), want, rtol=1e-12, atol=1e-15)


def test_a_large_cap_truncates_nothing():
    """pg-tis and pg-mis become pg-is as C grows, and grpo's corrections the plain weight."""
    case = make("pg-is", 4, ("small", "large"))
    want = case.gradient(ALGORITHMS["pg-is"])
    for beyond in ("truncate", "mask"):
        got = case.gradient(Algorithm("", PG(Correction("sequence", beyond, cap=1e12))))
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    case = make("grpo", 4, ("small", "large"))
    for level in ("token", "sequence"):
        got = [
            case.gradient(Algorithm("", GRPO(correction=Correction(level, beyond, cap=1e12))))
            for beyond in ("keep", "truncate", "mask")
        ]
        torch.testing.assert_close(got[0], got[1], rtol=1e-13, atol=0)
        torch.testing.assert_close(got[0], got[2], rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cap_and_the_floor_themselves_are_inside(dtype: torch.dtype):
    """rho <= C and 0.5 <= rho <= 5 hold with equality."""
    for cap in (3.0, 5.0, 1.5):
        exact = torch.tensor([[math.log(cap)]], dtype=dtype)
        mask = torch.ones(1, 1, dtype=torch.bool)
        for level in ("token", "sequence"):
            weight, outside = Correction(level, "mask", cap).weight(exact, mask)
            assert float(weight) == pytest.approx(cap, rel=1e-6)
            assert not outside.any()
            above = torch.nextafter(exact, torch.tensor(math.inf, dtype=dtype))
            weight, outside = Correction(level, "mask", cap).weight(above, mask)
            assert float(weight) == 0.0
            assert outside.all()
    floor = torch.tensor([[math.log(0.5)]], dtype=dtype)
    correction = Correction("token", "mask", cap=5.0, floor=0.5)
    assert float(correction.weight(floor, torch.ones(1, 1, dtype=torch.bool))[0]) == pytest.approx(0.5)
    below = torch.nextafter(floor, torch.tensor(-math.inf, dtype=dtype))
    assert float(correction.weight(below, torch.ones(1, 1, dtype=torch.bool))[0]) == 0.0


def clip_at(clip: Clip, ratio: float, advantage: float, dtype: torch.dtype) -> tuple[float, float, bool]:
    r = torch.tensor(ratio, dtype=dtype, requires_grad=True)
    value, flat = clip(r, torch.tensor(advantage, dtype=dtype))
    (grad,) = torch.autograd.grad(value, r)
    return float(value.detach()), float(grad), bool(flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_borders_by_hand(dtype: torch.dtype):
    """(ratio, advantage) -> value, d value / d ratio, clipped; on the border the gradient still passes, whole."""
    table = [
        (1.0, 2.0, 2.0, 2.0, False),
        (1.28, 2.0, 2.56, 2.0, False),
        (1.29, 2.0, 2.56, 0.0, True),
        (1.29, -2.0, -2.58, -2.0, False),  # a bad token that got likelier is pushed back with its full ratio
        (0.8, -2.0, -1.6, -2.0, False),
        (0.79, -2.0, -1.6, 0.0, True),
        (0.79, 2.0, 1.58, 2.0, False),
        (5.0, 0.0, 0.0, 0.0, False),
        (0.1, 0.0, 0.0, 0.0, False),
    ]
    for ratio, advantage, value, grad, clipped in table:
        for clip in (Clip(), Clip(dual=10.0)):
            got = clip_at(clip, ratio, advantage, dtype)
            assert got == pytest.approx((value, grad, clipped), rel=1e-6), (ratio, advantage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dapos_dual_clip_by_hand(dtype: torch.dtype):
    """With A < 0 the term never falls below c A = 10 A, and is flat there; with A > 0 nothing changes."""
    clip = Clip(dual=10.0)
    assert clip_at(clip, 9.0, -1.0, dtype) == pytest.approx((-9.0, -1.0, False))
    assert clip_at(clip, 10.0, -1.0, dtype) == pytest.approx((-10.0, -1.0, False))
    assert clip_at(clip, 11.0, -1.0, dtype) == pytest.approx((-10.0, 0.0, True))
    assert clip_at(clip, 1e8, -3.0, dtype) == pytest.approx((-30.0, 0.0, True))
    assert clip_at(clip, 11.0, 1.0, dtype) == pytest.approx((1.28, 0.0, True))
    assert clip_at(Clip(), 11.0, -1.0, dtype) == pytest.approx((-11.0, -1.0, False))


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if ALGORITHMS[n].needs_old and n != "cispo"])
def test_clip_fraction_counts_exactly_the_tokens_without_a_gradient(name: str):
    """Where the advantage is not zero and the correction keeps the token, `clipped` means a zero derivative."""
    plain = dataclasses.replace(ALGORITHMS[name].objective, correction=None)
    for seed in range(3):
        case = make(name, seed, ("none", "tiny", "small", "large"))
        logp = case.logp(case.theta, garbage=False).detach().requires_grad_()
        terms = plain.terms(logp, dataclasses.replace(case.batch, logp_old=no_garbage(case)))
        (grad,) = torch.autograd.grad(terms.value[case.batch.mask].sum(), logp)
        counted = case.batch.mask & (case.batch.advantage != 0)[:, None]
        assert torch.equal(terms.clipped[counted], (grad == 0)[counted])
        assert 0 < int(terms.clipped[counted].sum()) < int(counted.sum())
        assert not terms.clipped[case.batch.mask & ~counted].any()


def no_garbage(case: Case) -> Tensor:
    assert case.batch.logp_old is not None
    return case.batch.logp_old.masked_fill(~case.batch.mask, 0.0)


def test_cispo_keeps_every_tokens_gradient_and_counts_the_clipped():
    rollout, old = [-1.0] * 4, [-1.0] * 4
    logp = [-1.0, -1.0 + math.log(2.0), -1.0 + math.log(0.5), -1.0 + math.log(1.1)]
    assert gradient_at("cispo", logp, one_row(rollout, old, 2.0)) == pytest.approx([2.0, 2.56, 1.6, 2.2], rel=1e-6)
    _, seen = loss(ALGORITHMS["cispo"], torch.tensor([logp]), one_row(rollout, old), Totals(1, 4, 4))
    assert seen["policy/clip_fraction"].mean == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturating_exp_is_the_exponential_below_its_bound_and_constant_above(dtype: torch.dtype):
    x = torch.tensor([-200.0, -1.0, 0.0, 1.0, 19.0, MAX_LOG_RATIO, 20.1, 200.0], dtype=dtype, requires_grad=True)
    y = saturating_exp(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    want = [math.exp(min(float(v), 20.0)) for v in x.tolist()]
    assert y.tolist() == pytest.approx(want, rel=1e-6)
    assert grad.tolist() == pytest.approx(want, rel=1e-6)  # it keeps pushing back beyond the bound


def test_corrections_are_constants_to_the_gradient():
    """A factor outside the gradient sign carries none: the ascent direction of pg-is is rho A, not 2 rho A or more."""
    assert gradient_at("pg-is", [-1.0], one_row([-1.5], advantage=2.0)) == pytest.approx([2.0 * math.exp(0.5)])
    assert gradient_at("cispo", [-1.0], one_row([-1.1], [-1.1], 1.0)) == pytest.approx([math.exp(0.1)])


def test_published_settings():
    """Section 4.1, Table 3 and the methods' own papers."""
    assert Clip() == Clip(0.2, 0.28, None)
    assert GSPO().clip == Clip(3e-4, 4e-4, None)
    assert ALGORITHMS["dapo"].objective == GRPO(Clip(0.2, 0.28, 10.0))
    assert ALGORITHMS["dapo"].reduction == "token-mean"
    assert ALGORITHMS["dapo"].dynamic_sampling
    assert ALGORITHMS["dapo"].overlong_share == 4096 / 20480
    assert ALGORITHMS["gspo"].reduction == "sequence-mean"
    assert ALGORITHMS["icepop"].objective == GRPO(correction=Correction("token", "mask", 5.0, 0.5))
    for a in ALGORITHMS.values():
        if not isinstance(a.objective, CISPO) and a.objective.correction and a is not ALGORITHMS["icepop"]:
            assert a.objective.correction.cap == 3.0
            assert a.objective.correction.floor == 0.0
    others = [a for name, a in ALGORITHMS.items() if name != "dapo"]
    assert not any(a.dynamic_sampling or a.overlong_share for a in others)
