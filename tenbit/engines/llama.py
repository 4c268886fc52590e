"""A fast decode path for Llama-like blocks: Llama, Mistral, Qwen2 and Qwen3 share one.

What it does differently from the library's own forward: the query, key and value projections are one product, and
so are gate and up; the cache is one static block of memory in which rows are written in place; prompts of any
lengths run through the projections packed, without padding. What it does not do differently is rounding. Norms are
taken in FP32, cast, then scaled; rotary tables are computed in FP32 and cast; the residual stream, the SiLU and the
product with `up` round to the compute dtype where the module's forward rounds. The order of additions is all that
differs, so the sampler stays within rounding of the trainer.

The fused weights are the only copy: the module's parameters become views into them, so loading a parameter in
place updates them and nothing can go stale. The arithmetic itself is in `ops.py` and `native.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tenbit.engines.ops import Layer, Linear, Ops, Step, Weights, shape_of

FUSED_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Rotary embeddings whose table depends on the position alone.
STATIC_ROPES = ("default", "linear", "llama3", "yarn")
# Positions that a cache has room for at first, where sequences may become so long.
FIRST_CAPACITY = 512
# Logits held at a time when given tokens are scored, in numbers.
LOGITS_AT_ONCE = 1 << 25


def unsupported(config: PreTrainedConfig) -> str | None:
    """Why a model cannot take this path, or None if it can."""
    if config.model_type not in FUSED_TYPES:
        return f"model_type {config.model_type!r}"
    layer_types = getattr(config, "layer_types", None)
    sliding = "sliding_attention" in layer_types if layer_types else getattr(config, "sliding_window", None)
    if sliding:
        return "sliding window"
    if config.hidden_act not in ("silu", "swish"):
        return f"hidden_act {config.hidden_act!r}"
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in STATIC_ROPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"rope {rope!r}"
    return None


def _fuse(linears: Sequence[nn.Linear]) -> Linear:
    """One projection of several; their parameters become views into it."""

    def fused(tensors: Sequence[Tensor], name: str) -> Tensor:
        whole = torch.cat([t.detach() for t in tensors])
        for linear, part in zip(linears, whole.split([len(t) for t in tensors]), strict=True):
            setattr(linear, name, nn.Parameter(part, requires_grad=False))
        return whole

    weight = fused([linear.weight for linear in linears], "weight")
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return Linear(weight, fused(biases, "bias") if biases else None)


def _layer(block: Any) -> Layer:
    attention, mlp = block.self_attn, block.mlp

    def weight(norm: Any) -> Tensor | None:
        return None if norm is None else norm.weight.detach()

    return Layer(
        norm1=block.input_layernorm.weight.detach(),
        qkv=_fuse([attention.q_proj, attention.k_proj, attention.v_proj]),
        q_norm=weight(getattr(attention, "q_norm", None)),
        k_norm=weight(getattr(attention, "k_norm", None)),
        out=_fuse([attention.o_proj]),
        norm2=block.post_attention_layernorm.weight.detach(),
        gate_up=_fuse([mlp.gate_proj, mlp.up_proj]),
        down=_fuse([mlp.down_proj]),
    )


@dataclass(frozen=True)
class Ragged:
    """Sequences packed one after another, ``[tokens]`` in all, and where each stands in a padded rectangle."""

    lengths: tuple[int, ...]
    place: Tensor | None  # [tokens] into [sequences * longest]; None when all have one length
    position: Tensor  # [tokens]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Ragged:
        longest = max(lengths)
        position = torch.cat([torch.arange(n) for n in lengths])
        place = None
        if min(lengths) != longest:
            row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            place = (row * longest + position).to(device)
        return cls(tuple(lengths), place, position.to(device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within each sequence; q ``[tokens, heads, head_dim]``. Padding is on the right, where
        causality hides it."""
        rows, longest = len(self.lengths), max(self.lengths)

        def rectangle(x: Tensor) -> Tensor:
            if self.place is not None:
                padded = x.new_zeros(rows * longest, *x.shape[1:])
                padded[self.place] = x
                x = padded
            return x.view(rows, longest, *x.shape[1:]).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            rectangle(q), rectangle(k), rectangle(v), is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        out = out.transpose(1, 2).reshape(rows * longest, -1)
        return out if self.place is None else out[self.place]


