"""The operations of a Llama-like block for training on CPUs with AVX-512, as autograd functions.

    product, linears, add_norm, silu_mul, attention         what `fused.py` builds a decoder layer from

Everything works on rows: [n, d] for n = batch * length tokens. Forward, values are rounded to the format where the
library's modules round them. Backward, arithmetic is FP32 and a gradient is rounded once, when it is stored;
attention's runs in FP32 too, for which torch is several times faster than in 16 bits. Sums are taken in an order that
depends on shapes only, so a run repeats bit for bit. The kernels are in `kernels.cpp` and, for matrix products of FP16
numbers on AMX tiles, `gemm.cpp`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tenbit.native import AMX, cpu_flags, load_library, may_use_tiles
from tenbit.precision import Format

log = logging.getLogger(__name__)

MAX_HEAD_DIM = 512
_CODES = {Format.FP32: 0, Format.FP16: 1, Format.BF16: 2}
DTYPES = {f.dtype: code for f, code in _CODES.items()}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had (`tenbit.native.load_library`)."""
    here = Path(__file__).parent
    amx = cpu_flags() >= AMX
    try:
        lib = load_library("training", [here / "kernels.cpp", *([here / "gemm.cpp"] if amx else [])])
    except OSError as error:
        log.info("training computes with the library's own modules: %s", error)
        return None
    p, n, i, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    signatures = {
        "tb_add_norm": [i, p, p, p, p, p, p, n, n, f],
        "tb_norm_grad": [i, p, p, p, p, p, p, p, n, n],
        "tb_rotate": [i, p, p, p, p, f, p, p, p, p, n],
        "tb_rotate_grad": [i, p, p, p, p, p, p, p, p, p, p, p, p, p, n],
        "tb_silu_mul": [i, p, p, n, n],
        "tb_silu_mul_grad": [i, p, p, p, n, n],
        "tb_row_sum": [i, p, p, n, n],
    }
    if amx:
        signatures["tb_product"] = [i, p, n, n, p, n, n, p, p, n, n, n]
    for name, arguments in signatures.items():
        getattr(lib, name).argtypes = arguments
        getattr(lib, name).restype = None
    return lib


def _kernels() -> ctypes.CDLL:
    lib = library()
    assert lib is not None
    return lib


@functools.cache
def _has_tiles() -> bool:
    lib = library()
    return lib is not None and hasattr(lib, "tb_product") and may_use_tiles()


def _code(tensor: Tensor) -> int:
    return DTYPES[tensor.dtype]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _like(tensor: Tensor | None, wanted: bool) -> Tensor | None:
    return torch.empty_like(tensor) if tensor is not None and wanted else None


# ---- products


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [m, k] times b [k, n], plus bias [n]; each operand contiguous or the transpose of something contiguous.

    Sums are FP32. What torch does as fast, BF16 but for the gradient of a weight, is left to torch.
    """
    form = Format.of(a.dtype)
    worth = a.device.type == "cpu" and (form == Format.FP16 or (form == Format.BF16 and a.stride(1) != 1))
    if not (worth and _has_tiles()):
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    (m, k), n = a.shape, b.shape[1]
    out = a.new_empty(m, n)
    _kernels().tb_product(
        _code(a),
        a.data_ptr(),
        *a.stride(),
        b.data_ptr(),
        *b.stride(),
        _pointer(bias),
        out.data_ptr(),
        m,
        n,
        k,
    )
    return out


def _row_sum(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[1])
    _kernels().tb_row_sum(_code(x), x.data_ptr(), out.data_ptr(), *x.shape)
    return out


class _Linears(Function):
    """x [n, k] through linear layers side by side: [n, out_1 + out_2 + ...]. Arguments: x, weights, then biases."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor | None):
        weights, biases = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        ctx.save_for_backward(x, *weights)
        ctx.sizes = [len(w) for w in weights if w is not None]
        return product(x, _stack(weights).T, None if biases[0] is None else _stack(biases))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *weights = ctx.saved_tensors
        g = grads[0].contiguous()
        need, count = ctx.needs_input_grad, len(weights)
        dx = product(g, _stack(weights)) if need[0] else None
        dw, db = [None] * count, [None] * count
        if any(need[1 : 1 + count]):
            dw = product(g.T, x).split(ctx.sizes)
        if any(need[1 + count :]):
            db = _row_sum(g).split(ctx.sizes)
        found = (d if wanted else None for d, wanted in zip((*dw, *db), need[1:], strict=True))
        return dx, *found


def _stack(tensors: Any) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


# ---- between products


