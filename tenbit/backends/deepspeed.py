"""Training on many ranks with DeepSpeed's ZeRO: stage 1 shards AdamW and the masters, 2 gradients too, 3 weights too.

    torchrun --nproc-per-node 8 -m tenbit train RECIPE backend.name=deepspeed backend.stage=3

What `step` promises is what `masters.py` promises, so DeepSpeed keeps the tensors and moves them, and this file keeps
the rules where its own differ:

    averaging    DeepSpeed divides by the number of ranks; losses here come divided by global totals. Stages 1 and 2 are
                 told to sum. Stage 3 cannot, so it is told a loss scale that is smaller by the number of ranks than the
                 one that the loss is multiplied by (`_averaged`): 16-bit gradients are then as large as in one process
    loss scale   fixed for DeepSpeed and moved from here. Its dynamic scale has a floor, grows one step late, and in the
                 step in which it grows divides the gradients by the new scale, so that they are half of what they were
    masters      made by DeepSpeed from the 16-bit weights. They are set from rank 0's FP32 weights afterwards
    schedule     none of DeepSpeed's; `OptimSpec.lr_at`

The whole model exists once, in the memory of rank 0, while a run starts; on the other ranks it is on meta. Weights are
handed out tensor by tensor, and at stage 3 each is partitioned before the next one comes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tenbit import world
from tenbit.backends import LossFunction, Read, StepStats, TrainerState
from tenbit.backends.masters import MOMENTS, Skips
from tenbit.backends.scorer import Scorer
from tenbit.models import fused
from tenbit.models.loading import Model
from tenbit.models.logprobs import Head
from tenbit.precision import LossScale, Precision
from tenbit.recipe import BackendSpec, OptimSpec
from tenbit.types import Batch, Stat, Stats

BUCKET = 200_000_000  # elements that are reduced or gathered together, at most
CHUNK = 1 << 28  # elements of a checkpoint that a rank reads at a time: 1 GiB


class DeepSpeedBackend:
    """The training policy pi, sharded by ZeRO. The model's weights are rank 0's; on the others it is on meta."""

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
        self._optim, self._total, self._sharded = optim, updates, spec.stage == 3
        self._averaged = world.size() if self._sharded else 1
        self._scale, self._skips = _Scale(precision.loss_scale), Skips(precision)
        config = _config(precision, optim, spec, sum(p.numel() for p in model.module.parameters()))
        library = _library(model.device)
        # a layer's kernel reads its weights without the calls that make ZeRO 3 gather them
        kernels = {} if self._sharded else world.first(lambda: fused.fusable(model.module))
        originals = _spread(model, precision.copy_format.dtype, library, config if self._sharded else None)
        fused.fuse_named(model.module, kernels)
        self._scorer = Scorer(model.module, precision.head_dtype("train"), temperature)
        if self._sharded:
            for p in model.module.get_output_embeddings().parameters():  # used without a call of its module
                library.zero.register_external_parameter(self._scorer, p)
        self._params = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
        parameters = {name for name, _ in model.module.named_parameters(remove_duplicate=False)}
        self._buffers = {n: t for n, t in model.module.state_dict().items() if n not in parameters}
        self._adamw = torch.optim.AdamW(
            list(self._params.values()),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # one of its optimisers prints how much memory is used
            self._engine: Any = library.initialize(
                model=self._scorer, optimizer=self._adamw, config=config, dist_init_required=False
            )[0]
        self._zero: Any = self._engine.optimizer
        self._api: Any = library.utils
        self._make_moments()
        self._tell_scale()
        if precision.has_copy:
            for name, p in self._params.items():
                self._assign(p, "master", _from_first(originals.pop(name, None), _shape(p), self._device))

    def _tell_scale(self) -> None:
        if self._scale.moves or self._averaged != 1:
            self._zero.override_loss_scale(self._scale.value / self._averaged)

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        batch = batch.to(self._device)
        return self._scorer(batch.tokens, batch.prompt_length, batch.mask)[0]

    def accumulate(self, batch: Batch, loss: LossFunction) -> Stats:
        batch = batch.to(self._device)
        logp, entropy = self._engine(batch.tokens, batch.prompt_length, batch.mask)
        value, seen = loss(logp, batch)
        self._engine.backward(value * self._averaged)
        return {**seen, "optim/loss": Stat(float(value.detach()), 1.0), "policy/entropy": Stat.of(entropy)}

    def step(self) -> StepStats:
        lr = self._optim.lr_at(self._skips.updates, self._total)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        scale = self._scale.value
        self._engine.step()
        skipped = bool(self._zero.overflow)
        norm = None if skipped else float(self._engine.get_global_grad_norm())
        self._scale.update(skipped)
        self._tell_scale()
        self._skips.count(skipped)
        return StepStats(norm, scale, skipped, lr)

    @torch.no_grad()
    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        names: dict[int, list[str]] = {}
        for name, p in self._module.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        for _, p in self._module.named_parameters():
            tensor = self._whole(p, dtype)
            for name in names[id(p)]:
                yield name, tensor
        yield from self._buffers.items()

    def _whole(self, p: Any, dtype: torch.dtype | None) -> Tensor:
        """A master cast to `dtype`, on every rank. Where that is the weights' own format, it is taken from them."""
        form = self._precision.copy_format.dtype
        if (self._precision.master.dtype if dtype is None else dtype) == form or not p.requires_grad:
            if not self._sharded:
                return p.detach().clone()
            full = torch.empty(p.ds_tensor.numel() * world.size(), dtype=form, device=self._device)
            dist.all_gather_into_tensor(full, p.ds_tensor.detach().to(self._device))
            return full[: p.ds_numel].view(p.ds_shape)
        master = self._api.safe_get_full_fp32_param(p)
        return master if dtype is None else master.to(dtype)

    @torch.no_grad()
    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, p in self._params.items():
            for key, tensor in self._kept(p).items():
                yield ("master", name, tensor) if key == "master" else ("optimizer", f"{name}.{key}", tensor)
            yield "copy", name, p.ds_tensor if self._sharded else p
        names = {id(p): name for name, p in self._params.items()}
        for p, gradient in _gradients(self._zero, self._params.values()):
            yield "gradient", names[id(p)], gradient
        head = Head.of(self._module, self._precision.head_dtype("train"))
        plain = Head(torch.zeros(1, 8), None, head.dtype, head.softcap, head.scale)
        yield "logits", "of a zero hidden state", plain.logits(torch.zeros(1, 8))

    def _kept(self, p: Any) -> dict[str, Tensor]:
        """This rank's part of a parameter's master and moments, flat; nothing where it is all on other ranks."""
        if self._sharded:
            group, start, count = self._zero.grad_position[self._zero.get_param_id(p)]
            flat = self._zero.fp32_partitioned_groups_flat[group]
            kept = {"master": flat, **{key: self._adamw.state[flat][key] for key in MOMENTS}}
            return {key: tensor.detach().narrow(0, start, count) for key, tensor in kept.items()}
        if p._hp_mapping is None:
            return {}
        keys = {"master": None} | dict(zip(MOMENTS, MOMENTS, strict=True))
        return {key: p._hp_mapping.get_hp_fragment(optim_state_key=name) for key, name in keys.items()}

    def _make_moments(self) -> None:
        """AdamW makes them at its first update; a checkpoint may be taken or read before that."""
        for flat in _flats(self._zero):
            state = self._adamw.state[flat]
            state["step"] = torch.zeros((), dtype=self._precision.optimizer.dtype, device=flat.device)
            state.update({key: torch.zeros_like(flat) for key in MOMENTS})
        if not self._sharded:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _assign(self, p: Any, key: str, full: Tensor) -> None:
        """Each rank takes its part of a whole master or moment. Not a collective."""
        if self._sharded:  # DeepSpeed's function for whole tensors fails where the ranks do not divide one
            if key == "master":
                self._api.safe_set_local_fp32_param(p, _part(p, full))
            else:
                self._api.safe_set_local_optimizer_state(p, _part(p, full), key)
        elif key == "master":
            self._api.safe_set_full_fp32_param(p, full)
        else:
            self._api.safe_set_full_optimizer_state(p, full, key)

    @torch.no_grad()
    def _set_weights(self, p: Any, value: Tensor) -> None:
        """Sets what is computed with: the whole parameter, or at stage 3 this rank's part of it."""
        if not self._sharded:
            p.copy_(value)
            return
        p.ds_tensor.copy_(value)
        if p.ds_status == type(p.ds_status).AVAILABLE:  # small ones stay gathered between steps
            p.partition(has_been_updated=False)

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        return [(p.ds_tensor if self._sharded else p).detach().to("cpu", copy=True) for p in self._all()]

    def _all(self) -> list[Any]:
        return list(self._params.values())

    @contextlib.contextmanager
    def at(self, snapshot: list[Tensor]) -> Iterator[None]:
        now = self.snapshot()
        try:
            self._put(snapshot)
            yield
        finally:
            self._put(now)

    def _put(self, values: list[Tensor]) -> None:
        for p, value in zip(self._all(), values, strict=True):
            self._set_weights(p, value)

    @torch.no_grad()
    def state(self) -> TrainerState:
        """Whole tensors, gathered one at a time; rank i keeps every size-th parameter, on the CPU."""
        tensors: dict[str, Tensor] = {}
        for i, (name, p) in enumerate(self._params.items()):
            for key in ("master", *MOMENTS):
                full = (
                    self._api.safe_get_full_fp32_param(p)
                    if key == "master"
                    else self._api.safe_get_full_optimizer_state(p, key)
                )
                if i % world.size() == world.rank():
                    tensors[f"{key}.{name}"] = full.detach().to("cpu", copy=True)
        counts = {
            "updates": self._skips.updates,
            "skips_in_a_row": self._skips.in_a_row,
            "loss_scale": self._scale.value,
            "clean_steps": self._scale.clean_steps,
        }
        return TrainerState(tensors, counts)

    @torch.no_grad()
    def restore(self, counts: Mapping[str, float], read: Read) -> None:
        """Every rank reads its share of the parameters and hands each to the others."""
        form = self._precision.master.dtype
        for chunk in _chunks([(name, p) for name, p in self._params.items()], CHUNK * world.size()):
            owned = dict(chunk[world.rank() :: world.size()])
            mine = {f"{k}.{n}": torch.empty(_shape(p), dtype=form) for n, p in owned.items() for k in ("master", *MOMENTS)}
            read(mine)
            for i, (name, p) in enumerate(chunk):
                for key in ("master", *MOMENTS):
                    full = _from_first(mine.pop(f"{key}.{name}", None), _shape(p), self._device, i % world.size())
                    self._assign(p, key, full)
                    if key == "master":
                        self._set_weights(p, _part(p, full) if self._sharded else full)
        for flat in _flats(self._zero):
            self._adamw.state[flat]["step"].fill_(counts["updates"])  # skipped steps advanced neither
        self._skips.updates, self._skips.in_a_row = int(counts["updates"]), int(counts["skips_in_a_row"])
        self._scale.restore(float(counts["loss_scale"]), int(counts["clean_steps"]))
        self._tell_scale()


