"""Numbers as people read them."""

from __future__ import annotations

import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def superscript(exponent: int) -> str:
    return str(exponent).translate(_SUPERSCRIPT)


def scientific(value: float, digits: int = 2) -> str:
    """``3.3·10⁻⁶``"""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}·10{superscript(int(exponent))}".replace("-", "−")


def number(value: float) -> str:
    """Three significant digits, without an exponent where it reads well without."""
    size = abs(value)
    if size == 0:
        return "0"
    if not math.isfinite(size):  # a sum of finite numbers may overflow
        return "∞" if value > 0 else "−∞"
    if size >= 1e7 or size < 1e-3:
        return scientific(value, 3)
    decimals = max(0, 2 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def whole(value: float) -> str:
    return f"{value:,.0f}".replace("-", "−") if abs(value) < 1e9 else number(value)


def percent(value: float, decimals: int = 1) -> str:
    return f"{value:.{decimals}%}".replace("-", "−") if abs(value) < 1e6 else number(value)


def precise_percent(value: float) -> str:
    return percent(value, 2)


def power_of_two(value: float) -> str:
    """``2¹⁶``, and the plain number where it is none."""
    fraction, exponent = math.frexp(value)
    return f"2{superscript(exponent - 1)}" if fraction == 0.5 else number(value)


def seconds(value: float) -> str:
    """``32 ms``, ``0.318 s``, ``47 s``, ``12 min 5 s``, ``3 h 20 min``"""
    if 1e-4 < value < 0.1:
        return f"{value * 1000:.3g} ms"
    if value < 60 or value > 1e9:
        return f"{number(value) if value < 10 or value > 1e9 else f'{value:.0f}'} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def factor(ratio: float) -> str:
    """``62``, ``3.14``: how many times as large."""
    return number(ratio) if ratio < 10 else whole(ratio)


def visible(text: str) -> str:
    """Text that HTML can hold: control characters become their pictures, broken characters the replacement mark."""
    shown = (chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)
    return "".join(shown).encode("utf-8", "replace").decode("utf-8")
