"""Continuous batching: at most `max_batch` sequences in flight, finished ones leave at once, waiting ones step in.

`run` knows nothing of architectures. It drives a `Runner`, which holds the cache of the sequences in flight as rows
[0, n), and keeps the books: which request a row is, its random numbers, what it has drawn so far. A row that is done
is replaced by the last row, so the rows stay packed and no time goes to finished ones. Equal prompts (the G samples
of a group) are prefilled once; what that computed is kept until the last of them has been admitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tenbit.types import Overflow, Prompt, Sampling

# Prompts are prefilled this many tokens at a time, ahead of the rows that they are for.
PREFILL_TOKENS = 4096

Draw = Callable[[Tensor, Tensor, Sampling], tuple[Tensor, Tensor]]


class Runner(Protocol):
    """An architecture's forward passes over a cache of rows [0, n)."""

    def reserve(self, rows: int, length: int, experts: bool = False) -> None:
        """Empties the cache and makes it ready for that many rows of at most `length` tokens.

        `experts`: also to record which experts tokens take, where the architecture has any and the runner knows them.
        """
        ...

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[Any, Tensor]]:
        """For each prompt what its cache holds, and the logits ``[V]`` after its last token."""
        ...

    def admit(self, prefilled: Sequence[tuple[Any, int]]) -> None:
        """Appends rows: for each prefilled prompt so many copies."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was. Rows only move down into gaps: ``rows[i] >= i``."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Feeds one token ``[n]`` to each row; logits ``[n, V]`` after it."""
        ...

    def experts(self, row: int) -> Tensor | None:
        """What `Completion.experts` holds, of all tokens that were fed to a row; None if it was not recorded."""
        ...


@dataclass
class _Group:
    """Requests with the same prompt that wait for a row."""

    prompt: tuple[int, ...]
    waiting: deque[int] = field(default_factory=deque)
    prefilled: tuple[Any, Tensor] | None = None


class _Rows:
    """The sequences in flight. Row i of every tensor is the same sequence; rows [0, n) are in use."""

    def __init__(self, rows: int, sampling: Sampling, device: torch.device) -> None:
        shape = (rows, sampling.max_tokens)
        self.uniform = torch.empty(shape, device=device)
        self.ids = torch.empty(shape, dtype=torch.int64, device=device)
        self.logp = torch.empty(shape, device=device)
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)
        self.last = torch.zeros(rows, dtype=torch.int64, device=device)
        self.index = torch.arange(rows, device=device)
        self.stop = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=device)
        self.sampling = sampling
        self.requests: list[int] = []

    def __len__(self) -> int:
        return len(self.requests)

    def append(self, requests: Sequence[int], uniform: Tensor) -> None:
        first, last = len(self), len(self) + len(requests)
        self.uniform[first:last] = uniform
        self.count[first:last] = 0
        self.requests.extend(requests)

    def draw(self, logits: Tensor, first: int, draw: Draw) -> list[int]:
        """Draws one token for rows [first, n). For each: 0 goes on, 1 is done, 2 had logits that are not finite."""
        part = slice(first, len(self))
        row, at = self.index[part], self.count[part]
        tokens, logp = draw(logits, self.uniform[row, at], self.sampling)
        self.ids[row, at] = tokens
        self.logp[row, at] = logp
        self.last[part] = tokens
        at += 1
        done = at == self.sampling.max_tokens
        if self.stop.numel():
            done |= torch.isin(tokens, self.stop)
        return torch.where(logp.isfinite(), done.long(), 2).tolist()

    def take(self, row: int) -> tuple[int, list[int], Tensor]:
        """(request, ids, log-probabilities on the CPU) of a row."""
        count = int(self.count[row])
        return self.requests[row], self.ids[row, :count].tolist(), self.logp[row, :count].cpu().clone()

    def keep(self, rows: Sequence[int]) -> None:
        moved = [(to, frm) for to, frm in enumerate(rows) if to != frm]
        if moved:
            to, frm = torch.tensor(moved, device=self.count.device).T
            for tensor in (self.uniform, self.ids, self.logp, self.count, self.last):
                tensor[to] = tensor[frm]
        self.requests = [self.requests[row] for row in rows]


