"""How a run went: one line, and the few numbers under it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from tenbit.outcome import stopped_by
from tenbit.report.reading import Run
from tenbit.report.words import factor, number, percent, power_of_two, scientific, seconds, whole
from tenbit.runlog import mismatch_ratio, span


def _ends(values: Sequence[float], share: float = 0.2) -> tuple[float, float]:
    """Medians of the first and the last fifth."""
    n = max(1, int(len(values) * share))
    return median(values[:n]), median(values[-n:])


def growth(run: Run, key: str) -> float | None:
    """How many times larger a positive quantity is in the last fifth of a run than in the first."""
    values = [v for v in run.values(key) if v is not None and v > 0]
    if len(values) < 10:
        return None
    first, last = _ends(values)
    return last / first


def verdict(run: Run) -> str:
    """What a reader should know if they read one line."""
    parts: list[str] = []
    alarm = stopped_by(run.summary)
    if alarm is not None:
        last = max(run.steps, default=0)
        of = f" of {run.total_steps:,}" if run.total_steps else ""
        parts.append(f"Stopped by an alarm at {last:,}{of} steps: {alarm}.")
    ends = span(run.rows, "train/accuracy")
    so_far = "" if run.finished else " so far"
    if ends and ends[0]["step"] != ends[1]["step"]:
        a, b = percent(ends[0]["train/accuracy"]), percent(ends[1]["train/accuracy"])
        steps = ends[1]["step"] - ends[0]["step"] + 1
        delta = ends[1]["train/accuracy"] - ends[0]["train/accuracy"]
        how = f"stayed at {b}" if a == b else f"{'rose' if delta > 0 else 'fell'} from {a} to {b}"
        parts.append(f"Training accuracy {how} over {steps:,} steps{so_far}.")
    elif ends:
        parts.append(f"One step{so_far}; training accuracy {percent(ends[1]['train/accuracy'])}.")
    elif run.trained_steps:
        parts.append(f"Steps{so_far}: {run.trained_steps:,}, none with a training accuracy.")
    else:
        parts.append("No training step yet.")
    ratio = mismatch_ratio(run.mismatch)
    if ratio is not None and ratio >= 1:
        parts.append(f"On the same weights, BF16’s mismatch is {factor(ratio)} times FP16’s.")
    grown = growth(run, "mismatch/kl_k3")
    if grown is not None and grown > 3:
        parts.append(f"The mismatch grew {factor(grown)}-fold during the run.")
    return " ".join(parts)


def _change(run: Run, key: str, what: str) -> tuple[str, str]:
    """The share at both ends, and what the ends are."""
    ends = span(run.rows, key)
    assert ends is not None
    first, last = ends
    if first["step"] == last["step"]:
        return percent(last[key]), f"one {what}"
    return f"{percent(first[key])} → {percent(last[key])}", f"first and last {what}"


def key_numbers(run: Run) -> list[tuple[str, str, str]]:
    """(what, value, remark) for the row of figures under the title."""
    out: list[tuple[str, str, str]] = []
    if span(run.rows, "train/accuracy"):
        out.append(("training accuracy", *_change(run, "train/accuracy", "step")))
    for key in run.evals("avg@"):
        out.append((key.removeprefix("eval/").replace("/", " "), *_change(run, key, "evaluation")))
    trained = run.trained_steps
    took = sum(v for v in run.values("time/step") if v is not None)
    out.append(("steps", f"{trained:,}" + (f" of {run.total_steps:,}" if run.total_steps else ""), seconds(took)))
    kl = [v for v in run.values("mismatch/kl_k3") if v is not None]
    if kl:
        worst = f"median; largest {scientific(max(kl))}"
        out.append(("mismatch, KL(μ‖π)", scientific(median(kl)), worst))
    ratio = mismatch_ratio(run.mismatch)
    if ratio is not None:
        out.append(("BF16’s over FP16’s", f"{factor(ratio)}×", "KL, same weights"))
    skips = [v for v in run.values("optim/skipped") if v is not None]
    if skips:
        scale = [v for v in run.values("optim/loss_scale") if v is not None]
        remark = f"loss scale {power_of_two(scale[-1])} at the end" if scale else ""
        out.append(("skipped updates", number(sum(skips)), remark))
    speed = [v for v in run.values("perf/tokens_per_second") if v is not None]
    if speed:
        out.append(("tokens per second", whole(median(speed)), "median"))
    return out
