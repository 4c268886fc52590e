"""Outcomes against curves whose end is known by hand, and against a second reading of the definition."""

from __future__ import annotations

import gzip
import json
import random
from statistics import fmean

import pytest

from tenbit.outcome import FALL, PASS, SHORTEST, extreme, judge, outcome_of, smoothed


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
    assert judge(rows[:84], 84).kind == "failed"  # four in a row are not five
    assert judge(rows[:85], 85).kind == "collapsed"
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
    assert judge([{"step": 0, "eval/x/avg@2": 0.5}]).kind == "failed"


def test_a_few_steps_cannot_pass():
    assert judge(curve([1.0] * (SHORTEST - 1))).kind == "failed"
    assert judge(curve([1.0] * SHORTEST)).kind == "passed"


def test_exactly_95_percent_is_not_above_it_whatever_came_before():
    for seed in range(50):
        assert judge(curve(noisy([0.7] * 100, seed) + [0.95] * 20)).kind == "failed"


def test_the_noise_of_small_steps_is_no_collapse():
    """Flat runs: n right answers of 12 by chance. A fall must be larger than such noise explains."""
    for seed in range(100):
        rng = random.Random(seed)
        flat = [sum(rng.random() < 0.5 for _ in range(12)) / 12 for _ in range(60)]
        assert judge(curve(flat), 60).kind == "failed", seed
        assert all(judge(curve(flat[:n]), 60).kind == "running" for n in range(5, 60, 5)), seed


def test_a_fall_that_has_not_lasted_a_window_is_not_for_good_yet():
    values = [*ramp(0.5, 0.9, 100), *[0.2] * 30]
    fell = judge(curve(values), 200).collapsed_at
    assert judge(curve(values[: fell + 10]), 200).kind == "running"


def test_what_an_alarm_ended_is_stopped_and_never_passes():
    found = judge(curve([0.99] * 50), 100, "the mismatch grew")
    assert found.kind == "stopped"
    assert "the mismatch grew" in found.reason
    assert judge(curve([*[0.9] * 40, *[0.1] * 40]), 100, "the mismatch grew").kind == "collapsed"


def test_a_folder_is_judged_by_its_summary_and_its_recipe(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in curve([0.99] * 50))
    (tmp_path / "metrics.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert outcome_of(tmp_path).kind == "passed"  # nothing says that it is to go on
    (tmp_path / "recipe.toml").write_text("steps = 100\n")
    assert outcome_of(tmp_path).kind == "running"
    (tmp_path / "summary.json").write_text('{"steps": 50, "stopped": {"reason": "too far apart"}}')
    assert outcome_of(tmp_path).kind == "stopped"
    (tmp_path / "summary.json").write_text('{"steps": 50}')
    assert outcome_of(tmp_path).kind == "passed"
    (tmp_path / "summary.json").write_text('{"steps":')
    with pytest.raises(ValueError, match=r"summary.json.*Remove"):
        outcome_of(tmp_path)


def test_extreme_is_the_larger_end():
    assert extreme({"mismatch/prob_diff_max": 0.25, "mismatch/prob_diff_min": -0.75}) == 0.75
    assert extreme({"mismatch/prob_diff_max": 0.25, "mismatch/prob_diff_min": None}) == 0.25
    assert extreme({}) is None