class _Scale:
    """The loss scale by the plan's rules, as `torch.amp.GradScaler` keeps them; without rules it is 1 and stays."""

    def __init__(self, rules: LossScale | None) -> None:
        self._rules = rules
        self.value, self.clean_steps = (rules.initial if rules else 1.0), 0

    @property
    def moves(self) -> bool:
        return self._rules is not None

    def update(self, skipped: bool) -> None:
        if self._rules is None:
            return
        self.clean_steps = 0 if skipped else self.clean_steps + 1
        if skipped:
            self.value *= self._rules.backoff
        elif self.clean_steps == self._rules.interval:
            self.value, self.clean_steps = self.value * self._rules.growth, 0

    def restore(self, value: float, clean_steps: int) -> None:
        if self._rules is not None:
            self.value, self.clean_steps = value, clean_steps


def _library(device: torch.device) -> Any:
    """DeepSpeed, quiet, on the process group that is there. Raises ValueError if it is not installed or not for us."""
    logging.getLogger("DeepSpeed").addFilter(_worth_saying)
    # torch's own, at every call, of names that DeepSpeed calls
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    try:
        library: Any = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ValueError(
            f"backend.name = 'deepspeed': DeepSpeed cannot be imported ({error}). Install it by pip install "
            "'tenbit[deepspeed]', or set backend.name = 'fsdp'"
        ) from error
    chosen = library.get_accelerator().device_name()
    if chosen != device.type:
        raise ValueError(
            f"model.device = {device.type!r}, but DeepSpeed trains on what it finds on this machine, {chosen!r}. Leave "
            "model.device out, or set backend.name = 'fsdp'"
        )
    # an all-reduce for inference on CPUs, which would be compiled here and now
    library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    library.init_distributed(dist_backend=library.get_accelerator().communication_backend_name(), verbose=False)
    return library


