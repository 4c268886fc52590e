"""Rows -> micro-batches -> tensors: nothing lost, nothing over budget, the same number on every rank."""

from __future__ import annotations

import random

import pytest
import torch

from tenbit.algorithms import ALGORITHMS, loss
from tenbit.batching import Row, collate, micro_batches, split_evenly, totals
from tenbit.types import Completion, Problem, Rollout, Totals


def row(prompt: list[int], response: list[int], advantage: float = 0.0) -> Row:
    logp = -torch.arange(1, len(response) + 1, dtype=torch.float32) / 8 - len(prompt)
    completion = Completion(tuple(prompt), tuple(response), logp, "stop")
    return Row(Rollout(Problem("p", "a", "f:1"), completion, "", 0.0, False, 0), advantage)


def random_lengths(rng: random.Random) -> list[int]:
    n = rng.randint(4, 60)
    kind = rng.choice(["even", "tailed", "equal"])
    if kind == "equal":
        return [rng.randint(1, 50)] * n
    return [rng.randint(1, 100) if kind == "even" else 1 + int(rng.expovariate(0.05)) for _ in range(n)]


@pytest.mark.parametrize("seed", range(40))
def test_pitfall_27_every_row_once_within_budget_and_equally_many_micro_batches_per_rank(seed: int):
    rng = random.Random(seed)
    for ranks in (1, 2, 3, 4):
        lengths, budget = random_lengths(rng), rng.choice([1, 60, 128, 1000, 10**9])
        out = micro_batches(lengths, budget, ranks)
        assert len(out) == ranks
        assert len({len(rank) for rank in out}) == 1, "collectives would wait for each other for ever"
        assert sorted(i for rank in out for rows in rank for i in rows) == list(range(len(lengths)))
        for rows in (rows for rank in out for rows in rank):
            if len(rows) > 1:
                assert len(rows) * max(lengths[i] for i in rows) <= budget
        assert out == micro_batches(list(lengths), budget, ranks), "must be deterministic"


@pytest.mark.parametrize("seed", range(40))
def test_empty_micro_batches_only_where_no_row_can_be_moved(seed: int):
    """They cost a forward pass for nothing: only where all others hold a single row."""
    rng = random.Random(seed)
    for ranks in (1, 2, 3, 4):
        lengths = random_lengths(rng)
        parts = [rows for rank in micro_batches(lengths, rng.choice([1, 90, 400]), ranks) for rows in rank]
        if not all(parts):
            assert max(map(len, parts)) == 1
            assert sum(not rows for rows in parts) < ranks


def test_odd_rows_on_two_ranks_that_do_not_fit_together():
    """3 rows of 10 tokens, 10 at a time, 2 ranks: one rank idles once, with a batch that adds exactly nothing."""
    out = micro_batches([10, 10, 10], 10, 2)
    assert [len(rank) for rank in out] == [2, 2]
    assert sorted(len(rows) for rank in out for rows in rank) == [0, 1, 1, 1]
    idle = collate([], pad_token_id=7)
    assert len(idle) == 1
    assert not idle.mask.any()
    assert int(idle.length) == 1
    assert (idle.tokens == 7).all()
    assert idle.tokens.shape[1] >= int(idle.prompt_length.max()) + idle.mask.shape[1]
    logp = torch.zeros(1, 1, requires_grad=True)
    for name, algorithm in ALGORITHMS.items():
        value, _ = loss(algorithm, logp, idle.with_old(torch.zeros(1, 1)), Totals(3, 30, 10))
        assert torch.autograd.grad(value, logp)[0].tolist() == [[0.0]], name
        assert float(value.detach()) == 0.0


def test_rows_are_sorted_by_length_so_that_little_is_padding():
    """Alternating lengths 100 and 10: in rectangles of ten as they come, 45% would be padding."""
    lengths = [100, 10] * 320
    parts = micro_batches(lengths, 1000)[0]
    padded = sum(len(rows) * max(lengths[i] for i in rows) for rows in parts)
    assert padded == sum(lengths)
    tailed = [1 + int(random.Random(i).expovariate(0.01)) for i in range(512)]
    parts = micro_batches(tailed, 4096)[0]
    padded = sum(len(rows) * max(tailed[i] for i in rows) for rows in parts)
    assert padded < 1.25 * sum(tailed)


def test_a_single_row_longer_than_the_budget_goes_alone():
    assert micro_batches([50, 3, 3], 10) == [[[0], [1, 2]]]


def test_equal_lengths_keep_their_order():
    assert micro_batches([4, 4, 4, 4], 8) == [[[0, 1], [2, 3]]]


def test_a_generous_budget_is_still_spread_over_all_ranks():
    out = micro_batches([5] * 8, 10**6, 4)
    assert [[len(rows) for rows in rank] for rank in out] == [[2]] * 4


def test_with_fewer_rows_than_ranks_the_others_idle():
    """A late step of dynamic sampling may have few; every rank still has one micro-batch."""
    assert micro_batches([5, 7], 100, 3) == [[[1]], [[0]], [[]]]
    assert micro_batches([], 100, 3) == [[], [], []]


@pytest.mark.parametrize("n", range(20))
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_split_evenly(n: int, parts: int):
    ranges = split_evenly(n, parts)
    assert [i for r in ranges for i in r] == list(range(n))
    assert len(ranges) == min(n, parts)
    if ranges:
        assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_totals_count_responses_and_response_tokens():
    rows = [row([1, 2, 3], [4, 5]), row([1], [6, 7, 8])]
    assert totals(rows, 99) == Totals(sequences=2, tokens=5, max_response_length=99)
    assert [r.length for r in rows] == [5, 4]


def test_collate_alignment():
    """Response token t of row b is tokens[b, prompt_length[b] + t], and its log-probability stands at [b, t]."""
    rng = random.Random(0)
    rows = [
        row(
            [rng.randint(1, 99) for _ in range(rng.randint(1, 9))],
            [rng.randint(100, 199) for _ in range(rng.randint(1, 12))],
            rng.gauss(0, 1),
        )
        for _ in range(20)
    ]
    pad = 255
    batch = collate(rows, pad)
    longest = max(r.rollout.completion.length for r in rows)
    assert batch.tokens.shape == (20, max(r.length for r in rows))
    assert batch.mask.shape == batch.logp_rollout.shape == (20, longest)
    assert batch.tokens.dtype == torch.int64
    assert batch.logp_rollout.dtype == batch.advantage.dtype == torch.float32
    for b, r in enumerate(rows):
        c = r.rollout.completion
        start = int(batch.prompt_length[b])
        assert tuple(batch.tokens[b, :start].tolist()) == c.prompt_ids
        for t in range(longest):
            assert bool(batch.mask[b, t]) == (t < c.length)
            if t < c.length:
                assert int(batch.tokens[b, start + t]) == c.response_ids[t]
                assert float(batch.logp_rollout[b, t]) == float(c.logp[t])
            else:
                assert float(batch.logp_rollout[b, t]) == 0.0
        assert (batch.tokens[b, r.length :] == pad).all()
        assert float(batch.advantage[b]) == pytest.approx(r.advantage)
        assert int(batch.length[b]) == r.length
    assert batch.logp_old is None


def test_a_pad_token_that_is_also_a_response_token_is_not_masked():
    """Where a tokenizer pads with its end-of-sequence token, the response's own one counts all the same."""
    batch = collate([row([1, 2], [3, 0]), row([1], [4, 5, 0])], pad_token_id=0)
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]
