"""What became of a run, read off its metrics: the verdict of the paper's sanity test (section 4.1).

    outcome_of(Path("runs/mine"))       Outcome("collapsed", accuracy=0.31, peak=0.84, peak_step=120, collapsed_at=171)

**passed**: training accuracy converged above 95%. **collapsed**: it fell from its peak and stayed down, or its
gradients stopped being numbers. **failed**: neither. **running**: not finished, and not collapsed so far. **stopped**:
ended early by an alarm (`watch.act = "stop"`), and not collapsed so far.

A step's accuracy is that of its own few problems, and noisy. So everything is judged on means over a window of steps,
and a fall counts that is larger than `FALL` and than what the noise between steps explains, and that lasts a window.
"""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any, Literal

from tenbit.runlog import read_rows, rows_file

PASS = 0.95  # section 4.1: training accuracy converges above 95%
FALL = 0.15  # a collapse: so far below the peak, of accuracy 0 to 1 ...
SURE = 5.0  # ... and at least so many standard errors of a difference of two windows
WINDOW, SHORTEST = 20, 5  # steps in a mean: a sixth of the run, within these
BROKEN = 5  # steps in a row, up to the last, whose gradients are not finite

Kind = Literal["passed", "failed", "collapsed", "stopped", "running"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """`accuracy` is the last window's mean and `error` its standard error, `peak` the best window's mean, which ends at
    `peak_step`. `collapsed_at` is the step at which the window's mean fell for good, or the first without a finite
    gradient."""

    kind: Kind
    reason: str
    steps: int
    accuracy: float | None = None
    error: float | None = None
    peak: float | None = None
    peak_step: int | None = None
    collapsed_at: int | None = None

    def tree(self) -> dict[str, Any]:
        return asdict(self)


def outcome_of(folder: Path, rows: Sequence[Row] | None = None) -> Outcome:
    """Of a run folder, finished or not, compressed or not; `rows` are its metrics, where they are read already. Raises
    ValueError if it holds no run."""
    metrics = rows_file(folder, "metrics")
    if metrics is None:
        raise ValueError(f"{folder}: no metrics.jsonl here. Name a run folder")
    summary, recipe = folder / "summary.json", folder / "recipe.toml"
    try:
        found = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{summary}: not JSON ({error}). Remove the file, or restore it") from None
    try:
        wanted = tomllib.loads(recipe.read_text(encoding="utf-8")).get("steps") if recipe.is_file() else None
    except tomllib.TOMLDecodeError:
        wanted = None
    rows = read_rows(metrics) if rows is None else rows
    return judge(rows, None if found and "stopped" not in found else wanted, stopped_by(found))


def stopped_by(summary: Mapping[str, Any]) -> str | None:
    """The alarm that ended a run early, in words; from its ``summary.json``."""
    alarm = summary.get("stopped")
    return str(alarm.get("reason", "an alarm")) if isinstance(alarm, dict) else None


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place; of what there is before that."""
    return [fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def extreme(row: Mapping[str, Any]) -> float | None:
    """max|pi - mu| of a step: near 1, one program all but excludes a token that the other all but chose."""
    ends = (row.get(f"mismatch/prob_diff_{end}") for end in ("min", "max"))
    return max((abs(v) for v in ends if isinstance(v, int | float)), default=None)


def judge(rows: Sequence[Row], total_steps: int | None = None, stopped: str | None = None) -> Outcome:
    """The outcome from the rows of a ``metrics.jsonl``. `total_steps` None takes the run for finished; `stopped` says
    which alarm ended it early."""
    steps = [row for row in rows if _finite(row.get("train/accuracy"))]
    if not steps:
        none = "no step has a training accuracy"
        return Outcome("running", none, 0) if total_steps is not None else Outcome("failed", none, 0)
    values = [float(row["train/accuracy"]) for row in steps]
    last, window = int(steps[-1]["step"]), min(len(steps), max(SHORTEST, min(WINDOW, len(steps) // 6)))
    curve = [round(v, 9) for v in smoothed(values, window)]
    # the first windows are not full, and a lucky first step is no peak
    top = max(range(window - 1, len(curve)), key=lambda i: curve[i])
    error = stdev(values[-window:]) / math.sqrt(window) if window > 1 else None
    facts = {
        "steps": last,
        "accuracy": round(curve[-1], 6),
        "error": None if error is None else round(error, 6),
        "peak": round(curve[top], 6),
        "peak_step": int(steps[top]["step"]),
    }
    fall = max(FALL, SURE * _noise(values) * math.sqrt(2 / window))
    broken, fallen = _first_broken(steps), _fell_for_good(curve, top, fall, window)
    at = int(steps[fallen]["step"]) if fallen is not None else None
    if broken is not None and (at is None or broken < at):
        why = f"from step {broken} on no update has a finite gradient norm; peak {curve[top]:.1%}"
        return Outcome("collapsed", why, **facts, collapsed_at=broken)
    if at is not None:
        why = (
            f"training accuracy peaked at {curve[top]:.1%} (step {facts['peak_step']}) and fell more than "
            f"{fall * 100:.0f} points below it at step {at}, for good; it ended at {curve[-1]:.1%}"
        )
        return Outcome("collapsed", why, **facts, collapsed_at=at)
    give = f" (standard error {error * 100:.1f} points)" if error is not None else ""
    span = f"mean training accuracy over the last {window} steps is {curve[-1]:.1%}{give}"
    if stopped is not None:
        return Outcome("stopped", f"an alarm ended it after step {last}: {stopped}; {span}", **facts)
    if total_steps is not None and last < total_steps:
        return Outcome("running", f"{span}, after {last} of {total_steps} steps", **facts)
    if len(steps) < SHORTEST:
        return Outcome("failed", f"{len(steps)} steps cannot tell; {span}", **facts)
    if curve[-1] > PASS:
        return Outcome("passed", f"{span}, above {PASS:.0%}", **facts)
    return Outcome("failed", f"{span}, not above {PASS:.0%}; at best it was {curve[top]:.1%}", **facts)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _noise(values: Sequence[float]) -> float:
    """Standard deviation of a step's accuracy around its trend, from the differences of neighbours."""
    return pstdev([b - a for a, b in itertools.pairwise(values)]) / math.sqrt(2) if len(values) > 1 else 0.0


def _fell_for_good(curve: Sequence[float], top: int, fall: float, window: int) -> int | None:
    """The first place after the peak from which the curve stays more than `fall` below it, for a window at least."""
    below = len(curve)
    while below - 1 > top and curve[below - 1] < curve[top] - fall:
        below -= 1
    return below if len(curve) - below >= window else None


def _first_broken(steps: Sequence[Row]) -> int | None:
    """The first of the last steps whose gradients were not finite, if there are several and they go on to the end."""
    first: int | None = None
    count = 0
    for row in steps:
        healthy = "optim/grad_norm" not in row or _finite(row["optim/grad_norm"])
        first = None if healthy else (first if first is not None else int(row["step"]))
        count = 0 if healthy else count + 1
    return first if count >= BROKEN else None
