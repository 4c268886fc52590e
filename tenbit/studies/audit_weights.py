"""What a cast does to a model's weights, tensor by tensor: overflow, underflow, and the relative error of the rest.

    for found in measure_weights(module.named_parameters(), Format.FP16): ...

All numbers are those of `Format`, so any format can be asked for. Rounding to nearest moves a normal number by at most
u = epsilon / 2 of itself. So the root mean square error of a tensor, relative to its norm, is below u as long as what
counts in it is in the normal range: `Weight.lossy` is the proof that it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenbit.precision import Format

CHUNK = 1 << 24  # elements that are cast at a time


@dataclass(frozen=True)
class Weight:
    """One tensor. Errors are over the values that neither were infinite nor became so."""

    name: str
    shape: tuple[int, ...]
    format: str
    count: int
    largest: float  # |w|
    smallest: float  # |w| above zero; inf where all are zero
    not_finite: int  # inf or NaN before the cast
    overflowed: int  # finite before, inf after
    flushed: int  # not zero before, zero after
    subnormal: int  # after
    worst_error: float  # largest |cast(w) - w| / |w|
    rms_error: float  # norm of cast(w) - w over the norm of w
    unit: float  # epsilon / 2 of the format
    harmless: bool = False  # lossy, but the model computes the same with it as it was cast

    @property
    def fits(self) -> bool:
        return not self.not_finite and not self.overflowed

    @property
    def lossy(self) -> bool:
        """More is lost than rounding of normal numbers can lose: values that count are subnormal or flushed."""
        return self.rms_error > self.unit

    def as_dict(self) -> dict[str, Any]:
        small = None if math.isinf(self.smallest) else self.smallest
        return vars(self) | {"shape": list(self.shape), "smallest": small, "fits": self.fits, "lossy": self.lossy}


def measure_weights(named: Iterable[tuple[str, Tensor]], format: Format) -> Iterator[Weight]:
    """A row for each floating-point tensor, in order. One tensor is looked at at a time, in pieces."""
    for name, tensor in named:
        if tensor.is_floating_point():
            yield measure_weight(name, tensor, format)


@torch.no_grad()
def measure_weight(name: str, tensor: Tensor, format: Format) -> Weight:
    largest, smallest, worst = 0.0, math.inf, 0.0
    not_finite = overflowed = flushed = subnormal = 0
    lost = norm = 0.0
    for part in tensor.detach().reshape(-1).split(CHUNK):
        w = part.double()
        cast = part.to(format.dtype).double()
        finite = w.isfinite()
        not_finite += int((~finite).sum())
        overflowed += int((finite & ~cast.isfinite()).sum())
        size = w[finite].abs()
        if not size.numel():
            continue
        largest = max(largest, float(size.max()))
        some = size[size > 0]
        smallest = min(smallest, float(some.min())) if some.numel() else smallest
        flushed += int(((cast == 0) & (w != 0)).sum())
        subnormal += int(((cast != 0) & (cast.abs() < format.smallest_normal)).sum())
        both = finite & cast.isfinite() & (w != 0)
        error, kept = (cast[both] - w[both]).abs(), w[both].abs()
        if error.numel():
            worst = max(worst, float((error / kept).max()))
            lost, norm = lost + float(error.square().sum()), norm + float(kept.square().sum())
    rms = math.sqrt(lost / norm) if norm else 0.0
    return Weight(
        name, tuple(tensor.shape), format.value, tensor.numel(), largest, smallest, not_finite, overflowed, flushed,
        subnormal, worst, rms, format.epsilon / 2,
    )  # fmt: skip