class _AddNorm(Function):
    """(x + y, RMSNorm of it), or (x, RMSNorm of x) where y is None. Rows [n, d].

    The first result carries the residual stream on: its gradient and that of the norm are added in one pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, eps: float):
        n, d = x.shape
        total = x if y is None else torch.empty_like(x)
        out, inverse = torch.empty_like(x), torch.empty(n)
        _kernels().tb_add_norm(
            _code(x),
            x.data_ptr(),
            _pointer(y),
            weight.data_ptr(),
            total.data_ptr(),
            out.data_ptr(),
            inverse.data_ptr(),
            n,
            d,
            eps,
        )
        ctx.save_for_backward(total, weight, inverse)
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = ctx.saved_tensors
        carried, g = (None if grad is None else grad.contiguous() for grad in grads)
        if g is None:
            return carried, carried if ctx.needs_input_grad[1] else None, None, None
        dx, dweight = torch.empty_like(x), _like(weight, ctx.needs_input_grad[2])
        _kernels().tb_norm_grad(
            _code(x),
            g.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            _pointer(carried),
            inverse.data_ptr(),
            dx.data_ptr(),
            _pointer(dweight),
            *x.shape,
        )
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, None


class _SiluMul(Function):
    """Rows [gate, up] -> silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor):
        n, width = gate_up.shape
        out = gate_up.new_empty(n, width // 2)
        _kernels().tb_silu_mul(_code(gate_up), gate_up.data_ptr(), out.data_ptr(), n, width // 2)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_up,), g = ctx.saved_tensors, grads[0].contiguous()
        out = torch.empty_like(gate_up)
        _kernels().tb_silu_mul_grad(_code(g), g.data_ptr(), gate_up.data_ptr(), out.data_ptr(), *g.shape)
        return out


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention layer and of its input."""

    batch: int
    length: int
    queries: int
    keys: int
    dim: int
    scale: float
    eps: float

    def by_head(self, rows: Tensor) -> Tensor:
        """[batch * length, heads * dim] -> [batch, heads, length, dim], a view."""
        return rows.unflatten(-1, (-1, self.dim)).unflatten(0, (self.batch, self.length)).transpose(1, 2)

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows [q, k, v], or [q, k], by part."""
        sizes = [self.queries * self.dim, self.keys * self.dim, self.keys * self.dim]
        return rows.split(sizes[: 3 if rows.shape[1] == sum(sizes) else 2], dim=-1)

    def kernel_sizes(self, cos: Tensor) -> Any:
        per_row = cos.shape[0] > 1
        return (ctypes.c_int64 * 5)(self.queries, self.keys, self.dim, self.length, per_row)


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, of: Heads
) -> tuple[Tensor, Tensor | None]:
    """Rows [q, k, v] -> rows [q, k] as attention takes them, and 1 / rms of each head where there are norms."""
    turned_heads = of.queries + of.keys
    turned = qkv.new_empty(len(qkv), turned_heads * of.dim)
    inverse = torch.empty(len(qkv), turned_heads) if q_norm is not None else None
    _kernels().tb_rotate(
        _code(qkv),
        qkv.data_ptr(),
        of.kernel_sizes(cos),
        _pointer(q_norm),
        _pointer(k_norm),
        of.eps,
        cos.data_ptr(),
        sin.data_ptr(),
        turned.data_ptr(),
        _pointer(inverse),
        len(qkv),
    )
    return turned, inverse


class _Attention(Function):
    """Causal attention from rows [q, k, v] to rows [n, queries * dim], with rotation and, if given, norms per head."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, of: Heads
    ):
        turned, inverse = rotate(qkv, cos, sin, q_norm, k_norm, of)
        q, k = of.parts(turned)
        q, k, v = of.by_head(q), of.by_head(k), of.by_head(of.parts(qkv)[2])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=of.scale)
        out = out.transpose(1, 2).reshape(len(qkv), -1)
        ctx.save_for_backward(qkv, turned, out, lse, inverse, cos, sin, q_norm, k_norm)
        ctx.of = of
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        qkv, turned, out, lse, inverse, cos, sin, q_norm, k_norm = ctx.saved_tensors
        of: Heads = ctx.of
        q, k = of.parts(turned)
        full = [of.by_head(x).float() for x in (grads[0], q, k, of.parts(qkv)[2], out)]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *full, lse, 0.0, True, scale=of.scale
        )
        dq, dk, dv = (d.transpose(1, 2).contiguous() for d in found)
        dqkv = torch.empty_like(qkv)
        dq_norm, dk_norm = _like(q_norm, ctx.needs_input_grad[3]), _like(k_norm, ctx.needs_input_grad[4])
        _kernels().tb_rotate_grad(
            _code(qkv),
            dq.data_ptr(),
            dk.data_ptr(),
            dv.data_ptr(),
            qkv.data_ptr(),
            of.kernel_sizes(cos),
            _pointer(q_norm),
            _pointer(k_norm),
            _pointer(inverse),
            cos.data_ptr(),
            sin.data_ptr(),
            dqkv.data_ptr(),
            _pointer(dq_norm),
            _pointer(dk_norm),
            len(qkv),
        )
        return dqkv, None, None, dq_norm, dk_norm, None


linears = _Linears.apply
add_norm = _AddNorm.apply
silu_mul = _SiluMul.apply
attention = _Attention.apply
