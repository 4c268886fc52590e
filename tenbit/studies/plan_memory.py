"""Who holds what: bytes per GPU and per node for every way of training and of sampling, item by item.

    for part in training(shape, precision, trainer, ranks=64, use=use):
        print(part.name, part.bytes, part.exact)

Four moments are told apart, because the largest one decides: the forward and backward pass, the end of the backward
pass (where the embedding's and the head's gradients are reduced), the weight update, and sampling. What training keeps
for good (masters, moments, a 16-bit copy) stays while the engine samples; gradients, gathered layers and activations do
not. Items that follow from the architecture are exact; the others say that they are estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tenbit.backends.zero import BUCKET
from tenbit.precision import Format, Precision
from tenbit.recipe import Recipe
from tenbit.studies.plan_model import Shape, Use

GIB = 2**30
FP32 = Format.FP32.bytes
FROZEN, MERGE = "frozen weights", "merging, in FP32"
CONTEXT = int(1.5 * GIB)  # CUDA context, loaded kernels, NCCL's buffers: between 1 and 2 GiB
ENGINE_WORK = int(2 * GIB)  # vLLM's activations while it reads prompts, and its CUDA graphs: between 1 and 3 GiB
PROCESS = int(5 * GIB)  # host memory of one Python process with torch, its pinned buffers and vLLM: between 3 and 8 GiB


@dataclass(frozen=True)
class Part:
    """One item of memory. `exact`: it follows from the architecture; else an estimate."""

    name: str
    bytes: int
    exact: bool = True


@dataclass(frozen=True)
class Trainer:
    """A way of training."""

    backend: Literal["single", "fsdp", "deepspeed"]
    stage: int = 0
    reshard: bool = True
    offload: bool = False
    checkpointing: bool = False

    @property
    def label(self) -> str:
        name = {"deepspeed": f"deepspeed ZeRO {self.stage}", "fsdp": "fsdp"}.get(self.backend, "single process")
        kept = ", layers kept" if self.backend == "fsdp" and not self.reshard else ""
        return name + kept + (", offload" if self.offload else "")

    def keys(self) -> dict[str, str]:
        """The recipe's keys that make it so."""
        keys = {"backend.name": self.backend}
        if self.backend == "fsdp":
            keys["backend.reshard"] = str(self.reshard).lower()
        if self.backend == "deepspeed":
            keys["backend.stage"] = str(self.stage)
        if self.backend != "single":
            keys["backend.offload"] = str(self.offload).lower()
        return keys | {"model.gradient_checkpointing": str(self.checkpointing).lower()}


