"""Reads a run folder, finished or not, into one value. Nothing but `metrics.jsonl` has to be there.

Rows may also lie compressed, as ``metrics.jsonl.gz``: results that are kept for good are small that way.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenbit.runlog import Row, read_mismatch, read_rows, rows_file


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it. `rows` are sorted by step, one a step."""

    name: str
    rows: list[Row]
    recipe: str = ""
    samples: list[Row] = field(default_factory=list)
    plan: list[list[str]] = field(default_factory=list)
    mismatch: list[Row] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    total_steps: int | None = None
    folder: Path = Path()
    alarms: list[Row] | None = None  # None: nobody watched this run; empty: no alarm
    sanity: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """``fp16`` or ``bf16/fp32``: training, then rollout where it differs."""
        formats = {row[0]: row[1] for row in self.plan if isinstance(row, list) and len(row) > 1}
        train, rollout = str(formats.get("compute", "")), str(formats.get("rollout", ""))
        return train if train == rollout or not rollout else f"{train}/{rollout}"

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows]

    @property
    def trained_steps(self) -> int:
        """Steps with anything but an evaluation in them."""
        return sum(1 for row in self.rows if any(k != "step" and not k.startswith("eval/") for k in row))

    def values(self, key: str) -> list[float | None]:
        """One value a row; None where the row has none."""
        found = (row.get(key) for row in self.rows)
        return [v if isinstance(v, int | float) else None for v in found]

    def names(self) -> list[str]:
        """Every name that has a number in some row, in order of appearance."""
        seen: dict[str, None] = {}
        for row in self.rows:
            seen.update((k, None) for k, v in row.items() if isinstance(v, int | float) and k != "step")
        return list(seen)

    def evals(self, metric: str) -> list[str]:
        """Names such as ``eval/SET/avg@8`` whose last part begins with `metric`."""
        return sorted(k for k in self.names() if k.startswith("eval/") and k.rpartition("/")[2].startswith(metric))


def read_run(folder: Path) -> Run:
    """Raises ValueError, with the remedy, if there is no run in the folder or a file of it is damaged."""
    metrics = rows_file(folder, "metrics")
    if metrics is None:
        raise ValueError(f"{folder}: no metrics.jsonl here. Name the run folder that `tenbit train` printed.")
    merged: dict[int, Row] = {}
    for row in read_rows(metrics):
        known = {key: None if _too_large(value) else value for key, value in row.items()}
        merged[row["step"]] = merged.get(row["step"], {}) | known
    recipe = _text(folder / "recipe.toml")
    samples, alarms = rows_file(folder, "samples"), rows_file(folder, "alarms")
    summary = _json(folder / "summary.json", dict)
    steps = _total_steps(recipe)
    return Run(
        name=folder.resolve().name,
        rows=[merged[step] for step in sorted(merged)],
        recipe=recipe,
        samples=read_rows(samples) if samples else [],
        plan=_json(folder / "precision.json", list),
        mismatch=read_mismatch(folder),
        summary=summary,
        finished=bool(summary) or (steps is not None and bool(merged) and max(merged) >= steps),
        total_steps=steps,
        folder=folder,
        alarms=read_rows(alarms) if alarms else None,
        sanity=_json(folder / "sanity.json", dict),
    )


def _too_large(value: Any) -> bool:
    """1e999 is JSON and no number that can be computed with; it is read as NaN is."""
    try:
        return isinstance(value, int | float) and not math.isfinite(value)
    except OverflowError:  # a whole number beyond every double
        return True


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path, kind: type) -> Any:
    if not path.is_file():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}). Remove the file, or restore it.") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected a JSON {kind.__name__}. Remove the file, or restore it.")
    return value


def _total_steps(recipe: str) -> int | None:
    try:
        found = tomllib.loads(recipe).get("steps")
    except tomllib.TOMLDecodeError:  # the page shows the text as it is
        return None
    return found if isinstance(found, int) else None