class LlamaRunner:
    """A `continuous.Runner` over the weights of a Llama-like model."""

    def __init__(self, module: PreTrainedModel, device: torch.device, ops: Ops, head_dtype: torch.dtype) -> None:
        self.shape = shape_of(module.config)
        model: Any = module.base_model
        self.device, self.dtype, self.ops = device, module.dtype, ops
        head: Any = module.get_output_embeddings()
        self.weights = Weights(
            model.embed_tokens.weight.detach(),
            tuple(_layer(block) for block in model.layers),
            model.norm.weight.detach(),
            Linear(head.weight.detach(), None),
        )
        self._head_source, self._head_dtype = self.weights.head, head_dtype
        self._rotary = model.rotary_emb
        self._step: Step | None = None
        self.cos = self.sin = torch.empty(0)
        self.keys = self.values = torch.empty(0)
        self._limit = 0
        self.lengths: list[int] = []
        self.position = torch.empty(0, dtype=torch.int64, device=device)

    def refresh(self) -> None:
        """Rebuilds what is derived from the weights: a wider head, and what the ops keep."""
        head = Linear(self._head_source.weight.to(self._head_dtype), None)
        self.weights = replace(self.weights, head=head)
        self.ops.refresh([*(linear for layer in self.weights.layers for linear in layer.linears), head])
        self._step = self.ops.whole_step(self.weights, self.shape)

    def _tables(self, length: int) -> None:
        """Rotary tables for positions below `length`, from the module's own embedding."""
        if len(self.cos) < length:
            position = torch.arange(length, device=self.device)[None]
            cos, sin = self._rotary(self.weights.embedding[:1], position)
            self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()

    # --- the cache: [layers, rows, kv_heads, capacity, head_dim], of which rows [0, n) are in use

    def experts(self, row: int) -> None:
        """A Llama-like model has none."""

    def reserve(self, rows: int, length: int, experts: bool = False) -> None:
        self._limit = length
        self.lengths = []
        self.position = torch.empty(0, dtype=torch.int64, device=self.device)
        self._tables(length)
        if self.keys.ndim != 5 or self.keys.shape[1] < rows:
            self.keys = self.values = torch.empty(0)
            self._capacity(rows, min(length, FIRST_CAPACITY))
        elif self.ops.reads_ahead:
            self._clear(0)

    def _clear(self, start: int) -> None:
        """Positions that a row has not reached are masked, but NaN left over in memory would survive a mask."""
        self.keys[:, :, :, start:] = 0
        self.values[:, :, :, start:] = 0

    def _capacity(self, rows: int, length: int) -> None:
        """Room for rows of `length` tokens; what is there stays. It grows with the sequences, not with their limit."""
        shape, used = self.shape, max(self.lengths, default=0)
        length = -(-length // 16) * 16
        old = self.keys, self.values
        size = (len(self.weights.layers), rows, shape.kv_heads, length, shape.head_dim)
        self.keys, self.values = (self.ops.cache(size, self.dtype, self.device) for _ in old)
        if used:
            n = len(self.lengths)
            for new, before in zip((self.keys, self.values), old, strict=True):
                new[:, :n, :, :used] = before[:, :n, :, :used]
        if self.ops.reads_ahead:
            self._clear(used)

    def _make_room(self, length: int) -> None:
        if length > self.keys.shape[3]:
            self._capacity(self.keys.shape[1], max(length, min(self._limit, 2 * length)))

    def admit(self, prefilled: Sequence[tuple[Any, int]]) -> None:
        self._make_room(max(own[0].shape[2] for own, _ in prefilled))
        for (keys, values), copies in prefilled:
            rows, length = slice(len(self.lengths), len(self.lengths) + copies), keys.shape[2]
            self.keys[:, rows, :, :length] = keys[:, None]
            self.values[:, rows, :, :length] = values[:, None]
            self.lengths += [length] * copies
        self.position = torch.tensor(self.lengths, device=self.device)

    def keep(self, rows: Sequence[int]) -> None:
        for to, row in enumerate(rows):
            if to != row:
                length = self.lengths[row]
                self.keys[:, to, :, :length] = self.keys[:, row, :, :length]
                self.values[:, to, :, :length] = self.values[:, row, :, :length]
        self.lengths = [self.lengths[row] for row in rows]
        self.position = torch.tensor(self.lengths, dtype=torch.int64, device=self.device)

    # --- forward passes

    def _blocks(self, x: Tensor, position: Tensor, attend: Any) -> Tensor:
        """The whole stack over token rows; ``attend(i, qkv)`` is what decode and prefill differ in."""
        ops, eps = self.ops, self.shape.eps
        norms = [layer.norm1 for layer in self.weights.layers[1:]] + [self.weights.norm]
        h = ops.norm(x, self.weights.layers[0].norm1, eps)
        for i, (layer, norm) in enumerate(zip(self.weights.layers, norms, strict=True)):
            qkv = ops.linear(h, layer.qkv)
            ops.rotate(qkv, layer, self.shape, self.cos, self.sin, position)
            x, h = ops.add_norm(x, ops.linear(attend(i, qkv), layer.out), layer.norm2, eps)
            mlp = ops.linear(ops.silu_mul(ops.linear(h, layer.gate_up)), layer.down)
            x, h = ops.add_norm(x, mlp, norm, eps)
        return h

    def decode(self, tokens: Tensor) -> Tensor:
        longest = max(self.lengths)
        self._make_room(longest + 1)

        def attend(i: int, qkv: Tensor) -> Tensor:
            return self.ops.attend(qkv, self.keys[i], self.values[i], self.shape, self.position, longest)

        logits = None
        if self._step is not None:
            logits = self._step(tokens, self.position, self.cos, self.sin, self.keys, self.values)
        if logits is None:
            logits = self._logits(self._blocks(self.weights.embedding[tokens], self.position, attend))
        self.position += 1
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def _logits(self, h: Tensor) -> Tensor:
        return self.ops.linear(h.to(self._head_dtype), self.weights.head)

    def _packed(self, sequences: Sequence[Sequence[int]], attend: Any = None) -> tuple[Tensor, Ragged]:
        """Last hidden states ``[tokens, d]`` of sequences run side by side; ``keep(i, k, v)`` sees keys and values."""
        ragged = Ragged.of([len(s) for s in sequences], self.device)
        self._tables(max(ragged.lengths))
        ids = torch.tensor([i for s in sequences for i in s], device=self.device)
        heads = (self.shape.heads, self.shape.kv_heads, self.shape.kv_heads)

        def causal(i: int, qkv: Tensor) -> Tensor:
            q, k, v = qkv.view(len(qkv), -1, self.shape.head_dim).split(heads, 1)
            if attend is not None:
                attend(i, k, v)
            return ragged.attend(q, k, v)

        return self._blocks(self.weights.embedding[ids], ragged.position, causal), ragged

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[Any, Tensor]]:
        shape, tokens = self.shape, sum(map(len, prompts))
        size = (len(self.weights.layers), shape.kv_heads, tokens, shape.head_dim)
        keys = torch.empty(size, dtype=self.dtype, device=self.device)
        values = torch.empty_like(keys)

        def keep(i: int, k: Tensor, v: Tensor) -> None:
            keys[i], values[i] = k.transpose(0, 1), v.transpose(0, 1)

        h, ragged = self._packed(prompts, keep)
        ends = torch.tensor(ragged.lengths, device=self.device).cumsum(0)
        logits = self._logits(h[ends - 1])
        own = zip(keys.split(ragged.lengths, 2), values.split(ragged.lengths, 2), strict=True)
        return [(kv, logits[i : i + 1]) for i, kv in enumerate(own)]

    def response_logits(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of (row ``[m]``, place in the response ``[m]``, logits ``[m, V]``) over (prompt, response) pairs."""
        # The last token predicts nothing that is asked for.
        h, ragged = self._packed([[*p, *r][:-1] for p, r in sequences])
        row = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(ragged.lengths))
        first = torch.tensor([len(p) for p, _ in sequences]) - 1
        place = ragged.position.cpu() - first[row]
        wanted = (place >= 0).nonzero()[:, 0]
        for part in wanted.split(max(1, LOGITS_AT_ONCE // len(self.weights.embedding))):
            yield row[part], place[part], self._logits(h[part.to(self.device)])
