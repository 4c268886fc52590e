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
from torch import Tensor, nn

from tenbit import world
from tenbit.backends import LossFunction, Read, StepStats, TrainerState
from tenbit.backends.masters import Skips, adamw
from tenbit.backends.scorer import Scorer
from tenbit.backends.zero import BUCKET, PARTS, Held, gathered, part, sent, shape
from tenbit.models import fused
from tenbit.models.fit import fit, fit_loaded
from tenbit.models.loading import Model, buffers_of
from tenbit.models.logprobs import Head
from tenbit.precision import Precision
from tenbit.recipe import BackendSpec, OptimSpec
from tenbit.types import Batch, Share, Stat, Stats

CHUNK = 1 << 28  # parameters whose state a rank reads at a time: 3 GiB


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
        self._scale, self._skips = precision.scaler(), Skips(precision)
        config = _config(precision, optim, spec, sum(p.numel() for p in model.module.parameters()))
        library = _library(model.device)
        world.together(lambda: (fit_loaded if world.is_first() else fit)(model.module, precision))
        # a layer's kernel reads its weights without the calls that make ZeRO 3 gather them
        kernels = {} if self._sharded else world.first(lambda: fused.fusable(model.module))
        originals = _spread(model, precision.copy_format.dtype, library, config if self._sharded else None)
        fused.fuse_named(model.module, kernels)
        self._scorer = Scorer(model.module, precision.head_dtype("train"), temperature)
        if self._sharded:
            head: Any = model.module.get_output_embeddings()
            for p in head.parameters():  # which are used without a call of their module
                library.zero.register_external_parameter(self._scorer, p)
        self._params: dict[str, Any] = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
        self._buffers = buffers_of(model.module)
        self._adamw = adamw(self._params.values(), optim)
        with contextlib.redirect_stdout(io.StringIO()):  # one of its optimisers prints how much memory is used
            self._engine: Any = library.initialize(
                model=self._scorer, optimizer=self._adamw, config=config, dist_init_required=False
            )[0]
        self._zero: Any = self._engine.optimizer
        self._held = Held(self._zero, self._adamw, self._params, library.utils)
        self._tell_scale()
        if precision.has_copy:
            for name, p in self._params.items():
                full = sent(0, originals.pop(name, None), shape(p), precision.master.dtype, self._device)
                self._held.assign(p, "master", full)

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
    def weights(self, dtype: torch.dtype | None = None, share: Share = "model") -> Iterator[tuple[str, Tensor]]:
        names: dict[int, list[str]] = {}
        for name, p in self._module.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        for _, p in self._module.named_parameters():
            if share == "trained" and not p.requires_grad:
                continue
            tensor = self._whole(p, dtype)
            for name in names[id(p)]:
                yield name, tensor
        if share != "trained":
            yield from self._buffers.items()

    def _whole(self, p: Any, dtype: torch.dtype | None) -> Tensor:
        """A master cast to `dtype`, on every rank. Where that is the weights' own format, it is taken from them."""
        form = self._precision.copy_format.dtype
        if (self._precision.master.dtype if dtype is None else dtype) == form or not p.requires_grad:
            return gathered(p, p.ds_tensor) if self._sharded else p.detach().clone()
        master = self._held.full(p, "master")
        return master if dtype is None else master.to(dtype)

    @torch.no_grad()
    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, p in self._params.items():
            for key, tensor in self._held.mine(p).items():
                yield ("master", name, tensor) if key == "master" else ("optimizer", f"{name}.{key}", tensor)
        for name, p in self._module.named_parameters():
            held: Any = p  # frozen ones, too
            yield "copy", name, held.ds_tensor if self._sharded else held
        for name, total in self._held.gradients():
            yield "gradient", name, total
        head, row = Head.of(self._module, self._precision.head_dtype("train")), torch.zeros(1, 1)
        plain = Head(row, None, head.dtype, head.softcap, head.scale)  # at stage 3 the weight is elsewhere
        yield "logits", "of a zero hidden state", plain.logits(row)

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        """An even share of every parameter, also at stages 1 and 2, where each rank computes with all of it."""
        return [(p.ds_tensor if self._sharded else part(p, p)).to("cpu", copy=True) for p in self._params.values()]

    @contextlib.contextmanager
    def at(self, snapshot: list[Tensor]) -> Iterator[None]:
        now = self.snapshot()
        try:
            self._put(snapshot)
            yield
        finally:
            self._put(now)

    def _put(self, parts: list[Tensor]) -> None:
        for p, mine in zip(self._params.values(), parts, strict=True):
            self._held.set_weights(p, gathered(p, mine.to(self._device)))

    @torch.no_grad()
    def state(self) -> TrainerState:
        """Whole tensors, gathered one at a time; rank i keeps every size-th parameter, on the CPU."""
        tensors: dict[str, Tensor] = {}
        for i, (name, p) in enumerate(self._params.items()):
            for key in PARTS:
                full = self._held.full(p, key)
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
        for chunk in _chunks(list(self._params.items()), CHUNK * world.size()):
            owned = chunk[world.rank() :: world.size()]
            mine = {f"{key}.{name}": torch.empty(shape(p), dtype=form) for name, p in owned for key in PARTS}
            read(mine)
            for i, (name, p) in enumerate(chunk):
                for key in PARTS:
                    owner, full = i % world.size(), mine.pop(f"{key}.{name}", None)
                    full = sent(owner, full, shape(p), form, self._device)
                    self._held.assign(p, key, full)
                    if key == "master":
                        self._held.set_weights(p, full)
        self._held.set_count(counts["updates"])  # skipped steps advanced neither
        self._skips.updates, self._skips.in_a_row = int(counts["updates"]), int(counts["skips_in_a_row"])
        self._scale.restore(float(counts["loss_scale"]), int(counts["clean_steps"]))
        self._tell_scale()


def check_library(device: torch.device) -> Any:
    """DeepSpeed, quiet. Raises ValueError if it is not installed or not for us."""
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
    if not hasattr(library.DeepSpeedEngine, "managed_gradient_accumulation"):  # older ones ignore what they do not know
        raise ValueError(
            f"backend.name = 'deepspeed': DeepSpeed {library.__version__} cannot leave the end of an update to its "
            "caller. Install a newer one by pip install 'tenbit[deepspeed]'"
        )
    chosen = library.get_accelerator().device_name()
    if chosen != device.type:
        raise ValueError(
            f"model.device = {device.type!r}, but DeepSpeed trains on what it finds on this machine, {chosen!r}. Leave "
            "model.device out, or set backend.name = 'fsdp'"
        )
    return library


def _library(device: torch.device) -> Any:
    """The same, on the process group that is there."""
    library = check_library(device)
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
    """Yields parameters one at a time, so that DeepSpeed partitions each one before the next is made."""

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
            here = old.detach().to(form) if world.is_first() else torch.empty_like(old, dtype=form, device=device)
            p = nn.Parameter(here.to(device), requires_grad=old.requires_grad)
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
        module.get_submodule(owner)._buffers[last] = sent(0, kept, b.shape, b.dtype, device)
    return originals


def _chunks(named: list[tuple[str, Any]], limit: int) -> Iterator[list[tuple[str, Any]]]:
    """Parameters in order, as many at a time as have `limit` elements, and one at least."""
    chunk: list[tuple[str, Any]] = []
    for item in named:
        if chunk and sum(shape(p).numel() for _, p in chunk) + shape(item[1]).numel() > limit:
            yield chunk
            chunk = []
        chunk.append(item)
    yield chunk
