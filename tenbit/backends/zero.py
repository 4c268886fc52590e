"""Where ZeRO keeps a parameter's weights, FP32 master, moments and sum of gradients, and how each is read and set.

Stages 1 and 2 keep the weights whole on every rank, and masters and moments in one flat partition of all parameters
laid end to end: a parameter lies on one rank, or on several, in pieces. Stage 3 cuts every parameter into even shares,
weights, master and moments alike. Whole tensors are FP32 and made one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tenbit import world
from tenbit.backends.masters import MOMENTS

BUCKET = 200_000_000  # elements that are reduced or gathered together, at most
PARTS = ("master", *MOMENTS)
FLAT = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


class Held:
    """What a ZeRO optimiser `zero` holds of the parameters `params`; `utils` is ``deepspeed.utils``.

    `full` is a collective; `assign`, `set_weights` and the rest are not.
    """

    def __init__(self, zero: Any, adamw: torch.optim.AdamW, params: Mapping[str, Any], utils: Any) -> None:
        self._zero, self._adamw, self._params, self._utils = zero, adamw, params, utils
        self._sharded = hasattr(zero, FLAT[0])
        # the flat partitions that AdamW updates have another name in each kind of ZeRO
        self._flats: list[Tensor] = next(list(getattr(zero, name)) for name in FLAT if hasattr(zero, name))
        self._make_moments()

    def _make_moments(self) -> None:
        """AdamW makes them at its first update; a checkpoint may be taken or read before that."""
        for flat in self._flats:
            state = self._adamw.state[flat]
            state["step"] = torch.zeros((), dtype=flat.dtype, device=flat.device)
            state.update({key: torch.zeros_like(flat) for key in MOMENTS})
        if not self._sharded:
            self._zero._lazy_init_hp_params_optimizer_state()

    def set_count(self, updates: float) -> None:
        """AdamW's count, on which its bias correction depends."""
        for flat in self._flats:
            self._adamw.state[flat]["step"].fill_(updates)

    def full(self, p: Any, key: str) -> Tensor:
        """A whole master or moment, on every rank."""
        if key == "master":
            return self._utils.safe_get_full_fp32_param(p)
        return self._utils.safe_get_full_optimizer_state(p, key)

    def assign(self, p: Any, key: str, full: Tensor) -> None:
        """Takes this rank's part of a whole master or moment."""
        if self._sharded:  # DeepSpeed's function for whole tensors fails where the ranks do not divide one
            if key == "master":
                self._utils.safe_set_local_fp32_param(p, part(p, full))
            else:
                self._utils.safe_set_local_optimizer_state(p, part(p, full), key)
        elif key == "master":
            self._utils.safe_set_full_fp32_param(p, full)
        else:
            self._utils.safe_set_full_optimizer_state(p, full, key)

    @torch.no_grad()
    def set_weights(self, p: Any, full: Tensor) -> None:
        """Sets what is computed with."""
        if not self._sharded:
            p.copy_(full)
            return
        p.ds_tensor.copy_(part(p, full))
        if p.ds_status == type(p.ds_status).AVAILABLE:  # small ones stay gathered between steps
            p.partition(has_been_updated=False)

    def mine(self, p: Any) -> dict[str, Tensor]:
        """This rank's pieces, flat, by part; empty where all of a parameter is on other ranks."""
        if self._sharded:
            group, start, count = self._zero.grad_position[self._zero.get_param_id(p)]
            flat = self._flats[group]
            pieces = {"master": flat, **{key: self._adamw.state[flat][key] for key in MOMENTS}}
            return {key: tensor.detach().narrow(0, start, count) for key, tensor in pieces.items()}
        if p._hp_mapping is None:
            return {}
        return {key: p._hp_mapping.get_hp_fragment(None if key == "master" else key) for key in PARTS}

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's sums of gradients by name, between backward and step."""
        names = {id(p): name for name, p in self._params.items()}
        for p, total in self._sums():
            yield names[id(p)], total

    def _sums(self) -> Iterator[tuple[Any, Tensor]]:
        if self._sharded:
            for i, group in enumerate(self._zero.fp16_groups):
                yield from zip(group, self._zero.averaged_gradients.get(i) or (), strict=False)
            if self._zero.offload_optimizer:
                yield next(iter(self._params.values())), self._zero.grad_partitions_flat_buffer  # of all of them
            return
        if getattr(self._zero, "cpu_offload", False):
            yield from self._offloaded_sums()
            return
        for p in self._params.values():
            if getattr(p, "grad_accum", None) is not None:  # stage 1: whole sums, reduced by the step
                yield p, p.grad_accum
            elif p._hp_mapping is not None:
                try:
                    yield p, p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)
                except ValueError:  # sums in the format of the weights: at stage 1 here, at stage 2 below
                    if p.grad is not None:
                        yield p, p.grad
        for group, sums in getattr(self._zero, "all_grad_tensors", {}).items():
            yield from zip(self._zero.params_in_partition[group], sums or (), strict=False)

    def _offloaded_sums(self) -> Iterator[tuple[Any, Tensor]]:
        """Stages 1 and 2: 16-bit gradients summed in FP32 stay in one flat partition; others go to the CPU's memory."""
        for p in self._params.values():
            number = self._zero.get_param_id(p)
            if number in self._zero.accumulated_grads_in_cpu:
                yield p, self._zero.accumulated_grads_in_cpu[number]
            elif getattr(p, "grad_accum", None) is not None or p.grad is not None:  # stage 1
                yield p, p.grad if p.grad is not None else p.grad_accum
            elif number in self._zero.grad_position:
                group, _, start, count = self._zero.grad_position[number]
                flat = getattr(self._zero.averaged_gradients.get(group), "flat_partition", None)
                if flat is not None:
                    yield p, flat.narrow(0, start, count)


def shape(p: Any) -> torch.Size:
    """A parameter's shape, also where stage 3 has left it empty."""
    return getattr(p, "ds_shape", p.shape)


def part(p: Any, full: Tensor) -> Tensor:
    """This rank's part of a whole tensor, as stage 3 cuts it: an even share, flat, the last one padded."""
    share = -(-shape(p).numel() // world.size())
    out = torch.zeros(share, dtype=full.dtype, device=full.device)
    mine = full.detach().flatten()[share * world.rank() : share * (world.rank() + 1)]
    out[: mine.numel()] = mine
    return out


def gathered(p: Any, mine: Tensor) -> Tensor:
    """The whole tensor of all ranks' parts, on every rank."""
    full = torch.empty(mine.numel() * world.size(), dtype=mine.dtype, device=mine.device)
    dist.all_gather_into_tensor(full, mine.detach())
    return full[: shape(p).numel()].view(shape(p))


def sent(first: int, full: Tensor | None, like: torch.Size, form: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that rank `first` has, on every rank's device."""
    here = torch.empty(like, dtype=form, device=device) if full is None else full.detach().to(device, form)
    dist.broadcast(here, src=first)
    return here
