"""The building blocks of a Llama-like model, in plain torch, and the weights they work on.

`llama.py` runs a model by these; `native.py` has the same ones as compiled kernels. Rounding is part of what they
promise: norms are taken in FP32, cast, then scaled; the rotary products, the SiLU and its product with `up`, and the
residual stream round to the compute dtype where the library's modules round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b; weight ``[out, in]``."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Layer:
    """One block's weights, projections fused."""

    norm1: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    norm2: Tensor
    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.out, self.gate_up, self.down


@dataclass(frozen=True)
class Weights:
    """A model's weights. `head` may be in a wider format than the rest."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Linear


@dataclass(frozen=True)
class Shape:
    """The sizes that attention needs."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def shape_of(config: PreTrainedConfig) -> Shape:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(config.num_attention_heads, config.num_key_value_heads, head_dim, config.rms_norm_eps)


# A whole decode step: tokens ``[n]``, position ``[n]``, rotary tables and the cache's keys and values to logits
# ``[n, V]``, or None where the building blocks one by one are the better way.
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor | None]


class Ops(Protocol):
    """The building blocks of a block. `n` rows, hidden size `d`."""

    # Whether attention may read cache positions that no row has reached yet.
    reads_ahead: bool

    def whole_step(self, weights: Weights, shape: Shape) -> Step | None:
        """All of a decode step at once, where the ops can do that. Asked for after each load."""
        ...

    def cache(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for keys or values, unset."""
        ...

    def refresh(self, linears: Sequence[Linear]) -> None:
        """Rebuilds whatever is derived from weights. Called after each load."""
        ...

    def linear(self, x: Tensor, linear: Linear) -> Tensor: ...

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(x + y, norm(x + y)); may overwrite x and y."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up from ``[n, 2 f]`` to ``[n, f]``."""
        ...

    def rotate(self, qkv: Tensor, layer: Layer, shape: Shape, cos: Tensor, sin: Tensor, position: Tensor) -> None:
        """In place on ``[n, (heads + 2 kv_heads) * head_dim]``: norms and rotates queries and keys.

        `cos` and `sin` are tables ``[positions, head_dim]``."""
        ...

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor, shape: Shape, position: Tensor, longest: int) -> Tensor:
        """Writes each row's key and value at its position, attends to positions up to it; ``[n, heads * head_dim]``.

        `keys` and `values` are ``[rows, kv_heads, capacity, head_dim]``; `longest` is the largest position."""
        ...


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension: FP32 inside, cast, then scaled, as the library's modules do it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x ``[n, heads, head_dim]``; cos, sin ``[n, 1, head_dim]``."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class PlainOps:
    """`Ops` in plain torch, on any device."""

    reads_ahead = True

    def whole_step(self, weights: Weights, shape: Shape) -> Step | None:
        return None

    def cache(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def refresh(self, linears: Sequence[Linear]) -> None:
        return

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        return F.linear(x, linear.weight, linear.bias)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x + y
        return x, rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def rotate(self, qkv: Tensor, layer: Layer, shape: Shape, cos: Tensor, sin: Tensor, position: Tensor) -> None:
        x = qkv.view(len(qkv), -1, shape.head_dim)
        cos, sin = cos[position][:, None], sin[position][:, None]
        for part, weight in (
            (x[:, : shape.heads], layer.q_norm),
            (x[:, shape.heads : shape.heads + shape.kv_heads], layer.k_norm),
        ):
            part.copy_(_rotated(part if weight is None else rms_norm(part, weight, shape.eps), cos, sin))

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor, shape: Shape, position: Tensor, longest: int) -> Tensor:
        n = len(qkv)
        q, k, v = qkv.view(n, -1, shape.head_dim).split((shape.heads, shape.kv_heads, shape.kv_heads), 1)
        row = torch.arange(n, device=qkv.device)
        keys[row, :, position] = k
        values[row, :, position] = v
        inside = torch.arange(longest + 1, device=qkv.device) <= position[:, None]
        # The queries that share a key head stand where a longer prompt's queries would: no copy of keys.
        out = F.scaled_dot_product_attention(
            q.reshape(n, shape.kv_heads, shape.group, shape.head_dim),
            keys[:n, :, : longest + 1],
            values[:n, :, : longest + 1],
            attn_mask=inside[:, None, None],
        )
        return out.reshape(n, -1)
