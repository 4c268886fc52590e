"""Outcomes against curves whose end is known by hand, and against a second reading of the definition."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from tenbit.outcome import FALL, PASS, extreme, judge, smoothed


def curve(values, **more):
    return [{"step": i, "train/accuracy": v, "optim/grad_norm": 0.1} | more for i, v in enumerate(values, 1)]


def noisy(levels, seed=0, noise=0.05):
    rng = random.Random(seed)
    return [min(1.0, max(0.0, v + rng.uniform(-noise, noise))) for v in levels]


def ramp(a, b, n):
    return [a + (b - a) * i / (n - 1) for i in range(n)]


def test_smoothed_is_the_mean_of_the_last_values():
    values = noisy([0.5] * 50)
    for i, got in enumerate(smoothed(values, 7)):
        assert got == pytest.approx(fmean(values[max(0, i - 6) : i + 1]))


def test_converging_above_95_percent_passes():
    found = judge(curve(noisy([*ramp(0.5, 0.98, 150), *[0.98] * 50], noise=0.015)), 200)
    assert found.kind == "passed"
    assert found.accuracy > PASS
    assert found.steps == 200


def test_a_last_lucky_step_does_not_pass():
    values = [*[0.9] * 199, 1.0]
    found = judge(curve(values), 200)
    assert found.kind == "failed"
    assert found.accuracy == pytest.approx(fmean(values[-20:]), abs=1e-6)


def test_a_lucky_first_step_is_no_peak():
    found = judge(curve([1.0, *ramp(0.5, 0.7, 199)]), 200)
    assert found.kind == "failed"
    assert found.peak < 0.75


def test_falling_for_good_is_a_collapse_at_the_step_where_the_window_fell():
    values = [*ramp(0.5, 0.9, 100), *ramp(0.9, 0.1, 60), *[0.1] * 40]
    found = judge(curve(values), 200)
    means = [fmean(values[i - 19 : i + 1]) for i in range(19, 200)]  # a window of 20 ends at step i + 20
    peak = max(means)
    first = next(i for i, m in enumerate(means) if i > means.index(peak) and m < peak - FALL) + 20
    assert (found.kind, found.collapsed_at) == ("collapsed", first)
    assert found.peak == pytest.approx(peak, abs=1e-6)
    assert found.peak_step == means.index(peak) + 20


def test_a_dip_that_is_made_good_is_no_collapse():
    values = [*ramp(0.5, 0.9, 80), *ramp(0.9, 0.5, 20), *ramp(0.5, 0.97, 50), *[0.97] * 50]
    assert judge(curve(values), 200).kind == "passed"


def test_gradients_that_stop_being_numbers_are_a_collapse():
    rows = curve([0.9] * 100)
    for row in rows[80:]:
        row["optim/grad_norm"] = None
    assert (judge(rows, 100).kind, judge(rows, 100).collapsed_at) == ("collapsed", 81)
    rows[40]["optim/grad_norm"] = None  # a single skipped step is none
    assert judge(rows[:80], 80).kind == "failed"


def test_of_two_collapses_the_first_counts():
    fallen = curve([*ramp(0.5, 0.9, 100), *[0.1] * 100])
    both = [row | ({"optim/grad_norm": None} if row["step"] > 190 else {}) for row in fallen]
    assert judge(both, 200).collapsed_at == judge(fallen, 200).collapsed_at < 120


def test_the_noise_of_a_few_steps_is_no_collapse():
    assert judge(curve([0.7, 0.5, 0.55, 0.5, 0.6, 0.5, 0.5, 0.55, 0.5, 0.6, 0.5, 0.5]), 12).kind == "failed"


def test_an_unfinished_run_is_running_unless_it_has_collapsed():
    assert judge(curve([0.99] * 50), 100).kind == "running"
    assert judge(curve([*[0.9] * 40, *[0.1] * 40]), 100).kind == "collapsed"
    assert judge([], 10).kind == "running"
    assert judge([{"step": 0, "eval/x/avg@2": 0.5}], 10).kind == "running"


def test_extreme_is_the_larger_end():
    assert extreme({"mismatch/prob_diff_max": 0.25, "mismatch/prob_diff_min": -0.75}) == 0.75
    assert extreme({"mismatch/prob_diff_max": 0.25, "mismatch/prob_diff_min": None}) == 0.25
    assert extreme({}) is None
