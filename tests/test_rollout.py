"""Sampling a step: the order of problems, seeds, overlong shaping, and where advantages come from."""

from __future__ import annotations

import pytest
import torch

from tenbit.advantages import ADVANTAGES
from tenbit.prompts import Asked
from tenbit.rollout import ProblemStream, informative, overlong_penalty, rows, seed_of
from tenbit.types import Completion, Problem, Rollout

ASKED = [Asked(Problem(f"p{i}", "a", f"f:{i}"), (i,)) for i in range(7)]


def rollout(reward: float, correct: bool = False) -> Rollout:
    completion = Completion((1,), (2, 3), torch.zeros(2), "stop")
    return Rollout(ASKED[0].problem, completion, "", reward, correct, 0)


def test_every_epoch_has_every_problem_once_in_its_own_order():
    stream = ProblemStream(ASKED, seed=3)
    epochs = [[a.ids[0] for a in stream.take(7)] for _ in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs)
    assert epochs[0] != epochs[1]


def test_a_stream_made_at_a_position_goes_on_as_the_old_one():
    """Pitfall 28: a resumed run takes the same problems."""
    whole = ProblemStream(ASKED, seed=3).take(30)
    for cut in (1, 7, 12):
        assert ProblemStream(ASKED, seed=3, position=cut).take(30 - cut) == whole[cut:]


def test_seeds_differ_by_step_place_and_sample_and_fit_a_generator():
    seeds = {seed_of(0, step, place, sample) for step in range(10) for place in range(10) for sample in range(8)}
    assert len(seeds) == 800
    assert all(0 <= s < 2**63 for s in seeds)
    assert seed_of(0, 1, 11) != seed_of(0, 11, 1)


@pytest.mark.parametrize(
    ("length", "penalty"), [(16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (30000, -1.0)]
)
def test_overlong_shaping_by_hand(length, penalty):
    """DAPO: Lmax 20480 with a buffer of 4096."""
    assert overlong_penalty(length, 20480, 4096, 1.0) == pytest.approx(penalty)


def test_no_buffer_no_penalty():
    assert overlong_penalty(100, 100, 0, 1.0) == 0.0


def test_informative_groups():
    assert informative([rollout(0.0), rollout(1.0)])
    assert not informative([rollout(1.0), rollout(1.0)])


def test_rows_carry_the_groups_advantages():
    group = [rollout(r) for r in (1.0, 0.0, 0.0, 1.0)]
    (made,) = rows([group], ADVANTAGES["leave-one-out"])
    assert [r.advantage for r in made] == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
