"""Figure 2 of the paper, by matplotlib: pi against mu token by token, and sequence log-ratios by length.

One panel for each pair of formats. Its upper part has the same axes for all pairs, so that what is small looks small;
under it is what can then no longer be seen: pi - mu in the scatter, and the log-ratios on the pair's own scale. (A
symmetric-logarithmic scale was tried for the latter and tears a bell curve into two heaps.) Every panel exists on
light and on dark paper; colours are those of the page, and every pair is also named in words, so that nothing hangs on
colour alone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tenbit.report.words import factor, scientific
from tenbit.studies.probe import Pair

MOST_POINTS, KEPT_EXTREMES = 20_000, 2_000
MOST_DOTS = 400  # responses drawn one by one in a bucket
FEWEST_FOR_BARS = 5
SAME = 1.5  # two scales this close are one
DPI = 170
WIDTH = 3.6  # inches of one panel
BESIDE = 4  # panels in a row of the file that holds all of them

Draw = Callable[[Sequence[Any], Pair, "Theme", bool], None]


@dataclass(frozen=True)
class Theme:
    name: str
    card: str
    ink: str
    soft: str
    grid: str
    colours: dict[str, str]
    others: str

    def colour(self, pair: Pair) -> str:
        return self.colours.get(pair.name, self.colours.get(pair.train, self.others))


LIGHT = Theme(
    "light", "#ffffff", "#1c1e21", "#5c6168", "#e3e3de",
    {"fp16": "#1d5fb8", "bf16": "#b5490c", "fp32": "#5c6168", "bf16/fp16": "#6d3fb5", "fp16/bf16": "#a8338a",
     "bf16/fp32": "#92620a", "fp16/fp32": "#0f766e"}, "#6d3fb5",
)  # fmt: skip
DARK = Theme(
    "dark", "#191c1f", "#e6e7e8", "#9ba2aa", "#2b2f33",
    {"fp16": "#7fb2f5", "bf16": "#f0995c", "fp32": "#9ba2aa", "bf16/fp16": "#bda0f0", "fp16/bf16": "#e793cf",
     "bf16/fp32": "#dcb25a", "fp16/fp32": "#57c4b5"}, "#bda0f0",
)  # fmt: skip
THEMES = (LIGHT, DARK)


@dataclass(frozen=True)
class Panels:
    """A kind of figure. `draw(axes, pair, theme, first)` puts one pair on axes, one above the other."""

    name: str
    heights: tuple[float, ...]  # inches of the axes
    draw: Draw

    def single(self, pair: Pair, theme: Theme) -> bytes:
        """One panel as a PNG, for a page whose panels flow with its width."""
        return self.together([pair], theme)

    def together(self, pairs: Sequence[Pair], theme: Theme) -> bytes:
        """All panels as one PNG."""
        columns = min(len(pairs), BESIDE)
        rows = math.ceil(len(pairs) / columns)
        size = (WIDTH * columns, sum(self.heights) * rows)
        figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor=theme.card)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(rows * len(self.heights), columns, height_ratios=self.heights * rows)
        for i, pair in enumerate(pairs):
            row, column = divmod(i, columns)
            cells = range(row * len(self.heights), (row + 1) * len(self.heights))
            axes = [figure.add_subplot(grid[cell, column]) for cell in cells]
            for one in axes:
                _dress(one, theme)
            self.draw(axes, pair, theme, column == 0)
            axes[0].set_title(pair.name, color=theme.colour(pair), fontsize=11, fontweight="bold", loc="left")
        out = io.BytesIO()
        figure.savefig(out, format="png", facecolor=theme.card)
        return out.getvalue()


def scatter(pairs: Sequence[Pair]) -> Panels:
    """pi against mu with the diagonal; below, pi - mu, on one scale over all pairs."""
    furthest = max(
        (max(abs(p.measures[k].value) for k in ("prob_diff_min", "prob_diff_max")) for p in pairs), default=0
    )
    top = 1.1 * furthest or 1.0
    return Panels("scatter", (3.2, 1.5), lambda axes, pair, theme, first: _scatter(axes, pair, theme, first, top))


def logratios(pairs: Sequence[Pair]) -> Panels:
    """Sequence log-ratios on one scale over all pairs; below, each on its own, unless all are nearly alike."""
    tops = [own_top(p) for p in pairs]
    top = max(tops, default=1.0)
    heights = (2.6,) if top <= SAME * min(tops, default=1.0) else (2.3, 2.0)
    return Panels("logratio", heights, lambda axes, pair, theme, first: _logratios(axes, pair, theme, first, top))


def own_top(pair: Pair) -> float:
    return 1.15 * float(np.abs(pair.table.logratio).max()) or 1e-6


def thinned(pair: Pair) -> tuple[np.ndarray, np.ndarray, bool]:
    """(mu, pi, whether some were left out): all tokens, or an even choice of them and all the extremes."""
    found = [(s, s.measurable) for s in pair.table.scored]
    mu = np.concatenate([s.logp_rollout[keep].double().exp().numpy() for s, keep in found])
    pi = np.concatenate([s.logp_train[keep].double().exp().numpy() for s, keep in found])
    if mu.size <= MOST_POINTS:
        return mu, pi, False
    far = np.argpartition(-np.abs(pi - mu), KEPT_EXTREMES)[:KEPT_EXTREMES]
    even = np.linspace(0, mu.size - 1, MOST_POINTS - KEPT_EXTREMES).astype(int)
    chosen = np.union1d(far, even)
    return mu[chosen], pi[chosen], True


def _dress(axes: Any, theme: Theme) -> None:
    axes.set_facecolor(theme.card)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    axes.tick_params(colors=theme.soft, labelsize=8, length=0)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.soft)
        label.set_fontsize(9)


def _remark(axes: Any, text: str, theme: Theme) -> None:
    box = {"facecolor": theme.card, "edgecolor": "none", "pad": 1.5}
    axes.text(0.03, 0.965, text, transform=axes.transAxes, va="top", fontsize=9, color=theme.ink, bbox=box, zorder=5)


def _scatter(axes: Sequence[Any], pair: Pair, theme: Theme, first: bool, top: float) -> None:
    mu, pi, _ = thinned(pair)
    above, below = axes
    style = {"color": theme.colour(pair), "linewidths": 0, "zorder": 2}
    size = 5.0 if mu.size > 3000 else 8.0
    above.plot([0, 1], [0, 1], color=theme.soft, linewidth=0.8, zorder=1)
    above.scatter(mu, pi, s=size, alpha=0.5, **style)
    above.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    below.axhline(0, color=theme.soft, linewidth=0.8, zorder=1)
    below.scatter(mu, pi - mu, s=size, alpha=0.5, **style)
    below.set(xlim=(-0.02, 1.02), ylim=(-top, top), xlabel="μ, the sampler’s probability")
    ticks, labels = [0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"]
    above.set_xticks(ticks, [])
    above.set_yticks(ticks, labels)
    below.set_xticks(ticks, labels)
    below.yaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    below.yaxis.set_major_formatter(FuncFormatter(_signed))
    if first:
        above.set_ylabel("π, the trainer’s")
        below.set_ylabel("π − μ")
    _remark(above, f"KL {scientific(pair.measures['kl_k3'].value)}", theme)


def _logratios(axes: Sequence[Any], pair: Pair, theme: Theme, first: bool, top: float) -> None:
    for one in axes:
        _clouds(one, pair, theme)
        one.yaxis.set_major_locator(MaxNLocator(5, symmetric=True))
        one.yaxis.set_major_formatter(FuncFormatter(_signed))
        if first:
            one.set_ylabel("Σ log(π/μ), nats")
    axes[0].set_ylim(-top, top)
    axes[-1].set_xlabel("tokens of the response")
    if len(axes) == 2:
        axes[0].set_xticklabels([])
        own = own_top(pair)
        own = own if top > SAME * own else top
        axes[1].set_ylim(-own, own)
        _remark(axes[0], "the scale of all", theme)
        _remark(axes[1], "the same scale" if own == top else f"magnified {factor(top / own)} times", theme)


def _clouds(axes: Any, pair: Pair, theme: Theme) -> None:
    """A column of points a bucket, with its median, quartiles, and 5% and 95%."""
    buckets = list(pair.by_length)
    jitter = np.random.default_rng(0)
    axes.axhline(0, color=theme.soft, linewidth=0.8, zorder=1)
    labels = []
    for x, name in enumerate(buckets):
        low, high = map(int, name.split("-"))
        s = np.sort(pair.table.logratio[(pair.table.lengths >= low) & (pair.table.lengths <= high)])
        labels.append(f"{low}–{high}\nn = {s.size:,}")
        dots = s
        if s.size > MOST_DOTS:  # an even choice over the sorted values keeps both ends
            dots = s[np.linspace(0, s.size - 1, MOST_DOTS).astype(int)]
        spread = 0.16 + jitter.uniform(-0.2, 0.2, dots.size)
        axes.scatter(x + spread, dots, s=7, color=theme.colour(pair), alpha=0.5, linewidths=0, zorder=2)
        if s.size >= FEWEST_FOR_BARS:
            at = x - 0.22
            axes.plot([at, at], np.quantile(s, [0.05, 0.95]), color=theme.ink, linewidth=1.0, zorder=3)
            box = np.quantile(s, [0.25, 0.75])
            axes.plot([at, at], box, color=theme.ink, linewidth=4.5, zorder=3, solid_capstyle="butt")
            style = {"markersize": 4.5, "color": theme.card, "markeredgecolor": theme.ink}
            axes.plot([at], [np.median(s)], "o", zorder=4, **style)
    axes.set_xticks(range(len(buckets)), labels)
    axes.set_xlim(-0.6, len(buckets) - 0.4)
    axes.grid(axis="x", visible=False)


def _signed(value: float, _: int) -> str:
    if abs(value) < 1e-300:
        return "0"
    text = f"{abs(value):.3g}" if 1e-3 <= abs(value) < 1e4 else scientific(abs(value), 2).replace(".0·", "·")
    return ("−" if value < 0 else "") + text
