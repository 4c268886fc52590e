"""The building blocks of `ops.py` and the drawing of tokens as compiled kernels, for CPUs with AVX-512.

`compiled.py` compiles and loads them. Sums are in FP32 and rounding is where `PlainOps` rounds, so the two differ by
the order of additions only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tenbit.engines import sampling as sampler
from tenbit.engines.compiled import has_amx, library
from tenbit.engines.ops import Layer, Linear, Shape, Step, Weights
from tenbit.precision import Format
from tenbit.types import Sampling

# Fewer rows than this are multiplied by torch.
FEW_ROWS = 5
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
_CODES = {Format.FP32: 0, Format.FP16: 1, Format.BF16: 2}


def fits(shape: Shape, hidden: int, intermediate: int) -> bool:
    """Whether a model's sizes are ones that the kernels handle."""
    return shape.head_dim in HEAD_DIMS and hidden % 16 == 0 and intermediate % 16 == 0


def _code(tensor: Tensor) -> int:
    return _CODES[Format.of(tensor.dtype)]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _LinearStruct(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_int64),
        ("in_", ctypes.c_int64),
    )


class _LayerStruct(ctypes.Structure):
    _fields_ = (
        *((name, _LinearStruct) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm1", "q_norm", "k_norm", "norm2")),
    )


class _ModelStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "heads", "kv_heads", "head_dim")),
        ("layer", ctypes.POINTER(_LayerStruct)),
        ("head", _LinearStruct),
        ("embedding", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("dtype", ctypes.c_int),
    )


class NativeOps:
    """`ops.Ops` by the kernels, on the CPU.

    Products of 16-bit weights go to AMX tiles where there are some; for that the weights are kept a second time, in
    the tiles' order, packed anew by each load. Products of few rows, of FP32, and without AMX stay with torch.
    """

    reads_ahead = False

    def __init__(self) -> None:
        lib = library()
        assert lib is not None
        self._lib = lib
        self._packed: dict[int, Tensor] = {}

    def cache(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        memory = torch.empty(size, dtype=dtype, device=device)
        self._lib.tb_large_pages(memory.data_ptr(), memory.numel() * memory.element_size())
        return memory

    def refresh(self, linears: Sequence[Linear]) -> None:
        old, self._packed = self._packed, {}
        for linear in linears:
            weight = linear.weight
            out, k = weight.shape
            if not has_amx() or Format.of(weight.dtype) == Format.FP32 or k % 32:
                continue
            size = -(-out // 32) * 32 * k
            packed = old.get(weight.data_ptr())
            if packed is None or packed.numel() != size:
                packed = torch.empty(size, dtype=torch.int16)
            self._lib.tb_pack(weight.data_ptr(), out, k, packed.data_ptr())
            self._packed[weight.data_ptr()] = packed

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        weight = linear.weight
        packed = self._packed.get(weight.data_ptr())
        if packed is None or len(x) < FEW_ROWS:
            return F.linear(x, weight, linear.bias)
        x = x.contiguous()
        out = x.new_empty(len(x), len(weight))
        self._lib.tb_linear(
            _code(x),
            x.data_ptr(),
            len(x),
            weight.shape[1],
            packed.data_ptr(),
            _pointer(linear.bias),
            len(weight),
            out.data_ptr(),
        )
        return out

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        self._lib.tb_add_norm(_code(x), x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), len(x), x.shape[1], eps)
        return out

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(x)
        self._lib.tb_add_norm(
            _code(x), x.data_ptr(), y.data_ptr(), weight.data_ptr(), out.data_ptr(), len(x), x.shape[1], eps
        )
        return x, out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        n, width = gate_up.shape
        out = gate_up.new_empty(n, width // 2)
        self._lib.tb_silu_mul(_code(gate_up), gate_up.data_ptr(), out.data_ptr(), n, width // 2)
        return out

    def rotate(self, qkv: Tensor, layer: Layer, shape: Shape, cos: Tensor, sin: Tensor, position: Tensor) -> None:
        self._lib.tb_rotate(
            _code(qkv),
            qkv.data_ptr(),
            len(qkv),
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            _pointer(layer.q_norm),
            _pointer(layer.k_norm),
            shape.eps,
            cos.data_ptr(),
            sin.data_ptr(),
            position.data_ptr(),
        )

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor, shape: Shape, position: Tensor, longest: int) -> Tensor:
        out = qkv.new_empty(len(qkv), shape.heads * shape.head_dim)
        failed = self._lib.tb_attend(
            _code(qkv),
            qkv.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            position.data_ptr(),
            out.data_ptr(),
            len(qkv),
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            keys.shape[2],
        )
        assert not failed
        return out

    def whole_step(self, weights: Weights, shape: Shape) -> Step | None:
        """A whole decode step in one call, where every product can go to the tiles."""
        linears = [weights.head, *(linear for layer in weights.layers for linear in layer.linears)]
        if any(linear.weight.data_ptr() not in self._packed for linear in linears):
            return None
        model = self._describe(weights, shape)
        hidden, first = weights.embedding.shape[1], weights.layers[0]
        per_row = 2 * hidden + len(first.qkv.weight) + first.out.weight.shape[1] + 3 * first.down.weight.shape[1]

        def step(
            tokens: Tensor, position: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
        ) -> Tensor | None:
            n = len(tokens)
            if n < FEW_ROWS:
                return None
            tokens = tokens.contiguous()
            scratch = keys.new_empty(n, per_row)
            logits = keys.new_empty(n, len(weights.head.weight))
            tables = (cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr())
            self._lib.tb_step(
                ctypes.addressof(model),
                tokens.data_ptr(),
                position.data_ptr(),
                n,
                *tables,
                keys.shape[1],
                keys.shape[3],
                scratch.data_ptr(),
                logits.data_ptr(),
            )
            return logits

        return step

    def _describe(self, weights: Weights, shape: Shape) -> _ModelStruct:
        """The model as step.cpp has it. It holds addresses only; the tensors live in `weights` and `_packed`."""

        def linear(of: Linear) -> _LinearStruct:
            packed = self._packed[of.weight.data_ptr()]
            return _LinearStruct(packed.data_ptr(), _pointer(of.bias), *of.weight.shape)

        layers = (_LayerStruct * len(weights.layers))()
        for struct, layer in zip(layers, weights.layers, strict=True):
            for name in ("qkv", "out", "gate_up", "down"):
                setattr(struct, name, linear(getattr(layer, name)))
            for name in ("norm1", "q_norm", "k_norm", "norm2"):
                setattr(struct, name, _pointer(getattr(layer, name)))
        return _ModelStruct(
            len(layers),
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            layers,
            linear(weights.head),
            weights.embedding.data_ptr(),
            weights.norm.data_ptr(),
            shape.eps,
            _code(weights.embedding),
        )

    def draw(self, logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """As `sampling.draw`, which also does what the kernel does not: truncation and temperature 0."""
        if sampling.truncated or sampling.temperature == 0.0:
            return sampler.draw(logits, uniform, sampling)
        logits, uniform = logits.contiguous(), uniform.contiguous()
        n, vocabulary = logits.shape
        tokens = torch.empty(n, dtype=torch.int64)
        logp = torch.empty(n)
        self._lib.tb_draw(
            _code(logits),
            logits.data_ptr(),
            uniform.data_ptr(),
            sampling.temperature,
            n,
            vocabulary,
            tokens.data_ptr(),
            logp.data_ptr(),
        )
        return tokens, logp
