"""The names of a model that an audit's verdict needs, and what they say of a place: whether the residual stream passes
there, whether the plan computes it in FP32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenbit.backends.scorer import decoder_layers
from tenbit.models.fit import all_routers
from tenbit.precision import Precision
from tenbit.studies.audit_forward import Place, Range

INSIDE = ("inside", "product", "scores")  # of the module that they are listed under


@dataclass(frozen=True)
class Anatomy:
    """The names that a verdict needs: decoder layers in order, embedding, last norm, head, routers, norms; whether
    attention holds its scores as a tensor (eager); why the residual stream cannot be rescaled, if it cannot."""

    layers: tuple[str, ...]
    embedding: str
    last_norm: str
    head: str
    routers: frozenset[str] = frozenset()
    norms: frozenset[str] = frozenset()
    eager: bool = False
    no_rescale: str = ""

    def layer_of(self, name: str) -> str | None:
        return next((layer for layer in self.layers if name == layer or name.startswith(f"{layer}.")), None)

    def part_of(self, name: str) -> str | None:
        """The layer's own part that a module is, or is in: model.layers.3.mlp."""
        layer = self.layer_of(name)
        if layer is None or name == layer:
            return None
        return f"{layer}.{name.removeprefix(f'{layer}.').partition('.')[0]}"


def is_wide(place: Place, precision: Precision, anatomy: Anatomy) -> bool:
    """Whether the plan computes what is at a place in FP32, so that it may have any size."""
    if place.kind == "weight":  # a gradient arrives in the parameter's own format whatever it was computed in
        return False
    if place.kind == "logits":
        return precision.head == "fp32"
    if place.kind in ("product", "scores") and not anatomy.eager:
        return True  # fused attention keeps them in FP32 registers
    if place.kind in INSIDE and place.module in precision.fp32:
        return True
    if precision.router == "fp32" and place.kind == "output" and place.module in anatomy.routers:
        return True
    return any(place.module.startswith(f"{name}.") for name in precision.fp32)


def is_stream(place: Place, anatomy: Anatomy, forward: Mapping[Place, Range]) -> bool:
    """Whether the residual stream itself passes there: at a layer's ends, and where a norm reads it."""
    if place.module in anatomy.layers:
        return place.kind in ("input", "output")
    if place.module == anatomy.embedding:
        return place.kind in ("output", "table")
    if place.kind != "input":
        return False
    reads = place.module in anatomy.norms and anatomy.part_of(place.module) == place.module
    return place.module == anatomy.last_norm or (reads and not _is_result(place, anatomy, forward))


def adds_to_stream(place: Place, anatomy: Anatomy, forward: Mapping[Place, Range]) -> bool:
    """Whether a branch's result is there, and is added to the stream as it is, not by way of a norm as in Gemma 2."""
    normed = any(
        seen == forward[place]
        for other, seen in forward.items()
        if other.kind == "input" and other.module in anatomy.norms and other.module != anatomy.last_norm
    )
    return _is_result(place, anatomy, forward) and not normed


def _is_result(place: Place, anatomy: Anatomy, forward: Mapping[Place, Range]) -> bool:
    """Whether the numbers there are the output of a layer's part that is no norm. Equal numbers tell, names do not."""
    layer = anatomy.layer_of(place.module)
    if layer is None or place.kind not in ("input", "output"):
        return False
    return any(
        seen == forward[place]
        for other, seen in forward.items()
        if other.kind == "output" and other.module not in anatomy.norms and anatomy.layer_of(other.module) == layer
        and anatomy.part_of(other.module) == other.module
    )  # fmt: skip


def head_name(module: Any) -> str:
    head = module.get_output_embeddings()
    return next(name for name, m in module.named_modules() if m is head)


def anatomy_of(module: Any) -> Anatomy:
    names = {id(m): name for name, m in module.named_modules()}
    layers = tuple(names[id(m)] for m in decoder_layers(module))
    last = getattr(module.base_model, "norm", None)
    norms = frozenset(
        name for name, m in module.named_modules()
        if "norm" in type(m).__name__.lower() and not list(m.children())
    )  # fmt: skip
    return Anatomy(
        layers=layers,
        embedding=names[id(module.get_input_embeddings())],
        last_norm=names.get(id(last), ""),
        head=head_name(module),
        routers=frozenset(all_routers(module)),
        norms=norms,
        eager=getattr(module.config, "_attn_implementation", None) == "eager",
    )
