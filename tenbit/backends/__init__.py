"""Backends train: they are the training policy pi. One small protocol; `choose.py` makes the one a recipe names.

`single.py` is one process, `fsdp.py` and `deepspeed.py` are many. Losses arrive already divided by global totals, so
gradients only ever add: over micro-batches, over ranks. Every method is called on every rank, the same number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tenbit.types import Batch, Share, Stats

LossFunction = Callable[[Tensor, Batch], tuple[Tensor, Stats]]
"""(log pi(y_t) [B, T] float32 with gradient, batch) -> (scalar to minimise, statistics)."""


@dataclass(frozen=True)
class StepStats:
    """One gradient step. On a skipped step nothing but the loss scale changed, and the norm is undefined (None)."""

    grad_norm: float | None
    loss_scale: float
    skipped: bool
    lr: float


@dataclass(frozen=True)
class TrainerState:
    """What an update depends on, in the one form that all backends share, so that a run may change its backend.

    `tensors` are this rank's part of ``master.NAME``, ``exp_avg.NAME`` and ``exp_avg_sq.NAME``, FP32 with the shape of
    the whole tensor: all of them, a shard of each (DTensor), or some. `counts` holds ``updates``, ``skips_in_a_row``,
    ``loss_scale`` and ``clean_steps`` since the scale last changed. AdamW's own count is ``updates``.
    """

    tensors: dict[str, Tensor]
    counts: dict[str, float]


Read = Callable[[dict[str, Tensor]], None]
"""Fills tensors in place from a checkpoint, by name; they may be whole or shards."""


class Backend(Protocol):
    """Scores and trains one model. Batches may be on the CPU; results are where the model is."""

    def logprobs(self, batch: Batch) -> Tensor:
        """log pi(y_t) under the current weights, [B, T] float32, zero outside the mask, no gradient."""
        ...

    def accumulate(self, batch: Batch, loss: LossFunction) -> Stats:
        """Forward and backward for one micro-batch; its gradients add to those since the last `step`."""
        ...

    def step(self) -> StepStats:
        """Unscale, clip, update, unless a gradient overflowed; then start the next sum of gradients."""
        ...

    def weights(self, dtype: torch.dtype | None = None, share: Share = "model") -> Iterator[tuple[str, Tensor]]:
        """The FP32 masters as a full state dict, tied tensors under every name they have, cast to `dtype` if given.
        Frozen weights may come in the format that they are held in.

        On several ranks each tensor is gathered when it is asked for, and every rank must ask for all of them; no
        more than one is held.
        """
        ...

    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        """(part, name, tensor) of everything held, for `Precision.verify`."""
        ...

    def snapshot(self) -> list[Tensor]:
        """This rank's part of the weights that it computes with, copied to the CPU."""
        ...

    def at(self, snapshot: list[Tensor]) -> AbstractContextManager[None]:
        """Meanwhile `logprobs` are of the weights of a snapshot."""
        ...

    def state(self) -> TrainerState:
        """Masters, moments, loss scale and counts; the tensors may be live ones, to be copied before the next step."""
        ...

    def restore(self, counts: Mapping[str, float], read: Read) -> None:
        """Takes back the state that a backend, not necessarily of this kind or size, was in."""
        ...
