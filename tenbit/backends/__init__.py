"""Backends train: they are the training policy pi. One small protocol; `single.py` is one process.

Losses arrive already divided by global totals, so gradients only ever add: over micro-batches, over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tenbit.types import Batch, Stats

LossFunction = Callable[[Tensor, Batch], tuple[Tensor, Stats]]
"""(log pi(y_t) [B, T] float32 with gradient, batch) -> (scalar to minimise, statistics)."""


@dataclass(frozen=True)
class StepStats:
    """One gradient step. On a skipped step nothing but the loss scale changed, and the norm is undefined (None)."""

    grad_norm: float | None
    loss_scale: float
    skipped: bool
    lr: float


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

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The FP32 masters as a full state dict, tied tensors under every name they have."""
        ...

    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        """(part, name, tensor) of everything held, for `Precision.verify`."""
        ...

    def save(self, folder: Path) -> None:
        """Masters, optimiser, loss scale and update count, into an existing folder."""
        ...

    def load(self, folder: Path) -> None: ...
