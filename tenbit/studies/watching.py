"""`tenbit watch RUN...`: early warning tried on runs of the past, and how long before a collapse it would have come.

    tenbit watch runs/mine runs/ablation runs/other/metrics.jsonl watch.kl.warn=4

Each run's rows are replayed through the rules of its own recipe, with the overrides; of a metrics file without a recipe
beside it, through the defaults. *Lead* is the number of steps from the first alarm of a level, or of a higher one, to
`collapsed_at` of `outcome.judge`; that is negative where the alarm came after. An alarm in a run that went to its end
and did not collapse is a false one; of a run that is not finished, or that an alarm ended, nobody knows.
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
from tenbit.report.many_cells import find_runs
from tenbit.runlog import default_console, read_rows, rows_file
from tenbit.signals import LEVELS, SIGNALS, Row
from tenbit.watch import Alarm, alarm_lines, first_steps, replay

METRICS = ("metrics.jsonl", "metrics.jsonl.gz")
PARTS = ("train/", "mismatch/", "policy/", "optim/", "eval/")  # of a row of metrics, some of these
NAME_ONE = "Name a run folder, a folder that holds some, or a metrics file"


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
    file, rows = _rows(run)
    recipe, steps = _recipe(file.parent / "recipe.toml", overrides)
    spec = recipe.watch.model_copy(update={"enabled": True, "signals": recipe.watch.signals or tuple(SIGNALS)})
    outcome = outcome_of(file.parent, rows) if file.name in METRICS else judge(rows, steps)
    return Watched(str(run), outcome, replay(rows, spec))


def _rows(run: Path) -> tuple[Path, Sequence[Row]]:
    """A run's metrics file and what is in it."""
    file = (rows_file(run, "metrics") or run) if run.is_dir() else run
    if not file.exists():
        raise ValueError(f"{run}: there is no such file or folder. {NAME_ONE}")
    if not file.is_file():
        raise ValueError(f"{run}: holds no metrics.jsonl. {NAME_ONE}")
    try:
        rows = read_rows(file)
    except ValueError:
        if file.name in METRICS:
            raise
        rows = []
    if not all(any(key.startswith(PARTS) for key in row) for row in rows) or (not rows and file.name not in METRICS):
        raise ValueError(f"{file}: holds no metrics of a run. {NAME_ONE}")
    if not any(row["step"] for row in rows):
        raise ValueError(f"{file}: holds no step yet. It can be judged once the run has done one")
    return file, rows


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
    """Judges the runs, with `items` of the form KEY=VALUE as overrides, and prints what was found.

    What holds nothing to judge is left out with a remark if there are others: a shell puts all names for ``runs/*``.
    """
    overrides = [item for item in items if "=" in item and not Path(item).exists()]
    _check(overrides)
    paths = [Path(item) for item in items if item not in overrides]
    if not paths:
        raise ValueError(f"no run to judge. {NAME_ONE}")
    shown = console or default_console()
    runs, remarks = _judgeable(paths)
    if not runs:
        raise ValueError("\n".join(remarks))
    found = []
    for run in runs:
        found.append(watched(run, overrides))
        if as_json:
            print(json.dumps(found[-1].tree()))
        else:
            _show(found[-1], shown)
    notes = Console(stderr=True, highlight=False) if as_json else shown
    for remark in remarks:
        notes.print(Text(f"left out: {remark}", style="dim"), soft_wrap=True)
    if len(found) > 1 and not as_json:
        for line in totals(found):
            shown.print(line, soft_wrap=True)
    return found


def _check(overrides: Sequence[str]) -> None:
    """Whether they are overrides of [watch], before any run is read."""
    for item in overrides:
        if not item.startswith("watch."):
            raise ValueError(f"{item!r}: only keys of [watch] can be changed here, such as watch.kl.warn=4")
        if item.partition("=")[0].strip() == "watch.enabled":
            raise ValueError(f"{item!r}: this command judges every run that it is given. Leave the key out")


def _judgeable(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The runs of these paths, each once, and why the others are none. Raises ValueError for a path that is not there.

    A recipe that cannot be read without any override is a reason as well.
    """
    runs: dict[Path, Path] = {}
    remarks = []
    for path in paths:
        try:
            below = find_runs([path]) if path.is_dir() else [path]
        except ValueError as error:
            remarks.append(str(error))
            continue
        for run in below:
            try:
                file, _ = _rows(run)
                _recipe(file.parent / "recipe.toml", ())
            except ValueError as error:
                if not run.exists():
                    raise
                remarks.append(str(error))
            else:
                runs.setdefault(file.resolve(), run)
    return list(runs.values()), remarks


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
    """Lead and false alarms over several runs, a line for each level. Only a run at its end can say that an alarm was
    a false one."""
    fallen = [run for run in runs if run.outcome.kind == "collapsed"]
    others = [run for run in runs if run.outcome.kind in ("passed", "failed")]
    words = {"running": "not finished", "stopped": "ended by an alarm"}
    open_ended = {why: sum(run.outcome.kind == kind for run in runs) for kind, why in words.items()}
    unknown = [f"{count} {why}" for why, count in open_ended.items() if count]
    lines = [f"{len(runs)} runs, {len(fallen)} of them collapsed"]
    if unknown:
        lines[0] += f"; {' and '.join(unknown)}: not counted below, as nobody knows what would have become of them"
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
