"""Training on CPUs with AVX-512: decoder layers of the Llama family, fused.

    fuse(module)        # ['model.layers.0', ..., 'model.norm']: what now computes with compiled kernels

On a CPU the library's modules spend most of a training step between the matrix products, on reading and writing
memory: RMSNorm alone is eight passes over its input forward and more backward. Here a decoder layer is nine operations
with hand-written gradients (`kernels.py`):

    add + RMSNorm, [q k v] product, norms per head + rotary, attention, product, add + RMSNorm, [gate up] product,
    SiLU times gate, product

A layer is fused if it has the parts of a Llama layer and, on random input, computes the same; so families need no
list. Whatever a fused layer is asked for that the kernels do not do (autocast, a cache, padding masks, hooks on its
parts, adapters, another device or attention), it does the ordinary way. Only `forward` of some instances is replaced:
state dicts, hooks on parameters, deep copies and exports are unaffected.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tenbit.models import kernels
from tenbit.precision import Format

Kind = Literal["layer", "norm"]


class _Parts(NamedTuple):
    """What a decoder layer is made of."""

    norm1: Any
    qkv: tuple[nn.Linear, ...]
    q_norm: Any
    k_norm: Any
    out: nn.Linear
    norm2: Any
    gate_up: tuple[nn.Linear, ...]
    down: nn.Linear
    head_dim: int
    scale: float

    @property
    def tensors(self) -> list[Tensor | None]:
        norms = [n.weight for n in (self.norm1, self.norm2, self.q_norm, self.k_norm) if n is not None]
        linears = [*self.qkv, self.out, *self.gate_up, self.down]
        return [*norms, *(x.weight for x in linears), *(x.bias for x in linears)]


def _is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 1
        and isinstance(getattr(module, "variance_epsilon", None), float)
    )


def _untouched(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward, and nothing else."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in vars(module) and not any(getattr(module, name) for name in hooks)


def _get(module: Any, name: str) -> Any:
    return getattr(module, name, None)


def _parts(layer: Any) -> _Parts | None:
    """The layer's parts if they are those of a Llama layer. Asked at every call, for adapters may come later."""
    attn, mlp = _get(layer, "self_attn"), _get(layer, "mlp")
    norm1, norm2 = _get(layer, "input_layernorm"), _get(layer, "post_attention_layernorm")
    q_norm, k_norm = _get(attn, "q_norm"), _get(attn, "k_norm")
    linears = [_get(attn, f"{name}_proj") for name in "qkvo"]
    linears += [_get(mlp, f"{name}_proj") for name in ("gate", "up", "down")]
    norms = [norm1, norm2, *([q_norm, k_norm] if q_norm is not None or k_norm is not None else [])]
    if not (all(type(x) is nn.Linear for x in linears) and all(_is_norm(x) for x in norms)):
        return None
    modules: list[Any] = [attn, mlp, *linears, *norms]
    head_dim, scale = _get(attn, "head_dim"), _get(attn, "scaling")
    known = isinstance(head_dim, int) and head_dim % 2 == 0 and head_dim <= kernels.MAX_HEAD_DIM
    biases = [[x.bias is None for x in group] for group in (linears[:3], linears[4:6])]
    if not known or not isinstance(scale, float) or any(len(set(group)) > 1 for group in biases):
        return None
    if any(len(x.weight) != head_dim for x in norms[2:]) or not all(_untouched(x) for x in modules):
        return None
    if _get(attn, "attention_dropout") or _get(_get(attn, "config"), "_attn_implementation") != "sdpa":
        return None
    q, k, v, o, gate, up, down = linears
    return _Parts(norm1, (q, k, v), q_norm, k_norm, o, norm2, (gate, up), down, head_dim, scale)


def _computable(x: Tensor, tensors: list[Tensor | None]) -> bool:
    """Whether the kernels can do it: all of one format, on the CPU, no autocast."""
    return (
        x.device.type == "cpu"
        and x.dtype in kernels.DTYPES
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and all(t is None or (t.dtype == x.dtype and t.device == x.device and t.is_contiguous()) for t in tensors)
    )


def _linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    return kernels.linears(x, *(layer.weight for layer in layers), *(layer.bias for layer in layers))


