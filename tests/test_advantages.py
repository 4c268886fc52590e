"""Advantages by hand, against NumPy, and against the reference written from Equation 8."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

from tenbit.advantages import ADVANTAGES

GROUPS = [
    [1.0, 0.0],
    [1.0, 0.0, 0.0, 0.0],
    [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0],
    [0.3, -0.7, 12.5, 1e-3, 4.0],
    [-1.0, 1.0, -0.25],
]
WITH_BASELINE = [name for name in ADVANTAGES if name != "reward"]


def advantage(name: str, rewards: list[float]) -> list[float]:
    return ADVANTAGES[name](torch.tensor(rewards, dtype=torch.float64)).tolist()


def test_leave_one_out_by_hand():
    """Rewards 1, 0, 0, 1: the first is compared with the mean of 0, 0, 1."""
    assert advantage("leave-one-out", [1.0, 0.0, 0.0, 1.0]) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert advantage("leave-one-out", [3.0, 0.0]) == pytest.approx([3.0, -3.0])


def test_group_mean_by_hand():
    assert advantage("group-mean", [1.0, 0.0, 0.0, 1.0]) == pytest.approx([0.5, -0.5, -0.5, 0.5])


def test_group_std_by_hand():
    """1, 0, 0, 1: the unbiased variance is 4 x 0.25 / 3."""
    want = 0.5 / ((1 / 3) ** 0.5 + 1e-6)
    assert advantage("group-mean-std", [1.0, 0.0, 0.0, 1.0]) == pytest.approx([want, -want, -want, want])


def test_reward_is_no_baseline():
    assert advantage("reward", [1.0, 0.0, -2.0]) == [1.0, 0.0, -2.0]
    assert advantage("reward", [5.0]) == [5.0]


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("rewards", GROUPS)
def test_equal_to_the_reference(name: str, rewards: list[float]):
    assert advantage(name, rewards) == pytest.approx(reference.advantages(name, rewards), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("rewards", GROUPS)
def test_pitfall_08_leave_one_out_is_the_group_mean_times_g_over_g_minus_one(rewards: list[float]):
    g = len(rewards)
    scaled = [a * g / (g - 1) for a in advantage("group-mean", rewards)]
    assert advantage("leave-one-out", rewards) == pytest.approx(scaled, rel=1e-12)


@pytest.mark.parametrize("rewards", GROUPS)
def test_std_is_the_unbiased_one_of_numpy(rewards: list[float]):
    r = np.array(rewards)
    want = (r - r.mean()) / (r.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(advantage("group-mean-std", rewards), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", WITH_BASELINE)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3, 1e6 / 7])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 16])
def test_equal_rewards_give_exactly_zero(name: str, reward: float, size: int):
    """Not 1e-17 over a standard deviation of 1e-17."""
    assert advantage(name, [reward] * size) == [0.0] * size


@pytest.mark.parametrize("name", WITH_BASELINE)
def test_nearly_equal_rewards_stay_small(name: str):
    """0.1 + 0.2 against 0.3 is rounding, not an advantage of one standard deviation."""
    assert max(map(abs, advantage(name, [0.1 + 0.2, 0.3, 0.3]))) < 1e-9


@pytest.mark.parametrize("name", WITH_BASELINE)
def test_advantages_of_a_group_sum_to_zero(name: str):
    for rewards in GROUPS:
        assert sum(advantage(name, rewards)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", WITH_BASELINE)
def test_a_group_of_one_is_refused_with_the_key(name: str):
    with pytest.raises(ValueError, match=r"rollout\.samples.*at least 2"):
        advantage(name, [1.0])


@pytest.mark.parametrize("name", ADVANTAGES)
def test_float32_and_integer_rewards_are_computed_in_float64(name: str):
    for dtype in (torch.float32, torch.int64):
        got = ADVANTAGES[name](torch.tensor([1, 0, 0], dtype=dtype))
        assert got.dtype == torch.float64
        assert got.tolist() == pytest.approx(reference.advantages(name, [1.0, 0.0, 0.0]), rel=1e-12)
