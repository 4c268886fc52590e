"""What a page over several runs says in words and tables: outcomes, final numbers, differing keys, alarms.

The same values go to ``page.json``, as numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from tenbit.outcome import PASS, extreme
from tenbit.report.many_cells import Cell, Member, text
from tenbit.report.many_curves import interval
from tenbit.report.words import factor, number, percent, scientific, seconds
from tenbit.watch import first_steps

KINDS = ("passed", "collapsed", "failed", "stopped", "running")
WORDS = {"stopped": "stopped by an alarm", "running": "unfinished"}
NAMED_APART = 6  # cells that the verdict names one by one where they have one precision


@dataclass(frozen=True)
class Summary:
    """A cell in numbers. None where no run has the metric."""

    cell: Cell
    counts: dict[str, int]
    accuracy: tuple[float, float | None, int] | None  # mean over seeds, half of its 95% interval, seeds
    unfinished: bool  # the accuracy is of runs that still go on, or were stopped
    evaluations: dict[str, tuple[float, int]]  # last score by set, mean over seeds; at which step at the latest
    kl: float | None
    extreme: float | None
    seconds: float | None
    lengths: tuple[int, int] | None = None  # shortest and longest of the runs that the accuracy is of

    @classmethod
    def of(cls, cell: Cell) -> Summary:
        counts = Counter(m.outcome.kind for m in cell.members)
        done = [m for m in cell.members if m.outcome.kind not in ("running", "stopped")]
        known = [m.outcome for m in (done or cell.members) if m.outcome.accuracy is not None]
        found = [o.accuracy for o in known if o.accuracy is not None]
        lengths = [o.steps for o in known]
        ends = [v for run in cell.runs for row in run.rows if (v := extreme(row)) is not None]
        return cls(
            cell,
            {kind: counts[kind] for kind in KINDS if counts[kind]},
            (*interval(found), len(found)) if found else None,
            not done,
            _evaluations(cell),
            _median(cell, "mismatch/kl_k3"),
            max(ends, default=None),
            _median(cell, "time/step"),
            (min(lengths), max(lengths)) if lengths else None,
        )


def _median(cell: Cell, key: str) -> float | None:
    """Over all steps of all runs."""
    values = [v for run in cell.runs for v in run.values(key) if v is not None]
    return median(values) if values else None


def _evaluations(cell: Cell) -> dict[str, tuple[float, int]]:
    last: dict[str, list[tuple[float, int]]] = {}
    for run in cell.runs:
        for key in run.evals("avg@"):
            value, step = next((v, s) for v, s in zip(reversed(run.values(key)), reversed(run.steps), strict=True)
                               if v is not None)  # fmt: skip
            last.setdefault(key, []).append((value, step))
    return {key: (fmean(v for v, _ in some), max(s for _, s in some)) for key, some in sorted(last.items())}


def counted(counts: dict[str, int]) -> str:
    """``9 of 15 runs passed, 3 collapsed, 3 failed``"""
    total = sum(counts.values())
    runs = "run" if total == 1 else "runs"
    rest = [f"{n} {WORDS.get(kind, kind)}" for kind, n in counts.items() if kind != "passed"]
    return ", ".join([f"{counts.get('passed', 0)} of {total} {runs} passed", *rest])


def verdict(summaries: Sequence[Summary]) -> str:
    """All outcomes in a line: by precision where there are several, by cell where there are few, else all in all."""
    precisions = sorted({s.cell.precision for s in summaries}, key=lambda p: (p != "fp16", p != "bf16", p))
    if len(precisions) > 1:
        groups = {p.upper() or "unknown": [s for s in summaries if s.cell.precision == p] for p in precisions}
    elif 1 < len(summaries) <= NAMED_APART:
        groups = {s.cell.label: [s] for s in summaries}
    else:
        groups = {"": list(summaries)}
    said = []
    for name, some in groups.items():
        counts = {k: n for k in KINDS if (n := sum(s.counts.get(k, 0) for s in some))}
        said.append(f"{name}: {counted(counts)}" if name else counted(counts)[:1].upper() + counted(counts)[1:])
    return "; ".join(said) + "."


def member_line(member: Member) -> tuple[str, str, str]:
    """(kind, seed, what happened)"""
    o = member.outcome
    last = max(o.steps, max(member.run.steps, default=0))
    total = f" of {member.run.total_steps:,}" if member.run.total_steps else ""
    if o.kind == "collapsed":
        what = f"collapsed at step {o.collapsed_at:,}, peak {percent(o.peak or 0.0)} at {o.peak_step:,}"
    elif o.kind == "stopped":
        what = f"stopped by an alarm at {last:,}{total} steps"
    elif o.kind == "running":
        what = f"unfinished, at step {last:,}{total}"
    else:
        what = f"{o.kind}, {percent(o.accuracy) if o.accuracy is not None else o.reason}"
    return o.kind, member.seed, what


def table(summaries: Sequence[Summary]) -> dict[str, Any]:
    """The table of verdicts: its heads, and for each cell its label, its seeds, and one text a head."""
    sets = list(dict.fromkeys(key for s in summaries for key in s.evaluations))
    speeds = [s.seconds for s in summaries if s.seconds]
    fastest = min(speeds, default=None)
    heads = [("final accuracy", "mean, 95% interval")]
    heads += [(key.removeprefix("eval/").replace("/", " "), "last, mean") for key in sets]
    heads += [("KL(μ‖π)", "median"), ("|π − μ|", "largest"), ("seconds a step", "median")]
    rows = []
    for s in summaries:
        values = [_accuracy(s)]
        for key in sets:
            values.append((percent(s.evaluations[key][0]), f"step {s.evaluations[key][1]:,}")
                          if key in s.evaluations else ("–", ""))  # fmt: skip
        values.append((scientific(s.kl) if s.kl is not None else "–", ""))
        values.append((number(s.extreme) if s.extreme is not None else "–", ""))
        times = f"{factor(s.seconds / fastest)}×" if s.seconds and fastest else ""
        values.append((seconds(s.seconds), times) if s.seconds is not None else ("–", ""))
        rows.append({"label": s.cell.label, "counts": s.counts, "seeds": [member_line(m) for m in s.cell.members],
                     "values": list(zip((head for head, _ in heads), values, strict=True))})  # fmt: skip
    return {"heads": heads, "rows": rows, "threshold": percent(PASS, 0)}


def _accuracy(s: Summary) -> tuple[str, str]:
    if s.accuracy is None:
        return "–", ""
    mean, half, n = s.accuracy
    shown, remarks = percent(mean), []
    if half is not None and mean - half >= 0 and mean + half <= 1:
        shown += f" ± {percent(half)}"
    elif half is not None:
        remarks.append(f"{percent(max(0.0, mean - half), 0)} to {percent(min(1.0, mean + half), 0)}")
    if s.unfinished:
        running = any(m.outcome.kind == "running" for m in s.cell.members)
        remarks.append("so far" if running else "when stopped")
    if s.lengths is not None and s.lengths[0] < s.lengths[1]:
        remarks.append(f"{s.lengths[0]:,} to {s.lengths[1]:,} steps")
    if n < len(s.cell.members):
        remarks.append(f"{n} of {len(s.cell.members)} seeds")
    return shown, ", ".join(remarks)


def differences(cells: Sequence[Cell]) -> tuple[list[tuple[str, list[tuple[str, str]]]], list[tuple[str, str]]]:
    """Keys in which runs differ, each with its values and who has them; and the keys in which all agree."""
    members = [(cell, m) for cell in cells for m in cell.members if m.keys]
    differing, equal = [], []
    for key in dict.fromkeys(k for _, m in members for k in m.keys):
        having: dict[str, dict[str, None]] = {}
        for cell, m in members:
            having.setdefault(text(m.keys[key]) if key in m.keys else "not set", {})[cell.label] = None
        if len(having) == 1:
            equal.append((key, next(iter(having))))
        elif key not in ("seed", "name"):
            told = {value: _who(cells, labels) for value, labels in having.items()}
            most = max(having, key=lambda value: len(having[value]))
            apart = sum(map(len, having.values())) == len(set().union(*having.values()))
            if apart and len(having[most]) > max(2, len(cells) // 2) and not told[most].startswith("all "):
                told[most] = "all others"
            differing.append((key, list(told.items())))
    return differing, equal


def _who(cells: Sequence[Cell], labels: Iterable[str]) -> str:
    """The cells by name; ``all fp16`` where they are all of a precision, or ``all grpo`` of an algorithm."""
    wanted = set(labels)
    for part in ("precision", "algorithm"):
        groups: dict[str, set[str]] = {}
        for cell in cells:
            groups.setdefault(getattr(cell, part), set()).add(cell.label)
        inside = [name for name, group in groups.items() if group <= wanted]
        if set().union(*(groups[name] for name in inside)) == wanted and len(inside) < len(wanted):
            return ", ".join(f"all {name}" for name in inside)
    return ", ".join(cell.label for cell in cells if cell.label in wanted)


def alarms(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each cell that was watched: alarms by signal, and for each seed the first one beside its collapse."""
    rows = []
    for cell in cells:
        watched = [m for m in cell.members if m.run.alarms is not None]
        if not watched:
            continue
        found = [a for m in watched for a in m.run.alarms or ()]
        signals = Counter(str(a.get("signal", "?")) for a in found)
        rows.append(
            {
                "label": cell.label,
                "seeds": len(watched),
                "levels": {level: n for level, n in Counter(str(a.get("level", "?")) for a in found).most_common()},
                "signals": dict(signals.most_common()),
                "first": [_first_alarm(m) for m in watched],
            }
        )
    return rows


