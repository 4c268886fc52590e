"""`tenbit watch RUN...`: early warning tried on runs of the past, and how long before a collapse it would have come.

    tenbit watch runs/mine runs/other/metrics.jsonl watch.kl.warn=4

Each run's rows are replayed through the rules of its own recipe, with the overrides; of a metrics file without a recipe
beside it, through the defaults. *Lead* is the number of steps from the first alarm of a level, or of a higher one, to
`collapsed_at` of `outcome.judge`; that is negative where the alarm came after. An alarm in a run that did not collapse
is a false one.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tenbit.keys import override
from tenbit.outcome import Outcome, judge, outcome_of
from tenbit.recipe import Recipe
from tenbit.runlog import default_console, read_rows
from tenbit.signals import LEVELS
from tenbit.watch import Alarm, alarm_lines, first_steps, replay

METRICS = ("metrics.jsonl", "metrics.jsonl.gz")


@dataclass(frozen=True)
class Watched:
    """One run: what became of it, and the alarms that it raises. `lead` is empty unless it collapsed."""

    name: str
    outcome: Outcome
    alarms: list[Alarm]

    @property
    def first(self) -> dict[str, int]:
        return first_steps(self.alarms)

    @property
    def lead(self) -> dict[str, int]:
        at = self.outcome.collapsed_at
        return {} if at is None else {level: at - step for level, step in self.first.items()}

    def tree(self) -> dict[str, Any]:
        alarms = [alarm.tree() for alarm in self.alarms]
        return {
            "run": self.name, "outcome": self.outcome.tree(), "first": self.first, "lead": self.lead, "alarms": alarms,
        }  # fmt: skip


def watched(run: Path, overrides: Sequence[str] = ()) -> Watched:
    """A run folder or its metrics file, judged. Raises ValueError if there are no rows to judge."""
    file = next((run / name for name in METRICS if (run / name).is_file()), run) if run.is_dir() else run
    if not file.is_file():
        raise ValueError(f"{run}: holds no metrics.jsonl. Name a run folder, or a metrics file")
    rows = read_rows(file)
    if not rows:
        raise ValueError(f"{file}: holds no step yet")
    recipe, steps = _recipe(file.parent / "recipe.toml", overrides)
    spec = recipe.watch.model_copy(update={"enabled": True})
    outcome = outcome_of(run) if run.is_dir() else judge(rows, steps)
    return Watched(str(run), outcome, replay(rows, spec))


def _recipe(file: Path, overrides: Sequence[str]) -> tuple[Recipe, int | None]:
    """The run's recipe and its steps; without one, defaults, and the run is taken for finished."""
    if file.is_file():
        recipe = Recipe.load(file, overrides)
        return recipe, recipe.steps
    tree: dict[str, Any] = {"steps": 1, "rollout": {"max_tokens": 1}}  # what a recipe must have; unused
    for item in overrides:
        override(tree, item)
    return Recipe.of(tree, "KEY=VALUE"), None


def watch_command(items: Sequence[str], as_json: bool = False, console: Console | None = None) -> list[Watched]:
    """Judges the runs, with `items` of the form KEY=VALUE as overrides, and prints what was found."""
    overrides = [item for item in items if "=" in item and not Path(item).exists()]
    for item in overrides:
        if not item.startswith("watch."):
            raise ValueError(f"{item!r}: only keys of [watch] can be changed here, such as watch.kl.warn=4")
    runs = [Path(item) for item in items if item not in overrides]
    if not runs:
        raise ValueError("no run to judge. Name a run folder, or a metrics file")
    found = [watched(run, overrides) for run in runs]
    shown = console or default_console()
    for run in found:
        if as_json:
            print(json.dumps(run.tree()))
        else:
            _show(run, shown)
    if len(found) > 1 and not as_json:
        for line in totals(found):
            shown.print(line, soft_wrap=True)
    return found


def _show(run: Watched, console: Console) -> None:
    console.print(Text.assemble((run.name, "bold"), f"  {run.outcome.kind}: {run.outcome.reason}"), soft_wrap=True)
    for alarm in run.alarms:
        for line in alarm_lines(alarm):
            console.print(line, soft_wrap=True)
    if not run.alarms:
        console.print(f"{'':6}  no alarm")
    if run.outcome.collapsed_at is not None:
        console.print(f"{'':6}  {_lead_words(run)}", soft_wrap=True)
    console.print()


def _lead_words(run: Watched) -> str:
    parts = []
    for level in LEVELS[1:]:
        steps = run.lead.get(level)
        if steps is None:
            parts.append(f"{level}: never")
        else:
            when = f"{steps} steps before" if steps > 0 else f"{-steps} steps after" if steps else "at"
            parts.append(f"{level}: {when} the collapse")
    return f"collapsed at step {run.outcome.collapsed_at}; first {', '.join(parts)}"


def totals(runs: Sequence[Watched]) -> list[str]:
    """Lead and false alarms over several runs, a line for each level."""
    fallen = [run for run in runs if run.outcome.kind == "collapsed"]
    others = [run for run in runs if run.outcome.kind != "collapsed"]
    lines = [f"{len(runs)} runs, {len(fallen)} of them collapsed"]
    for level in LEVELS:
        leads = [run.lead[level] for run in fallen if level in run.lead]
        ahead = sum(lead > 0 for lead in leads)
        middle = f", median lead {statistics.median(leads):g} steps" if leads else ""
        false = sum(level in run.first for run in others)
        lines.append(
            f"{level:<5}  in {len(leads)} of {len(fallen)} that collapsed, before it in {ahead}{middle}; "
            f"false alarms in {false} of {len(others)} that did not"
        )
    return lines
