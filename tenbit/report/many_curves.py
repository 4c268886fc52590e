"""Several seeds as one curve: their mean, and a band from the smallest to the largest.

Each run is smoothed on its own first (a running mean over a fixed number of steps), so that the band shows how far
seeds lie apart and not how noisy a step is. At a step where only some runs have a value, mean and band are of those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from tenbit.report.figures import trend
from tenbit.report.reading import Run

Values = list[float | None]
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


def over_seeds(runs: Sequence[Run], key: str, reach: int = 0) -> Curve:
    """The curve of one metric over runs. Steps at which a run logged, but not this metric, are gaps."""
    at: dict[int, list[float]] = {}
    for run in runs:
        values = run.values(key)
        smooth = trend(values, reach) if reach else values
        for step, value in zip(run.steps, smooth, strict=True):
            found = at.setdefault(step, [])
            if value is not None and math.isfinite(value):
                found.append(value)
    steps = sorted(at)
    here = [at[step] for step in steps]
    return Curve(
        steps,
        [fmean(v) if v else None for v in here],
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
