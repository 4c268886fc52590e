"""Several seeds as one curve: their mean, and a band from the smallest to the largest.

Each run is smoothed on its own first (a running mean over a fixed number of steps), so that the band shows how far
seeds lie apart and not how noisy a step is. At a step where only some runs have a value, mean and band are of those.

A metric whose peaks are what counts, such as the largest π − μ, is not averaged at all: its curve is the largest over
the same steps of all runs, or the smallest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from tenbit.report.figures import trend
from tenbit.report.reading import Run

Values = list[float | None]
Kept = Literal["mean", "largest", "smallest"]  # what a curve keeps of neighbouring steps and of seeds
SHARE = 100  # a running mean reaches over a hundredth of the longest run to each side


@dataclass(frozen=True)
class Curve:
    """`count` is how many runs have a value at each step."""

    steps: list[int]
    mean: Values
    low: Values
    high: Values
    count: list[int]

    def known(self) -> Curve:
        """Without the steps at which no run has a value: evaluations are far between, and no gaps in a curve."""
        some = [i for i, n in enumerate(self.count) if n]
        mean, low, high = ([side[i] for i in some] for side in (self.mean, self.low, self.high))
        return Curve([self.steps[i] for i in some], mean, low, high, [self.count[i] for i in some])


def reach_for(runs: Sequence[Run]) -> int:
    """Steps to each side of a running mean, the same for all runs; 0 leaves short runs as they are."""
    longest = max((len(run.rows) for run in runs), default=0)
    return 0 if longest < 40 else max(1, longest // SHARE)


def extremes(values: Sequence[float | None], reach: int, of: Kept) -> Values:
    """The largest, or the smallest, of `reach` values to each side; gaps stay gaps."""
    pick = max if of == "largest" else min
    out: Values = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - reach) : i + reach + 1] if v is not None]
        out.append(None if value is None else pick(near))
    return out


def over_seeds(runs: Sequence[Run], key: str, reach: int = 0, of: Kept = "mean") -> Curve:
    """The curve of one metric over runs. Steps at which a run logged, but not this metric, are gaps.

    With `of` "largest" or "smallest", `mean` holds that instead of the runs' mean.
    """
    at: dict[int, list[float]] = {}
    pick = {"mean": fmean, "largest": max, "smallest": min}[of]
    for run in runs:
        values = run.values(key)
        smooth = values if not reach else trend(values, reach) if of == "mean" else extremes(values, reach, of)
        for step, value in zip(run.steps, smooth, strict=True):
            found = at.setdefault(step, [])
            if value is not None and math.isfinite(value):
                found.append(value)
    steps = sorted(at)
    here = [at[step] for step in steps]
    return Curve(
        steps,
        [pick(v) if v else None for v in here],
        [min(v, default=None) for v in here],
        [max(v, default=None) for v in here],
        [len(v) for v in here],
    )


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95% interval by Student's t; None of a single value."""
    if len(values) < 2:
        return fmean(values), None
    from scipy.special import stdtrit  # the quantile alone: scipy.stats takes seconds to import

    return fmean(values), float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))
