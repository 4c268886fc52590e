"""Training on many ranks with FSDP2: every rank holds a shard of each FP32 master, of its moments and its gradient.

    torchrun --nproc-per-node 8 -m tenbit train RECIPE                    (backend.name = "auto" means this)

A decoder layer's weights are gathered, in the plan's compute format, when its forward or backward needs them, and
freed again. Gradients are reduced in the plan's `reduce` format and add up in FP32 shards. Losses come divided by
global totals, so FSDP's averaging over ranks is switched off (`_shard`), here and nowhere else.

The whole model exists once, in the host memory of rank 0, while a run starts. The other ranks build it on the meta
device; `_spread` then hands each rank its shards, tensor by tensor, buffers included; tied heads stay tied.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tenbit import world
from tenbit.backends import LossFunction, Read, StepStats, TrainerState
from tenbit.backends.masters import Masters, whole
from tenbit.backends.scorer import Scorer, decoder_layers, own_name
from tenbit.models import fused
from tenbit.models.fit import fit, fit_loaded
from tenbit.models.loading import Model, buffers_of, first_names
from tenbit.models.logprobs import Head
from tenbit.precision import Precision
from tenbit.recipe import BackendSpec, OptimSpec
from tenbit.types import Batch, Share, Stat, Stats

# true of fused layers, and of no consequence: nothing writes into a hidden state
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

UNEVEN = 1.02  # a rank may hold this much of its share


class FsdpBackend:
    """The training policy pi, sharded over all ranks. The model's weights are rank 0's; on the others it is on meta."""

    def __init__(
        self,
        model: Model,
        precision: Precision,
        optim: OptimSpec,
        temperature: float,
        updates: int,
        spec: BackendSpec,
    ) -> None:
        self._module, self._device, self._precision = model.module, model.device, precision
        self._mesh = init_device_mesh(model.device.type, (world.size(),))
        world.together(lambda: (fit_loaded if world.is_first() else fit)(model.module, precision))
        kernels = world.first(lambda: fused.fusable(model.module))
        self._scorer = Scorer(model.module, precision.head_dtype("train"), temperature)
        self._units = [*decoder_layers(model.module), self._scorer]
        for p in model.module.parameters():
            if not p.requires_grad:  # needs no FP32 shards: it is held, gathered and sent as it is computed with
                p.data = p.data.to(precision.copy_format.dtype)
        weights = _take_weights(model.module)
        _shard(self._units, self._mesh, precision, spec)
        _spread(model.module, weights, self._mesh, torch.device("cpu") if spec.offload else model.device, model.device)
        fused.fuse_named(model.module, kernels)
        # the sharded ones: while a unit is gathered, its modules hold something else
        self._every = dict(model.module.named_parameters())
        self._first = first_names(model.module)
        self._params = {n: p for n, p in self._every.items() if p.requires_grad}
        self._buffers = buffers_of(model.module)
        self._masters = Masters(self._params, precision, optim, updates)
        self._seen: dict[str, Tensor] = {}
        self._names = {module: name for name, module in self._scorer.named_modules()}
        for unit in self._units:
            unit.register_forward_pre_hook(self._note_formats)

    def _note_formats(self, unit: nn.Module, _: Any) -> None:
        """In what formats weights are computed with, which shows between gathering and freeing only."""
        for name, p in unit.named_parameters(prefix=self._names[unit]):
            if not isinstance(p, DTensor):
                self._seen[own_name(name)] = torch.empty(0, dtype=p.dtype, device="meta")

    def _score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with self._precision.autocast(self._device):
            return self._scorer(batch.tokens, batch.prompt_length, batch.mask)

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
        stats = self._masters.step()
        self._free()
        return stats

    def _free(self) -> None:
        """Gathered weights are of the masters before; what is computed next gathers anew."""
        for unit in self._units:
            unit.reshard()

    def weights(self, dtype: torch.dtype | None = None, share: Share = "model") -> Iterator[tuple[str, Tensor]]:
        for name, p in self._every.items():
            if share == "trained" and not p.requires_grad:
                continue
            tensor = _gathered(p, dtype, self._device)
            yield name, tensor
            yield from ((other, tensor) for other, first in self._first.items() if first == name)
        if share != "trained":
            yield from self._buffers.items()

    @torch.no_grad()
    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        yield from self._masters.live()
        for name, seen in self._seen.items():
            yield "copy", name, seen
        if self._precision.reduce == self._precision.master:  # else the format shows on the wire only
            for name, p in self._params.items():
                if p.grad is not None:
                    yield "gradient", name, p.grad
        head = Head.of(self._module, self._precision.head_dtype("train"))
        rows = torch.zeros(1, head.weight.shape[1])
        plain = Head(torch.zeros(1, rows.shape[1]), None, head.dtype, head.softcap, head.scale)
        yield "logits", "of a zero hidden state", plain.logits(rows)

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        form = self._precision.copy_format.dtype
        return [_local(p).to("cpu", form, copy=True) for p in self._params.values()]

    @contextlib.contextmanager
    def at(self, snapshot: list[Tensor]) -> Iterator[None]:
        now = [_local(p).to("cpu", copy=True) for p in self._params.values()]
        try:
            self._put(snapshot)
            yield
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        self._free()
        for p, value in zip(self._params.values(), values, strict=True):
            _local(p).copy_(value)

    def state(self) -> TrainerState:
        return self._masters.state()

    def restore(self, counts: Mapping[str, float], read: Read) -> None:
        self._masters.restore(counts, read)
        self._free()


def _take_weights(module: Any) -> dict[str, Tensor]:
    """Rank 0's parameters and buffers (those that no checkpoint has, too); the module itself goes to meta."""
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    weights = {name: t.detach() for name, t in named} if world.is_first() else {}
    module.to("meta")
    module.tie_weights()
    return weights