def _packed(n: int, gone: set[int]) -> list[int]:
    """Which row goes where when `gone` leave [0, n): the last rows fill the gaps, the others stay."""
    left = n - len(gone)
    movers = iter(row for row in range(left, n) if row not in gone)
    return [next(movers) if row in gone else row for row in range(left)]


def _groups(prompts: Sequence[Prompt]) -> deque[_Group]:
    """Requests by prompt, in the order in which the prompts first occur."""
    groups: dict[tuple[int, ...], _Group] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt.ids, _Group(prompt.ids)).waiting.append(index)
    return deque(groups.values())


def _prefill_next(groups: deque[_Group], runner: Runner) -> None:
    """Prefills prompts from the front of the queue, as many as fit the budget of tokens, at least one."""
    batch: list[_Group] = []
    tokens = 0
    for group in groups:
        if batch and tokens + len(group.prompt) > PREFILL_TOKENS:
            break
        batch.append(group)
        tokens += len(group.prompt)
    for group, prefilled in zip(batch, runner.prefill([group.prompt for group in batch]), strict=True):
        group.prefilled = prefilled


def _admit(groups: deque[_Group], free: int, runner: Runner) -> tuple[list[int], Tensor]:
    """Moves up to `free` requests from the queue into the runner; which ones, and their first logits."""
    requests: list[int] = []
    chosen: list[tuple[Any, int]] = []
    logits: list[Tensor] = []
    while groups and len(requests) < free:
        group = groups[0]
        if group.prefilled is None:
            _prefill_next(groups, runner)
        assert group.prefilled is not None
        copies = min(free - len(requests), len(group.waiting))
        requests += [group.waiting.popleft() for _ in range(copies)]
        chosen.append((group.prefilled[0], copies))
        logits.append(group.prefilled[1].expand(copies, -1))
        if not group.waiting:
            groups.popleft()
    runner.admit(chosen)
    return requests, torch.cat(logits)


def run(
    runner: Runner,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    max_batch: int,
    draw: Draw,
    uniforms: Callable[[int, int], Tensor],
    device: torch.device,
) -> list[tuple[list[int], Tensor, Tensor | None]]:
    """(response ids, log-probabilities, experts) for each prompt. Overflow where logits are not finite."""
    results: list[tuple[list[int], Tensor, Tensor | None]] = [([], torch.empty(0), None)] * len(prompts)
    groups = _groups(prompts)
    width = min(max_batch, len(prompts))
    runner.reserve(width, max(len(prompt.ids) for prompt in prompts) + sampling.max_tokens, sampling.experts)
    rows = _Rows(width, sampling, device)

    def settle(status: list[int], first: int) -> None:
        """Hands out what is done and closes the gaps."""
        gone: set[int] = set()
        for row, code in enumerate(status, first):
            if code == 0:
                continue
            request, ids, logp = rows.take(row)
            if code == 2:
                raise Overflow(
                    f"request {request} (prompt of {len(prompts[request].ids)} tokens): the logits for its response "
                    f"token {len(ids)} are not finite. The weights or activations have most likely overflowed the "
                    "rollout format: set precision to 'bf16' or 'fp32', or look at the training run's gradient norms."
                )
            results[request] = (ids, logp, runner.experts(row))
            gone.add(row)
        if gone:
            left = _packed(len(rows), gone)
            rows.keep(left)
            runner.keep(left)

    while groups or len(rows):
        if groups and len(rows) < width:
            first = len(rows)
            requests, logits = _admit(groups, width - first, runner)
            rows.append(requests, torch.stack([uniforms(prompts[r].seed, sampling.max_tokens) for r in requests]))
            settle(rows.draw(logits, first, draw), first)
        if len(rows):
            settle(rows.draw(runner.decode(rows.last[: len(rows)]), 0, draw), 0)
    return results
