"""Weights rounded to a coarser grid than their format's before they are rolled out. Training never sees them.

    to_bits(weight, 4)      half to even, any exponent: what `fp16/fp16~4` rolls out
    to_fp8(weight)          e4m3 with a scale a row, scaled back: what `fp16/fp8` rolls out of linear layers

Both return the format they were given, so that what follows is the plain cast that all weights go through.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUTERS = {"gate", "router", "shared_expert_gate"}
E4M3 = torch.float8_e4m3fn
FP8_SPACING = torch.finfo(E4M3).eps


def to_bits(exact: Tensor, bits: int) -> Tensor:
    """Rounded to `bits` mantissa bits, half to even, whatever the exponent."""
    mantissa, exponent = torch.frexp(exact)  # 0.5 <= |mantissa| < 1
    unit = 2.0 ** (bits + 1)
    return torch.ldexp(torch.round(mantissa * unit) / unit, exponent)


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether a weight of this name is a linear layer's or an expert's: what engines that quantise take to FP8.

    They leave alone what is outside the layers (embeddings, head), routers, norms, biases and convolutions.
    """
    parts = name.split(".")
    if not any(part.isdigit() for part in parts) or ROUTERS & set(parts):
        return False
    if tensor.dim() == 3:
        return "experts" in parts
    return tensor.dim() == 2 and parts[-1] == "weight" and "norm" not in parts[-2]


def to_fp8(exact: Tensor) -> Tensor:
    """Rounded to e4m3 after each row of its last dimension is scaled to that format's range, and scaled back."""
    largest = torch.finfo(E4M3).max
    scale = exact.abs().amax(-1, keepdim=True) / largest
    scale = torch.where(scale > 0, scale, 1.0)
    return (exact / scale).clamp(-largest, largest).to(E4M3).to(exact.dtype) * scale