def placement(shape: Sequence[int], ranks: int) -> Shard | None:
    """The dimension that is divided over ranks; None is FSDP's own choice, the first.

    Five experts ``[5, 2I, D]`` on two ranks would be three and two, and six on four ranks two, two, two and none. Where
    the fullest rank held so much more than its share, another dimension is divided, if there is one that comes out even
    (FSDP divides no other than the first unevenly).
    """
    first = shape[0] if shape else 1
    if -(-first // ranks) * ranks <= UNEVEN * first:
        return None
    return next((Shard(i) for i, size in enumerate(shape) if size % ranks == 0), None)


def _shard(units: list[Any], mesh: DeviceMesh, precision: Precision, spec: BackendSpec) -> None:
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if spec.offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(**precision.fsdp())
    for unit in units:  # the whole comes last, and holds what the layers do not: embedding, last norm, head
        keep = spec.reshard and unit is not units[-1]
        fully_shard(
            unit,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=keep,
            shard_placement_fn=lambda p: placement(p.shape, mesh.size()),
        )
        unit.set_reshard_after_backward(spec.reshard)  # else they stay until the step
        unit.set_gradient_divide_factor(1.0)  # losses are divided by global totals: gradients add up over ranks
        unit.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def _spread(
    module: Any, weights: dict[str, Tensor], mesh: DeviceMesh, home: torch.device, device: torch.device
) -> None:
    """Gives every rank its shards of rank 0's weights, one tensor at a time, and all of the buffers."""
    module.to_empty(device=home)
    module.tie_weights()  # making room gave each name a tensor of its own
    for name, p in module.named_parameters():
        full = weights.pop(name).to(device) if weights else torch.empty(p.shape, dtype=p.dtype, device=device)
        _local(p).copy_(distribute_tensor(full, mesh, p.placements).to_local())
    for name, b in list(module.named_buffers()):
        full = weights.pop(name).to(device) if weights else torch.empty(b.shape, dtype=b.dtype, device=device)
        dist.broadcast(full, src=0)
        owner, _, last = name.rpartition(".")
        module.get_submodule(owner)._buffers[last] = full


@torch.inference_mode(False)  # an engine asks for weights within its own, where sharded tensors cannot be made
@torch.no_grad()
def _gathered(p: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """The whole tensor; shards are cast first, so that no more travels than is asked for."""
    shard = p.detach()
    return whole((shard if dtype is None else shard.to(dtype)).to(device))


def _local(p: Tensor) -> Tensor:
    """This rank's shard."""
    return p.to_local() if isinstance(p, DTensor) else p