def _first_alarm(member: Member) -> dict[str, Any]:
    """The first alarm of level warn or higher, and of level act, as `tenbit watch` counts them. A note warns nobody."""
    found = [{"step": row["step"], "level": str(row.get("level"))} for row in member.run.alarms or ()]
    first = {level: step for level, step in first_steps(found).items() if level != "note"}
    at = member.outcome.collapsed_at
    levels = [f"{level} at {step:,}" for level, step in first.items()]
    said = ", ".join(levels) or "no warn or act"
    lead = {} if at is None else {level: at - step for level, step in first.items()}
    if at is not None:
        before = [f"{level} {f'{n:,} steps before' if n > 0 else 'not before'}" for level, n in lead.items()]
        said += f"; collapsed at {at:,}" + (f": {', '.join(before)}" if before else "")
    return {"seed": member.seed, "steps": first, "lead": lead, "collapsed_at": at, "said": said}


def as_json(summaries: Sequence[Summary], smoothing: int) -> dict[str, Any]:
    """What the page's tables hold, for machines."""
    fastest = min((s.seconds for s in summaries if s.seconds), default=None)
    cells = []
    for s in summaries:
        mean, half, n = s.accuracy or (None, None, 0)
        cells.append(
            {
                "label": s.cell.label,
                "algorithm": s.cell.algorithm,
                "precision": s.cell.precision,
                "keys": dict(s.cell.extras),
                "runs": [{"name": m.run.name, "seed": m.keys.get("seed"), **m.outcome.tree()} for m in s.cell.members],
                "outcomes": s.counts,
                "accuracy": {"mean": mean, "half_width_95": half, "seeds": n, "unfinished": s.unfinished},
                "evaluation": {key: {"mean": v, "step": step} for key, (v, step) in s.evaluations.items()},
                "kl_k3_median": s.kl,
                "prob_diff_abs_max": s.extreme,
                "seconds_per_step": s.seconds,
                "seconds_relative": s.seconds / fastest if s.seconds and fastest else None,
            }
        )
    cells_of = [s.cell for s in summaries]
    differing, _ = differences(cells_of)
    return {
        "verdict": verdict(summaries),
        "running_mean_steps": smoothing,
        "cells": cells,
        "differs": {key: dict(said) for key, said in differing},
        "alarms": alarms(cells_of),
    }
