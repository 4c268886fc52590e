"""A backend that trains an adapter beside frozen weights: any backend, with the merge of both on the way out.

    backend = Adapted(SingleBackend(model, ...), model.adapter)

The backend inside knows nothing of it: it trains what requires a gradient, which is the adapter. Here its weights leave
as whole ones, merged afresh in FP32 from the FP32 masters and the frozen base, one layer at a time, into new tensors:
the base is never written, so there is nothing to unmerge and nothing that could drift. An engine that computes with the
adapter itself (`lora.rollout = "adapter"`) asks for the parts instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from tenbit.backends import Backend, LossFunction, Read, StepStats, TrainerState
from tenbit.models.lora import Adapter
from tenbit.types import Batch, Share, Stats


class Adapted:
    """`inner` with an adapter: the same, but for the weights that it hands out."""

    def __init__(self, inner: Backend, adapter: Adapter) -> None:
        self.inner, self.adapter = inner, adapter

    def weights(self, dtype: torch.dtype | None = None, share: Share = "model") -> Iterator[tuple[str, Tensor]]:
        if share != "model":
            return self.inner.weights(dtype, share)
        return self.adapter.merged(self.inner.weights(None, "parts"), dtype)  # FP32 factors: rounded after the merge

    def logprobs(self, batch: Batch) -> Tensor:
        return self.inner.logprobs(batch)

    def accumulate(self, batch: Batch, loss: LossFunction) -> Stats:
        return self.inner.accumulate(batch, loss)

    def step(self) -> StepStats:
        return self.inner.step()

    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        return self.inner.live()

    def snapshot(self) -> list[Tensor]:
        return self.inner.snapshot()

    def at(self, snapshot: list[Tensor]) -> AbstractContextManager[None]:
        return self.inner.at(snapshot)

    def state(self) -> TrainerState:
        return self.inner.state()

    def restore(self, counts: Mapping[str, float], read: Read) -> None:
        self.inner.restore(counts, read)