def _compute(parts: _Parts, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, length, width = hidden.shape
    dim, q_norm, k_norm = parts.head_dim, parts.q_norm, parts.k_norm
    of = kernels.Heads(
        batch,
        length,
        len(parts.qkv[0].weight) // dim,
        len(parts.qkv[1].weight) // dim,
        dim,
        parts.scale,
        0.0 if q_norm is None else q_norm.variance_epsilon,
    )
    rows = hidden.reshape(-1, width).contiguous()
    rows, normed = kernels.add_norm(rows, None, parts.norm1.weight, parts.norm1.variance_epsilon)
    qkv = _linear(normed, *parts.qkv)
    weights = (None, None) if q_norm is None else (q_norm.weight, k_norm.weight)
    attended = _linear(kernels.attention(qkv, cos, sin, *weights, of), parts.out)
    rows, normed = kernels.add_norm(rows, attended, parts.norm2.weight, parts.norm2.variance_epsilon)
    rows = rows + _linear(kernels.silu_mul(_linear(normed, *parts.gate_up)), parts.down)
    return rows.view(batch, length, width)


def _layer_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A decoder layer's forward: fused where it is plain training or scoring, else the class's own."""
    parts, cos_sin = _parts(self), kwargs.get("position_embeddings")
    asked = {key for key, value in kwargs.items() if value is not None and value is not False}
    if args or parts is None or cos_sin is None or asked - {"position_embeddings", "position_ids"}:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    cos, sin = (x.contiguous() for x in cos_sin)
    shapes = [(b, hidden_states.shape[1], parts.head_dim) for b in (1, hidden_states.shape[0])]
    if cos.shape not in shapes or sin.shape != cos.shape or not _computable(hidden_states, [*parts.tensors, cos, sin]):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return _compute(parts, hidden_states, cos, sin)


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """RMSNorm's forward."""
    if not _computable(hidden_states, [self.weight]):
        return type(self).forward(self, hidden_states)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()  # it may be a slice (DeepSeek's keys)
    return kernels.add_norm(rows, None, self.weight, self.variance_epsilon)[1].view(hidden_states.shape)


@torch.no_grad()
def _agree(module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether `forward` computes what the module does, up to rounding."""
    try:
        theirs = module(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return False  # not a module that is called like a Llama layer
    if not isinstance(theirs, Tensor):
        return False
    ours = forward(module, *args, **kwargs)
    tolerance = 64 * Format.of(theirs.dtype).epsilon
    return bool((ours.float() - theirs.float()).norm() <= tolerance * theirs.float().norm())


def _fits_layer(layer: Any) -> bool:
    parts = _parts(layer)
    if parts is None or not _untouched(layer):
        return False
    weight = parts.norm1.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, len(weight), generator=generator).to(weight.dtype)
    angles = torch.rand(1, 5, parts.head_dim // 2, generator=generator).repeat(1, 1, 2) * 6
    position = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
    return _agree(layer, _layer_forward, x, position_embeddings=position, attention_mask=None)


def _fits_norm(module: Any) -> bool:
    if not _is_norm(module) or not _untouched(module):
        return False
    x = torch.randn(4, len(module.weight), generator=torch.Generator().manual_seed(0))
    return _agree(module, _norm_forward, x.to(module.weight.dtype))


def fuse(module: nn.Module) -> list[str]:
    """Makes a model's decoder layers and its last norm compute with the kernels; the names of those that do.

    None, and nothing changes, where there are no kernels or the model is not on the CPU. Call it when the weights
    have the format that they are computed in.
    """
    found = fusable(module)
    fuse_named(module, found)
    return list(found)


def fusable(module: nn.Module) -> dict[str, Kind]:
    """What `fuse` would replace. The weights must be there: the answer comes from trying it out."""
    device = next((p.device.type for p in module.parameters()), None)
    if device != "cpu" or kernels.library() is None:
        return {}
    found: dict[str, Kind] = {}
    for name, part in module.named_modules():
        if any(name.startswith(f"{layer}.") for layer in found):
            continue  # the ordinary way of a fused layer stays ordinary
        now = getattr(vars(part).get("forward"), "__func__", None)
        if now is _layer_forward or _fits_layer(part):
            found[name] = "layer"
        elif now is _norm_forward or _fits_norm(part):
            found[name] = "norm"
    return found


def fuse_named(module: nn.Module, found: dict[str, Kind]) -> None:
    """Fuses what `fusable` found, in this model or in another one of its architecture."""
    for name, kind in found.items():
        part: Any = module.get_submodule(name)
        part.forward = types.MethodType(_layer_forward if kind == "layer" else _norm_forward, part)
