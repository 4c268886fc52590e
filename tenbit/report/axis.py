"""Axes: from a range of values to positions between 0 and 1, and to ticks a person would have chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tenbit.report.words import superscript

_LARGEST, _SMALLEST = 1e300, 1e-300  # spans stay finite, and steps stay above the smallest double


@dataclass(frozen=True)
class Axis:
    """`low` and `high` are in axis units: the value itself, or its logarithm on a logarithmic axis.

    On a logarithmic axis values that are zero (or a rounding below it) have a place of their own at the bottom,
    marked 0, if `has_zero`; otherwise they are off the axis.
    """

    kind: Literal["linear", "log10", "log2"]
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    minor: tuple[float, ...] = ()
    has_zero: bool = False
    unit: str = ""  # a power of ten that all tick labels are multiplied by

    def at(self, value: float) -> float | None:
        """Where a value lies, 0 at the bottom to 1 at the top; None if it has no place."""
        if self.kind == "linear":
            unit = value
        elif value <= _SMALLEST:
            return 0.0 if self.has_zero else None
        else:
            unit = math.log2(value) if self.kind == "log2" else math.log10(value)
        return min(1.0, max(0.0, (unit - self.low) / (self.high - self.low)))


def _finite(values: Iterable[float | None]) -> list[float]:
    known = (min(_LARGEST, max(-_LARGEST, v)) for v in values if v is not None and math.isfinite(v))
    return [v if abs(v) > _SMALLEST else 0.0 for v in known]


def _nice(span: float, target: int) -> float:
    """The step among 1, 2, 2.5, 5 times a power of ten that cuts `span` into about `target` parts."""
    raw = span / target
    power = 10.0 ** math.floor(math.log10(raw))
    return next((m * power for m in (1, 2, 2.5, 5) if m * power >= raw * 0.999), 10 * power)


def _label(value: float, step: float) -> str:
    if value == 0 or abs(value) < step * 1e-9:
        return "0"
    if abs(value) >= 10_000 and step >= 100:
        return f"{value / 1000:,.1f}".removesuffix(".0").replace("-", "−") + "k"
    decimals = next(d for d in range(7) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * step * 10**d or d == 6)
    return f"{value:,.{decimals}f}".replace("-", "−")


def linear(
    values: Iterable[float | None],
    *,
    low: float | None = None,
    high: float | None = None,
    target: int = 4,
    as_percent: bool = False,
) -> Axis:
    """A linear axis over the values; `low` and `high` are included whatever the values are."""
    found = _finite(values) + [v for v in (low, high) if v is not None]
    bottom, top = (min(found), max(found)) if found else (0.0, 1.0)
    if top - bottom <= 1e-9 * max(abs(top), abs(bottom)):  # constant, up to rounding
        if bottom == 0:
            top = 1.0
        else:
            pad = abs(bottom) / 2
            bottom, top = bottom - pad, top + pad
    elif 0 < bottom < 0.5 * top:
        bottom = 0.0
    step = _nice(top - bottom, target)
    first, last = math.floor(bottom / step + 1e-9), math.ceil(top / step - 1e-9)
    size = max(abs(first), abs(last)) * step
    if as_percent and size < 1e4:
        at = [(k * step, _label(k * step * 100, step * 100) + "%") for k in range(first, last + 1)]
        return Axis("linear", first * step, last * step, tuple(at))
    power = math.floor(math.log10(size)) if size >= 1e7 or size < 2e-3 else 0
    parts = step / 10.0**power
    at = [(k * step, _label(k * parts, parts)) for k in range(first, last + 1)]
    return Axis("linear", first * step, last * step, tuple(at), unit=f"×10{superscript(power)}" if power else "")


def log10(values: Iterable[float | None], target: int = 4) -> Axis:
    """Whole decades around the positive values."""
    found = _finite(values)
    positive = [v for v in found if v > 0]
    has_zero = len(positive) < len(found)
    if not positive:
        return Axis("log10", 0.0, 1.0, ((0.0, "0"),), has_zero=True) if found else Axis("log10", 0.0, 1.0, ())
    low = math.floor(math.log10(min(positive)) + 1e-9)
    high = math.ceil(math.log10(max(positive)) - 1e-9)
    high = max(high, low + 1)
    every = math.ceil((high - low) / target)
    decades = [k for k in range(low, high + 1) if (k - low) % every == 0]
    ticks = [(float(k), f"10{superscript(k)}" if k not in (0, 1) else str(10**k)) for k in decades]
    minor = ()
    if high - low <= 3:
        minor = tuple(k + math.log10(m) for k in range(low, high) for m in range(2, 10))
    if has_zero:
        low -= 1
        ticks.insert(0, (float(low), "0"))
    return Axis("log10", float(low), float(high), tuple(ticks), minor, has_zero)


def log2(values: Iterable[float | None], target: int = 4) -> Axis:
    """Powers of two around the positive values."""
    positive = [v for v in _finite(values) if v > 0] or [1.0]
    low = math.floor(math.log2(min(positive)) + 1e-9)
    high = math.ceil(math.log2(max(positive)) - 1e-9)
    if high - low < 2:
        low, high = low - 1, max(high + 1, low + 1)
    every = math.ceil((high - low) / target)
    ticks = tuple((float(k), f"2{superscript(k)}") for k in range(low, high + 1, every))
    return Axis("log2", float(low), float(high), ticks)


def steps(first: int, last: int, target: int = 5) -> Axis:
    """The axis of steps: whole numbers only."""
    if first == last:
        return Axis("linear", first - 1.0, first + 1.0, ((float(first), f"{first:,}"),))
    every = max(1, math.ceil(_nice(last - first, target) - 1e-9))
    ticks = [k for k in range(math.ceil(first / every) * every, last + 1, every)]
    if first == 1 and 0 not in ticks:
        ticks = [1, *(k for k in ticks if k > 1 + every // 3)]
    return Axis("linear", float(first), float(last), tuple((float(k), f"{k:,}") for k in ticks))
