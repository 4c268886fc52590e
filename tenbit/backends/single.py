"""Training in one process: FP32 masters, 16-bit compute, a loss scale, AdamW.

Two ways of computing in 16 bits, by `Precision.casting`:

    whole      the module's weights are a cast copy of the masters (what FSDP2, DeepSpeed and vLLM hold). Each
               micro-batch's 16-bit gradients are added to FP32 sums as soon as they exist, and freed
    autocast   the module holds the masters; torch casts around each operation

What `step` does, and in which order, is in `masters.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tenbit.backends import LossFunction, Read, StepStats, TrainerState
from tenbit.backends.masters import Masters
from tenbit.models.fit import fit_loaded
from tenbit.models.fused import fuse
from tenbit.models.loading import Model, buffers_of
from tenbit.models.logprobs import Head, batch_logprobs
from tenbit.precision import Precision
from tenbit.recipe import OptimSpec
from tenbit.types import Batch, Share, Stat, Stats


class SingleBackend:
    """The training policy pi on one device. `updates` is the number of gradient steps of the whole run."""

    def __init__(self, model: Model, precision: Precision, optim: OptimSpec, temperature: float, updates: int) -> None:
        self._module = model.module
        self._device = model.device
        self._precision = precision
        self._temperature = temperature
        fit_loaded(self._module, precision)
        named = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self._params = named
        self._buffers = buffers_of(self._module)
        self._sums: dict[str, Tensor] = {}
        masters = self._cast_whole() if precision.has_copy else named
        fuse(self._module)  # after the cast, for kernels work in one format
        self._masters = Masters(masters, precision, optim, updates)
        self._head = Head.of(self._module, precision.head_dtype("train"))

    def _cast_whole(self) -> dict[str, Tensor]:
        """Masters are set apart; the module's parameters become 16-bit. Buffers (rotary tables) stay FP32."""
        compute = self._precision.compute.dtype
        masters = {name: p.detach().clone() for name, p in self._params.items()}
        for p in self._module.parameters():
            p.data = p.data.to(compute)
        for name, p in self._params.items():
            p.register_post_accumulate_grad_hook(lambda p, name=name: self._take_gradient(name, p))
        return masters

    def _take_gradient(self, name: str, p: Tensor) -> None:
        """Adds a micro-batch's gradient to the sum in the plan's reduction format, and frees it."""
        assert p.grad is not None
        if name in self._sums:
            self._sums[name] += p.grad
        else:
            self._sums[name] = p.grad.to(self._precision.reduce.dtype)
        p.grad = None

    def _score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with self._precision.autocast(self._device):
            return batch_logprobs(
                self._module, self._head, batch.tokens, batch.prompt_length, batch.mask, self._temperature
            )

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        return self._score(batch.to(self._device))[0]

    def accumulate(self, batch: Batch, loss: LossFunction) -> Stats:
        batch = batch.to(self._device)
        logp, entropy = self._score(batch)
        value, seen = loss(logp, batch)
        self._masters.scaled(value).backward()
        return {**seen, "optim/loss": Stat(float(value.detach()), 1.0), "policy/entropy": Stat.of(entropy)}

    def step(self) -> StepStats:
        for name, total in self._sums.items():
            master = self._masters.tensors[name]
            master.grad = total.to(master.dtype)
        self._sums.clear()
        stats = self._masters.step()
        if not stats.skipped:
            self._refresh_copy()
        return stats

    @torch.no_grad()
    def _refresh_copy(self) -> None:
        if self._precision.has_copy:
            for name, p in self._params.items():
                p.copy_(self._masters.tensors[name])

    def weights(self, dtype: torch.dtype | None = None, share: Share = "model") -> Iterator[tuple[str, Tensor]]:
        by_param = {id(p): self._masters.tensors[name] for name, p in self._params.items()}
        for name, p in self._module.named_parameters(remove_duplicate=False):
            if share == "trained" and not p.requires_grad:
                continue
            master = by_param.get(id(p), p).detach()
            yield name, master if dtype is None else master.to(dtype)
        if share != "trained":
            yield from self._buffers.items()

    @torch.no_grad()
    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        yield from self._masters.live()
        for name, p in self._module.named_parameters():
            yield "copy", name, p
        masters = self._masters.tensors
        sums = self._sums or {name: m.grad for name, m in masters.items() if m.grad is not None}
        for name, total in sums.items():
            yield "gradient", name, total
        hidden = torch.zeros(1, self._head.weight.shape[1], device=self._device)
        yield "logits", "of a zero hidden state", self._head.logits(hidden)

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        return [p.detach().to("cpu", copy=True) for p in self._params.values()]

    @contextlib.contextmanager
    def at(self, snapshot: list[Tensor]) -> Iterator[None]:
        now = self.snapshot()
        try:
            self._put(snapshot)
            yield
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for p, value in zip(self._params.values(), values, strict=True):
            p.copy_(value)

    def state(self) -> TrainerState:
        return self._masters.state()

    def restore(self, counts: Mapping[str, float], read: Read) -> None:
        self._masters.restore(counts, read)
        self._refresh_copy()
