"""Rollouts -> batches: gradient steps, micro-batches under a token budget, padded tensors.

Rows are sorted by length before they are cut into micro-batches, so that little of a padded rectangle is padding.
How rows are cut never changes the result: losses are divided by the totals of the whole gradient step. Every rank
gets the same number of micro-batches by construction, because collectives inside a backward pass must match up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tenbit.routing import padded
from tenbit.types import Batch, Completion, Problem, Rollout, Totals


@dataclass(frozen=True)
class Row:
    """A rollout with its advantage: what training needs to know of a response."""

    rollout: Rollout
    advantage: float

    @property
    def length(self) -> int:
        return len(self.rollout.completion.prompt_ids) + self.rollout.completion.length


def ungraded(completion: Completion) -> Row:
    """A row for tokens that are only to be scored: no problem, no reward, no advantage."""
    return Row(Rollout(Problem("", "", ""), completion, "", 0.0, False, 0), 0.0)


def split_evenly(n: int, parts: int) -> list[range]:
    """0..n-1 in `parts` consecutive ranges whose sizes differ by at most one; empty ones are left out."""
    bounds = [n * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds) if a < b]


def totals(rows: Sequence[Row], max_response_length: int) -> Totals:
    """What the losses of one gradient step are divided by. `rows` are those of all ranks."""
    return Totals(len(rows), sum(r.rollout.completion.length for r in rows), max_response_length)


def micro_batches(lengths: Sequence[int], token_budget: int, ranks: int = 1) -> list[list[list[int]]]:
    """Row indices per rank per micro-batch: ``out[rank][i]`` is a list of rows; equally many i for each rank.

    A micro-batch of n rows, padded to its longest row, has at most `token_budget` tokens, unless a single row is
    longer than that. Deterministic. Where single rows do not divide evenly (3 on 2 ranks, no two of which fit the
    budget, or fewer rows than ranks), a rank's last micro-batch is empty: see `collate`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    cuts: list[list[int]] = []
    for i in order:
        # the first row of a micro-batch is its longest
        if cuts and (len(cuts[-1]) + 1) * lengths[cuts[-1][0]] <= token_budget:
            cuts[-1].append(i)
        else:
            cuts.append([i])
    while len(cuts) % ranks:
        widest = max(range(len(cuts)), key=lambda c: len(cuts[c]))
        if len(cuts[widest]) < 2:
            cuts.append([])
            continue
        rows = cuts.pop(widest)
        half = len(rows) // 2
        cuts[widest:widest] = [rows[:half], rows[half:]]
    return [cuts[r::ranks] for r in range(ranks)]


def collate(rows: Sequence[Row], pad_token_id: int) -> Batch:
    """Rows -> a right-padded Batch on the CPU.

    No rows give one row of padding without response tokens: it goes through forward and backward, so that a rank's
    collectives match the others', and adds exactly nothing.
    """
    if not rows:
        return _idle(pad_token_id)
    prompts = [r.rollout.completion.prompt_ids for r in rows]
    completions = [r.rollout.completion for r in rows]
    b, width = len(rows), max(r.length for r in rows)
    t_max = max(c.length for c in completions)
    tokens = torch.full((b, width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros(b, t_max, dtype=torch.bool)
    logp = torch.zeros(b, t_max)
    for i, (prompt, c) in enumerate(zip(prompts, completions, strict=True)):
        ids = (*prompt, *c.response_ids)
        tokens[i, : len(ids)] = torch.tensor(ids)
        mask[i, : c.length] = True
        logp[i, : c.length] = c.logp
    return Batch(
        tokens=tokens,
        prompt_length=torch.tensor([len(p) for p in prompts]),
        mask=mask,
        logp_rollout=logp,
        advantage=torch.tensor([r.advantage for r in rows], dtype=torch.float32),
        experts=padded([c.experts for c in completions], width),
    )


def _idle(pad_token_id: int) -> Batch:
    return Batch(
        tokens=torch.full((1, 2), pad_token_id, dtype=torch.int64),
        prompt_length=torch.ones(1, dtype=torch.int64),
        mask=torch.zeros(1, 1, dtype=torch.bool),
        logp_rollout=torch.zeros(1, 1),
        advantage=torch.zeros(1),
    )
