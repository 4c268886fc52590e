"""FP32 master weights, their AdamW and the loss scale: what `single.py` and `fsdp.py` have in common.

Order within `step` (section 3.2, and the order matters): measure the norm, unscale and clip, then update unless an inf
or NaN was found, then adjust the scale. A skipped step advances nothing else: not the moments, not AdamW's count, not
the learning-rate schedule.

Masters may be DTensors, each rank holding a shard of each. Their norm is that of all shards: one reduction, which is
not finite on any rank if one gradient is not on one of them. So all ranks skip the same steps and move the scale alike,
and agreeing on it takes nothing beyond the norm that clipping needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tenbit.backends import StepStats, TrainerState
from tenbit.precision import Precision
from tenbit.recipe import OptimSpec
from tenbit.types import Overflow

MAX_SKIPS_IN_A_ROW = 50  # from 65536 down to 6e-11: no scale is left to try
TINY = 1e-6  # as in torch's clipping
MOMENTS = ("exp_avg", "exp_avg_sq")


class Skips:
    """Counts updates and skipped steps; ends a run in which every step is skipped, with the cause."""

    def __init__(self, precision: Precision) -> None:
        self.updates, self.in_a_row = 0, 0
        self._format = precision.compute.value

    def count(self, skipped: bool) -> None:
        """Raises Overflow after MAX_SKIPS_IN_A_ROW skips in a row."""
        self.updates += not skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise Overflow(
                f"{self.in_a_row} gradient steps in a row had inf or NaN gradients, whatever the loss scale: the model "
                f"overflows in {self._format}, forward or backward. Start a new run with a lower optim.lr, or with "
                "precision = 'bf16' or 'fp32'"
            )


class Masters:
    """`tensors` by name are updated in place. `total` is the number of gradient steps of the whole run."""

    def __init__(self, tensors: Mapping[str, Tensor], precision: Precision, optim: OptimSpec, total: int) -> None:
        self.tensors = dict(tensors)
        self.skips = Skips(precision)
        self._optim, self._total = optim, total
        self._scale = precision.scaler()
        self._optimizer = adamw(self.tensors.values(), optim)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale; what backward starts from."""
        return loss * self._scale.value

    def step(self) -> StepStats:
        """One update from the masters' `.grad`, which are cleared."""
        lr = self._optim.lr_at(self.skips.updates, self._total)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scale = self._scale.value
        gradients = [m.grad for m in self.tensors.values() if m.grad is not None]
        norm = float(whole(nn.utils.get_total_norm(gradients))) / scale
        skipped = not math.isfinite(norm)
        if not skipped:
            clip = min(1.0, self._optim.max_grad_norm / (norm + TINY))
            if clip != scale:
                library: Any = torch  # the one kernel for all tensors has no public name
                library._foreach_mul_(gradients, clip / scale)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._scale.update(skipped)
        self.skips.count(skipped)
        return StepStats(None if skipped else norm, scale, skipped, lr)

    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        """Masters and moments, for `Precision.verify`."""
        for name, master in self.tensors.items():
            yield "master", name, master
            for key, value in self._optimizer.state.get(master, {}).items():
                if key != "step":
                    yield "optimizer", f"{name}.{key}", value

    def state(self) -> TrainerState:
        """Everything that an update depends on; the tensors are the live ones."""
        tensors = {f"master.{name}": master.detach() for name, master in self.tensors.items()}
        for name, master in self.tensors.items():
            tensors |= {f"{key}.{name}": self._moments(master)[key] for key in MOMENTS}
        counts = {
            "updates": self.skips.updates,
            "skips_in_a_row": self.skips.in_a_row,
            "loss_scale": self._scale.value,
            "clean_steps": self._scale.clean_steps,
        }
        return TrainerState(tensors, counts)

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        """AdamW makes them at its first update; before that they are zero."""
        state = self._optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state.update({key: torch.zeros_like(master) for key in MOMENTS})
        return state

    @torch.no_grad()
    def restore(self, counts: Mapping[str, float], read: Callable[[dict[str, Tensor]], None]) -> None:
        """Takes a state back; `read` fills the named tensors in place."""
        read(self.state().tensors)
        self.skips.updates, self.skips.in_a_row = int(counts["updates"]), int(counts["skips_in_a_row"])
        for master in self.tensors.values():
            self._moments(master)["step"].fill_(counts["updates"])  # skipped steps advanced neither
        self._scale.restore(float(counts["loss_scale"]), int(counts["clean_steps"]))


def adamw(tensors: Iterable[Tensor], optim: OptimSpec) -> torch.optim.AdamW:
    """The recipe's AdamW; its learning rate is set anew at every step."""
    return torch.optim.AdamW(
        list(tensors), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, on every rank; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
