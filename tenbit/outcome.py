"""What became of a run, read off its metrics: the verdict of the paper's sanity test (section 4.1).

    judge(rows, total_steps) -> Outcome("collapsed", accuracy=0.31, peak=0.84, peak_step=120, collapsed_at=171, ...)

**passed**: training accuracy converged above 95%. **collapsed**: it fell from its peak and stayed down, or its numbers
stopped being numbers. **failed**: neither. **running**: not finished, and not collapsed so far.

A step's accuracy is that of its own few problems, and noisy: with n responses to p problems its standard error is some
0.3 / sqrt(p). So everything is judged on means over `WINDOW` steps, or a tenth of a shorter run, `SHORTEST` at least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

PASS = 0.95  # section 4.1: training accuracy converges above 95%
FALL = 0.15  # a collapse: so far below the peak, of accuracy 0 to 1 ...
WINDOW = 20  # ... in means over so many steps
SHORTEST = 5

Kind = Literal["passed", "failed", "collapsed", "running"]


@dataclass(frozen=True)
class Outcome:
    """`accuracy` is the last window's mean, `peak` the best window's, which ends at `peak_step`. `collapsed_at` is the
    step at which the window's mean fell below peak - `FALL` for good, or the first without a number."""

    kind: Kind
    reason: str
    steps: int
    accuracy: float | None = None
    peak: float | None = None
    peak_step: int | None = None
    collapsed_at: int | None = None

    def tree(self) -> dict[str, Any]:
        return asdict(self)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place; of what there is before that."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def extreme(row: Mapping[str, Any]) -> float | None:
    """max|pi - mu| of a step: near 1, one program all but excludes a token that the other all but chose."""
    ends = (row.get(f"mismatch/prob_diff_{end}") for end in ("min", "max"))
    return max((abs(v) for v in ends if isinstance(v, int | float)), default=None)


def judge(rows: Sequence[Mapping[str, Any]], total_steps: int | None = None, threshold: float = PASS) -> Outcome:
    """The outcome of a run from the rows of its ``metrics.jsonl``; `total_steps` None takes it for finished."""
    steps = [row for row in rows if isinstance(row.get("train/accuracy"), int | float)]
    if not steps:
        return Outcome("running", "no training step yet", 0)
    last = int(steps[-1]["step"])
    window = min(len(steps), max(SHORTEST, min(WINDOW, len(steps) // 10)))
    curve = smoothed([float(row["train/accuracy"]) for row in steps], window)
    # the first windows are not full, and a lucky first step is no peak
    top = max(range(window - 1, len(curve)), key=lambda i: curve[i])
    facts = {
        "steps": last,
        "accuracy": round(curve[-1], 6),
        "peak": round(curve[top], 6),
        "peak_step": int(steps[top]["step"]),
    }
    broken, fallen = _first_broken(steps), _fell_for_good(curve, top)
    at = int(steps[fallen]["step"]) if fallen is not None else None
    if broken is not None and (at is None or broken < at):
        why = f"from step {broken} on no update has a finite gradient norm; peak {curve[top]:.1%}"
        return Outcome("collapsed", why, **facts, collapsed_at=broken)
    if at is not None:
        why = (
            f"training accuracy peaked at {curve[top]:.1%} (step {facts['peak_step']}) and fell more than "
            f"{FALL:.0%} below it at step {at}, for good; it ended at {curve[-1]:.1%}"
        )
        return Outcome("collapsed", why, **facts, collapsed_at=at)
    span = f"mean training accuracy over the last {window} steps is {curve[-1]:.1%}"
    if total_steps is not None and last < total_steps:
        return Outcome("running", f"{span}, after {last} of {total_steps} steps", **facts)
    if curve[-1] > threshold:
        return Outcome("passed", f"{span}, above {threshold:.0%}", **facts)
    return Outcome("failed", f"{span}, not above {threshold:.0%}; at best it was {curve[top]:.1%}", **facts)


def _fell_for_good(curve: Sequence[float], top: int) -> int | None:
    """The first place after the peak from which the curve stays more than `FALL` below it; None if it ends above."""
    floor = curve[top] - FALL
    below = len(curve)
    while below - 1 > top and curve[below - 1] < floor:
        below -= 1
    return below if below < len(curve) else None


def _first_broken(steps: Sequence[Mapping[str, Any]]) -> int | None:
    """The first of the last steps whose gradients were not finite, if there are several and they go on to the end."""
    first: int | None = None
    count = 0
    for row in steps:
        norm = row.get("optim/grad_norm")
        healthy = "optim/grad_norm" not in row or (isinstance(norm, int | float) and math.isfinite(norm))
        first = None if healthy else (first if first is not None else int(row["step"]))
        count = 0 if healthy else count + 1
    return first if count >= 5 else None
