"""Training in one process: FP32 masters, 16-bit compute, a loss scale, AdamW.

Two ways of computing in 16 bits, by `Precision.casting`:

    whole      the module's weights are a cast copy of the masters (what FSDP2, DeepSpeed and vLLM hold). Each
               micro-batch's 16-bit gradients are added to FP32 sums as soon as they exist, and freed
    autocast   the module holds the masters; torch casts around each operation

Order within `step` (section 3.2, and the order matters): unscale, then measure and clip the norm, then update unless
an inf or NaN was found, then adjust the scale. A skipped step advances nothing else: not the moments, not AdamW's
count, not the learning-rate schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tenbit.backends import LossFunction, StepStats
from tenbit.models.fused import fuse
from tenbit.models.loading import Model
from tenbit.models.logprobs import Head, batch_logprobs
from tenbit.precision import Precision
from tenbit.recipe import OptimSpec
from tenbit.types import Batch, Overflow, Stat, Stats

MAX_SKIPS_IN_A_ROW = 50  # from 65536 down to 6e-11: no scale is left to try


class SingleBackend:
    """The training policy pi on one device. `updates` is the number of gradient steps of the whole run."""

    def __init__(self, model: Model, precision: Precision, optim: OptimSpec, temperature: float, updates: int) -> None:
        self._module = model.module
        self._device = model.device
        self._precision = precision
        self._optim = optim
        self._temperature = temperature
        self._total_updates = updates
        self._done = 0
        self._skips_in_a_row = 0
        named = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self._params = named
        parameters = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        self._buffers = {n: t for n, t in self._module.state_dict().items() if n not in parameters}
        self._masters: dict[str, Tensor] = dict(named)
        self._sums: dict[str, Tensor] = {}
        if precision.has_copy:
            self._cast_whole()
        fuse(self._module)  # after the cast, for kernels work in one format
        self._optimizer = torch.optim.AdamW(
            list(self._masters.values()),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self._scaler = precision.scaler(self._device)
        self._head = Head.of(self._module, precision.head_dtype("train"))

    def _cast_whole(self) -> None:
        """Masters are set apart; the module's parameters become 16-bit. Buffers (rotary tables) stay FP32."""
        compute = self._precision.compute.dtype
        self._masters = {name: p.detach().clone() for name, p in self._params.items()}
        for p in self._module.parameters():
            p.data = p.data.to(compute)
        for name, p in self._params.items():
            p.register_post_accumulate_grad_hook(lambda p, name=name: self._take_gradient(name, p))

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
        self._scaler.scale(value).backward()
        return {**seen, "optim/loss": Stat(float(value.detach()), 1.0), "policy/entropy": Stat.of(entropy)}

    def step(self) -> StepStats:
        for name, total in self._sums.items():
            self._masters[name].grad = total.to(self._masters[name].dtype)
        self._sums.clear()
        lr = self._optim.lr_at(self._done, self._total_updates)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scale = self._scaler.get_scale()
        self._scaler.unscale_(self._optimizer)
        norm = float(nn.utils.clip_grad_norm_(self._masters.values(), self._optim.max_grad_norm))
        if self._scaler.is_enabled():
            self._scaler.step(self._optimizer)
            self._scaler.update()
            skipped = self._scaler.get_scale() < scale  # lowered exactly when an inf or NaN was found
        else:
            skipped = not math.isfinite(norm)
            if not skipped:
                self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._count(skipped)
        return StepStats(None if skipped else norm, scale, skipped, lr)

    def _count(self, skipped: bool) -> None:
        if not skipped:
            self._done += 1
            self._skips_in_a_row = 0
            self._refresh_copy()
            return
        self._skips_in_a_row += 1
        if self._skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise Overflow(
                f"{self._skips_in_a_row} gradient steps in a row had inf or NaN gradients, whatever the loss scale: "
                f"the model overflows in {self._precision.compute.value}, forward or backward. Resume from an earlier "
                "checkpoint with a lower optim.lr, or train with precision = 'bf16' or 'fp32'"
            )

    @torch.no_grad()
    def _refresh_copy(self) -> None:
        if self._precision.has_copy:
            for name, p in self._params.items():
                p.copy_(self._masters[name])

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        by_param = {id(p): self._masters[name] for name, p in self._params.items()}
        for name, p in self._module.named_parameters(remove_duplicate=False):
            yield name, by_param.get(id(p), p).detach()
        yield from self._buffers.items()

    @torch.no_grad()
    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, master in self._masters.items():
            yield "master", name, master
            for key, value in self._optimizer.state.get(master, {}).items():
                if key != "step":
                    yield "optimizer", f"{name}.{key}", value
        for name, p in self._params.items():
            yield "copy", name, p
        sums = self._sums or {name: m.grad for name, m in self._masters.items() if m.grad is not None}
        for name, total in sums.items():
            yield "gradient", name, total
        hidden = torch.zeros(1, self._head.weight.shape[1], device=self._device)
        yield "logits", "of a zero hidden state", self._head.logits(hidden)

    def save(self, folder: Path) -> None:
        save_file({n: m.detach().contiguous() for n, m in self._masters.items()}, folder / "masters.safetensors")
        state = {
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "updates": self._done,
            "skips_in_a_row": self._skips_in_a_row,
        }
        torch.save(state, folder / "trainer.pt")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        saved = load_file(folder / "masters.safetensors")
        if saved.keys() != self._masters.keys():
            raise ValueError(f"{folder}: the checkpoint is of another model than model.path")
        for name, master in self._masters.items():
            master.copy_(saved[name])
        state = torch.load(folder / "trainer.pt", map_location=self._device, weights_only=True)
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._done, self._skips_in_a_row = state["updates"], state["skips_in_a_row"]
        self._refresh_copy()