@dataclass(frozen=True)
class Sampler:
    """A way of sampling: an engine on every rank's GPU (over `tensor` of them), or a pool on GPUs of its own."""

    engine: Literal["torch", "vllm"]
    tensor: int = 1
    pool: int = 0

    @property
    def label(self) -> str:
        name = {"torch": "built-in engine", "vllm": "vLLM"}[self.engine]
        where = f" over {self.tensor} GPUs" if self.tensor > 1 else " on each GPU"
        return (f"pool of {self.pool}: " if self.pool else "") + name + where

    def keys(self) -> dict[str, str]:
        keys = {"rollout.engine": "ray" if self.pool else self.engine}
        if self.pool:
            keys |= {"rollout.ray.engine": self.engine, "rollout.ray.engines": str(self.pool // self.tensor)}
        if self.engine == "vllm":
            keys["rollout.vllm.options.tensor_parallel_size"] = str(self.tensor)
        return keys


def resident(shape: Shape, precision: Precision, trainer: Trainer, ranks: int) -> list[Part]:
    """What one GPU holds of the training state at all times, also while the engine samples."""
    t, frozen, copy = shape.trained, shape.frozen, precision.copy_format.bytes
    if trainer.backend == "single":
        held = [Part("FP32 masters", FP32 * t), Part("AdamW's moments", 2 * FP32 * t), *_frozen(copy * frozen)]
        return [*held, Part("16-bit copy", copy * t)] if precision.has_copy else held
    share = _share(t, ranks)
    state = [Part("FP32 masters", FP32 * share), Part("AdamW's moments", 2 * FP32 * share)]
    if trainer.backend == "fsdp":
        state += _frozen(copy * _share(frozen, ranks))
    if trainer.offload:
        state = []
    if trainer.backend == "deepspeed":
        p = t + frozen
        state.append(Part("weights to compute with", copy * (_share(p, ranks) if trainer.stage == 3 else p)))
        if trainer.stage == 3:  # made once and never freed
            state += [gradients(shape, precision, trainer, ranks), _bucket(shape, precision)]
    return state


def _frozen(size: int) -> list[Part]:
    return [Part(FROZEN, size)] if size else []


def gradients(shape: Shape, precision: Precision, trainer: Trainer, ranks: int) -> Part:
    """The sums over micro-batches, from the first backward pass of a gradient step to its end."""
    form = precision.reduce.bytes if trainer.backend == "single" and precision.has_copy else FP32
    whole = trainer.backend == "single" or (trainer.backend == "deepspeed" and trainer.stage == 1)
    count = shape.trained if whole else _share(shape.trained, ranks)
    return Part("gradient sums", 0 if trainer.offload else form * count)


def _bucket(shape: Shape, precision: Precision) -> Part:
    """DeepSpeed reduces gradients in buckets."""
    return Part("reduction bucket", precision.reduce.bytes * min(BUCKET, shape.trained), False)


def training(shape: Shape, precision: Precision, trainer: Trainer, ranks: int, use: Use) -> list[Part]:
    """The largest moment of forward and backward on one GPU."""
    held = resident(shape, precision, trainer, ranks)
    if trainer.stage != 3:
        held.append(gradients(shape, precision, trainer, ranks))
    if trainer.stage in (1, 2):
        held.append(_bucket(shape, precision))
    copy, reduce = precision.copy_format.bytes, precision.reduce.bytes
    layer, head, outside = shape.arriving
    sharded = trainer.backend == "fsdp" or (trainer.backend == "deepspeed" and trainer.stage == 3)
    compute = [Part("activations", use.kept, False), Part("working memory", use.work, False)]
    if not sharded:
        arriving = Part("gradients that arrive", copy * max(layer, head))
        recast = FP32 * shape.trained if reduce < FP32 else 0  # AdamW wants FP32, all of it at once
        moments = [[arriving, *compute], [Part("gradients in FP32 for AdamW", recast)]]
        return _joined(held, max(moments, key=total))
    # the next layer is gathered while one computes; embedding and head stay gathered from forward to backward
    layers = 2 if trainer.reshard or trainer.backend == "deepspeed" else shape.layers
    gathered = Part("gathered weights", copy * (layers * (shape.layer + shape.adapter_layer) + shape.outside))
    inside = Part("gradients before reduction", (copy + reduce) * layer + copy * head)
    after = Part("gradients before reduction", (copy + reduce) * outside)
    moments = [[gathered, inside, *compute], [gathered, after]]
    return _joined(held, max(moments, key=total))


def engine_weights(shape: Shape, precision: Precision, sampler: Sampler) -> Part:
    return Part("engine's weights", math.ceil(precision.rollout.bytes * shape.parameters / sampler.tensor))


def engine_work(shape: Shape, sampler: Sampler, recipe: Recipe) -> Part:
    """Prompts are read, and log-probabilities taken of FP32 logits (three times: logits, sorted or scaled, result)."""
    logits = 3 * FP32 * recipe.rollout.max_batch * shape.vocabulary
    return Part("engine's working memory", logits + (ENGINE_WORK if sampler.engine == "vllm" else 0), False)


def cache_per_token(shape: Shape, precision: Precision, sampler: Sampler) -> int:
    """Bytes of keys and values on one GPU. Tensor parallelism cannot cut a key-value head."""
    return math.ceil(precision.rollout.bytes * shape.cache_per_token / min(sampler.tensor, shape.kv_heads))


def update(shape: Shape, precision: Precision, held: list[Part], sampler: Sampler, here: bool) -> list[Part]:
    """While weights go to the engine: no activations, no cache; one tensor is gathered and sent at a time."""
    merge = 2 * FP32 * shape.largest if shape.adapter else 0  # W and B A; the largest that has an adapter is no larger
    parts = [*held, Part("largest tensor, twice", 2 * precision.sync.bytes * shape.largest), Part(MERGE, merge, False)]
    return _joined(parts, [engine_weights(shape, precision, sampler)] if here else [])


def total(parts: list[Part]) -> int:
    return sum(part.bytes for part in parts)


def _joined(*lists: list[Part]) -> list[Part]:
    return [part for parts in lists for part in parts if part.bytes] + [Part("CUDA, NCCL", CONTEXT, False)]


def _share(count: int, ranks: int) -> int:
    return math.ceil(count / ranks)


def host(shape: Shape, recipe: Recipe, trainer: Trainer, sampler: Sampler, ranks: int, per_node: int) -> list[Part]:
    """Memory of the first node, which has the most to hold: rank 0 reads the model there."""
    here = min(ranks, per_node)
    state = 3 * FP32 * shape.trained * here // ranks
    parts = [
        Part("processes", PROCESS * here, False),
        Part("the whole model on rank 0, at start", FP32 * (shape.trained + shape.frozen)),
        Part("a checkpoint on its way to disk", state),
    ]
    if trainer.offload:
        parts.append(Part("masters, moments, gradients", state + FP32 * shape.trained * here // ranks))
        if trainer.backend == "fsdp":
            parts.append(Part(FROZEN, recipe.precision.copy_format.bytes * shape.frozen * here // ranks))
    apart, ahead = recipe.lora is not None and recipe.lora.rollout == "adapter", recipe.rollout.ahead
    if apart and sampler.engine == "vllm" and recipe.rollout.vllm.sleep:  # sent once, so kept
        asleep = _asleep_here(sampler, ranks, per_node, here, ahead)
        parts.append(Part("engines' weights, asleep", recipe.precision.rollout.bytes * shape.parameters * asleep))
    if sampler.pool:
        sync, versions = recipe.precision.sync.bytes, 2 + ahead if ahead else 1
        if apart:
            parts.append(Part("Ray's object store: frozen weights", sync * shape.frozen))
        each = shape.trained if apart else shape.parameters
        parts.append(Part("Ray's object store: weights", versions * sync * each))
        if ahead:  # to score again what older weights sampled, and to come back
            own = recipe.precision.copy_format.bytes * shape.trained * here // ranks
            parts.append(Part("copies of the weights, ahead", (ahead + 2) * own))
    return parts


def _asleep_here(sampler: Sampler, ranks: int, per_node: int, here: int, ahead: int) -> int:
    """Engines of the first node that sleep while training goes on; those of a pool only if nothing is sampled ahead."""
    if not sampler.pool:
        return here
    return 0 if ahead or ranks + sampler.pool > per_node else sampler.pool


def checkpoint_bytes(shape: Shape) -> int:
    """FP32 masters and moments: the same for every backend and number of ranks."""
    return 3 * FP32 * shape.trained
