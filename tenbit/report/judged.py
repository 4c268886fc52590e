"""What was said of a run besides its curves: the sanity test's verdict with its evidence, and alarms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tenbit.report.reading import Run
from tenbit.report.words import number, scientific, whole

_EVIDENCE = (
    ("kl_k3", "KL(μ‖π), k3", scientific),
    ("entropy", "entropy", number),
    ("grad_norm", "gradient norm", number),
)
_PLACES = ("start", "peak", "end")


@dataclass(frozen=True)
class Sanity:
    """`rows` are (what, at the start, at the peak, at the end or the collapse)."""

    kind: str
    reason: str
    rows: list[tuple[str, list[str]]]
    remarks: list[str]

    @property
    def last(self) -> str:
        return "at the collapse" if self.kind == "collapsed" else "at the end"


def sanity(run: Run) -> Sanity | None:
    """From ``sanity.json``; None where the test was not made."""
    record = run.sanity
    if not record:
        return None
    evidence: dict[str, Any] = record.get("evidence") or {}
    rows = []
    for key, label, show in _EVIDENCE:
        found = evidence.get(key) or {}
        if found:
            values = (found.get(place) for place in _PLACES)
            rows.append((label, ["–" if v is None else show(v) for v in values]))
    remarks = []
    if evidence.get("prob_diff") is not None:
        at = evidence.get("prob_diff_step", 0)
        remarks.append(f"The largest |π − μ| of a token was {number(evidence['prob_diff'])}, at step {at:,}.")
    if evidence.get("skipped"):
        remarks.append(f"Updates skipped: {whole(evidence['skipped'])}.")
    return Sanity(str(record.get("verdict", "–")), str(record.get("reason", "")), rows, remarks)


def alarms(run: Run) -> list[dict[str, str]] | None:
    """From ``alarms.jsonl``, in order; remedies from `warn` on. None of a run that was not watched."""
    if run.alarms is None:
        return None
    return [
        {
            "step": f"{alarm.get('step', 0):,}",
            "level": str(alarm.get("level", "?")),
            "reason": str(alarm.get("reason", "")),
            "remedy": str(alarm.get("remedy", "")) if alarm.get("level") != "note" else "",
        }
        for alarm in run.alarms
    ]