def _worth_saying(record: logging.LogRecord) -> bool:
    """Warnings, except of what tenbit reports itself or has decided."""
    known = ("Skipping step", "Setting accelerator to CPU", "untested optimizer")
    return record.levelno >= logging.WARNING and not any(text in record.getMessage() for text in known)


def _config(precision: Precision, optim: OptimSpec, spec: BackendSpec, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration. `step` alone says where an update's micro-batches end."""
    bucket = max(2, min(BUCKET, elements) // 2 * 2)
    zero: dict[str, Any] = {
        "stage": spec.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "memory_efficient_linear": False,  # it would replace torch's linear for the whole process, sampler included
    }
    if spec.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        **precision.deepspeed(),
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_allreduce_op": "mean" if spec.stage == 3 else "sum",
        "gradient_clipping": optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


class _Arriving(nn.Module):
    """Parameters that come to be when DeepSpeed asks for the next, and has partitioned the last."""

    def __init__(self, coming: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._coming = coming

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self._coming)


@torch.no_grad()
def _spread(model: Model, form: torch.dtype, library: Any, partition: dict[str, Any] | None) -> dict[str, Tensor]:
    """Gives every rank the weights in the format it computes in, and the buffers. Returns rank 0's FP32 weights.

    With `partition`, a configuration of stage 3, each rank is left with its part of every parameter. Otherwise the
    other ranks' weights are empty still: DeepSpeed sends rank 0's when it starts.
    """
    module, device = model.module, model.device
    originals = {name: p.detach() for name, p in module.named_parameters()} if world.is_first() else {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None:
                places.setdefault(id(p), []).append((owner, name))

    def coming() -> Iterator[nn.Parameter]:
        for old in list(module.parameters()):
            here = old.detach().to(device, form) if world.is_first() else torch.empty(old.shape, dtype=form, device=device)
            p = nn.Parameter(here, requires_grad=old.requires_grad)
            for owner, name in places[id(old)]:  # a tied one has two
                owner._parameters[name] = p
            yield p

    if partition is None:
        list(coming())
    else:
        library.zero.Init(module=_Arriving(coming()), config_dict_or_path=partition, dtype=form)
    for name, b in list(module.named_buffers()):
        owner, _, last = name.rpartition(".")
        kept = b if world.is_first() else None
        module.get_submodule(owner)._buffers[last] = _from_first(kept, b.shape, device, form=b.dtype)
    return originals


def _from_first(
    full: Tensor | None, shape: torch.Size, device: torch.device, first: int = 0, form: torch.dtype | None = None
) -> Tensor:
    """A tensor that one rank has, on the device of all."""
    form = form or torch.get_default_dtype()
    here = torch.empty(shape, dtype=form, device=device) if full is None else full.detach().to(device, form)
    dist.broadcast(here, src=first)
    return here


def _shape(p: Any) -> torch.Size:
    return getattr(p, "ds_shape", p.shape)


def _part(p: Any, full: Tensor) -> Tensor:
    """This rank's part of a tensor under stage 3: an even share, the last one padded."""
    share = p.ds_tensor.numel()
    part = torch.zeros(share, dtype=full.dtype, device=full.device)
    rest = full.flatten()[share * world.rank() : share * (world.rank() + 1)]
    part[: rest.numel()] = rest
    return part


def _chunks(named: list[tuple[str, Any]], limit: int) -> Iterator[list[tuple[str, Any]]]:
    """Parameters in order, as many at a time as have `limit` elements, and one at least."""
    chunk: list[tuple[str, Any]] = []
    for item in named:
        if chunk and sum(_shape(p).numel() for _, p in chunk) + _shape(item[1]).numel() > limit:
            yield chunk
            chunk = []
        chunk.append(item)
    yield chunk


def _flats(zero: Any) -> list[Tensor]:
    """The flat FP32 partitions that AdamW updates, by the name that each kind of ZeRO has for them."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    raise AssertionError(f"{type(zero).__name__} keeps its masters somewhere else")


def _gradients(zero: Any, params: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    """(parameter, this rank's sum of gradients) between `accumulate` and `step`."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        for i, group in enumerate(zero.fp16_groups):
            yield from zip(group, zero.averaged_gradients.get(i) or (), strict=False)
        return
    for p in params:
        if getattr(p, "grad_accum", None) is not None:  # stage 1: whole sums, reduced by `step`
            yield p, p.grad_accum
        elif p._hp_mapping is not None:
            try:
                yield p, p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)
            except ValueError:  # sums in the format of the weights are kept elsewhere
                if p.grad is not None:
                    yield p, p.grad
    for group, sums in getattr(zero, "all_grad_tensors", {}).items():
        yield from zip(zero.params_in_partition[group], sums or (), strict=False)
