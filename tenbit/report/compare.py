"""Formats side by side on the same weights: a table, and bars on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tenbit.report.axis import log10
from tenbit.report.svg import group, path, tag
from tenbit.report.words import factor, number, precise_percent, scientific, whole

_MEASURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("kl_k3", "KL(μ‖π), k3", scientific),
    ("kl_k1", "KL(μ‖π), k1", scientific),
    ("logp_abs_mean", "|log π − log μ|, mean", scientific),
    ("logp_abs_max", "|log π − log μ|, max", scientific),
    ("prob_diff_abs_mean", "|π − μ|, mean", scientific),
    ("prob_diff_max", "π − μ, largest", scientific),
    ("outside_tenth", "tokens beyond ±10%", precise_percent),
    ("outside_half", "tokens beyond 2×", precise_percent),
    ("seq_logratio_mean", "Σ log(π/μ), mean", scientific),
    ("seq_logratio_std", "Σ log(π/μ), std", scientific),
    ("seq_ess", "effective sample size", precise_percent),
    ("tokens", "tokens", whole),
    ("sequences", "sequences", whole),
)
_PICTURED = ("kl_k3", "logp_abs_mean", "seq_logratio_std")
_SIZES = ("kl_k3", "logp_abs_mean", "logp_abs_max", "prob_diff_abs_mean", "prob_diff_max", "seq_logratio_std")


@dataclass(frozen=True)
class Comparison:
    """`formats` head the columns; `rows` are (measure, a value a format, BF16 over FP16)."""

    formats: list[str]
    rows: list[tuple[str, list[str], str]]
    picture: Markup

    @property
    def has_ratio(self) -> bool:
        return any(ratio for _, _, ratio in self.rows)


def compare(table: Sequence[dict[str, Any]]) -> Comparison | None:
    if not table:
        return None
    formats = [str(row["precision"]) for row in table]
    by_format = dict(zip(formats, table, strict=True))
    rows = []
    for key, label, show in _MEASURES:
        values = [_number(row.get(key)) for row in table]
        if any(v is not None for v in values):
            low, high = (_number(by_format.get(f, {}).get(key)) for f in ("fp16", "bf16"))
            ratio = f"{factor(high / low)}×" if key in _SIZES and low and high and high / low > 0 else ""
            rows.append((label, ["–" if v is None else show(v) for v in values], ratio))
    return Comparison(formats, rows, bars(table, formats))


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def bars(table: Sequence[dict[str, Any]], formats: Sequence[str]) -> Markup:
    """One group of bars a measure, on one logarithmic axis: each decade is the same width."""
    labels = {key: label for key, label, _ in _MEASURES}
    found = {key: [_number(row.get(key)) for row in table] for key in _PICTURED}
    found = {key: values for key, values in found.items() if any(values)}
    axis = log10([v for values in found.values() for v in values if v], target=5)
    left, right, top, bar = 46.0, 330.0, 8.0, 13.0
    height = top + len(found) * (22 + len(table) * (bar + 3) + 8)

    def x(unit: float) -> float:
        return left + (unit - axis.low) / (axis.high - axis.low) * (right - left)

    parts = []
    for unit, label in axis.ticks:
        parts.append(tag("path", d=path([(x(unit), top), (x(unit), height)]), class_="grid"))
        parts.append(tag("text", label, x=x(unit), y=height + 14, class_="tick", text_anchor="middle"))
    y, words = top, []
    for key, values in found.items():
        parts.append(tag("text", labels[key], x=left + 4, y=y + 13, class_="heading plate"))
        y += 20
        for name, value in zip(formats, values, strict=True):
            colour = f"c-{name}" if name in ("fp16", "bf16", "fp32") else "c-plain"
            parts.append(tag("text", name, x=left - 6, y=y + bar - 3, class_=f"name {colour}", text_anchor="end"))
            at = None if value is None else axis.at(value)
            if value and at is not None:
                length = at * (right - left)
                parts.append(tag("rect", x=left, y=y, width=length, height=bar, class_=f"area {colour}"))
                shown = scientific(value)
                parts.append(tag("text", shown, x=left + length + 5, y=y + bar - 3, class_="tick plate"))
                words.append(f"{labels[key]}: {name} {number(value)}.")
            y += bar + 3
        y += 10
    return tag(
        "svg",
        tag("title", "Mismatch by format, logarithmic axis", id="bars-t"),
        tag("desc", " ".join(words), id="bars-d"),
        group(parts),
        viewBox=f"0 0 380 {height + 20:.0f}",
        role="img",
        aria_labelledby="bars-t bars-d",
    )
