"""`tenbit sanity`: the paper's sanity test (section 4.1) on one recipe, or on a run that is there.

    outcome, evidence = examine(Path("runs/sanity"))

Train on problems that the model can solve and does not always solve (the perfectible set): a method that works must
bring training accuracy above 95%. One that does not either **failed** (it never got there) or **collapsed** (it got
somewhere and lost it); `tenbit.outcome` says how that is told. The evidence is what the paper's section 4.2 looks at:
whether the mismatch grew before, and how far the two policies were apart at worst.

A run folder gets `sanity.json`, and its report page shows the verdict. The command's exit status is 0 for a pass only,
so that a nightly job can hold a stack to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenbit.console import default_console
from tenbit.loop import Halted, train
from tenbit.outcome import WINDOW, Outcome, extreme, outcome_of
from tenbit.recipe import Recipe
from tenbit.report import write_report
from tenbit.runlog import read_rows, rows_file, write_atomic

FILE = "sanity.json"
STYLES = {"passed": "bold green", "failed": "bold yellow", "collapsed": "bold red"}


def sanity_command(recipe: Path, overrides: Sequence[str], out: Path | None, resume: bool) -> Outcome:
    """Trains as `recipe` says, or takes the run folder that it is, then judges. Raises what training raises."""
    console = default_console()
    if recipe.is_dir():
        given = [*overrides, *(["--out"] if out else []), *(["--resume"] if resume else [])]
        if given:
            raise ValueError(f"{given[0]}: {recipe} is a run that is there; it is judged as it is. Leave this out")
        folder = recipe
    else:
        try:
            folder = train(Recipe.load(recipe, overrides), out, resume=resume, console=console)
        except Halted as end:  # by watch.act = "stop": a verdict, too
            folder = end.folder
    outcome, evidence = examine(folder)
    record = {"verdict": outcome.kind, **outcome.tree(), "evidence": evidence}
    write_atomic(folder / FILE, json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
    page = write_report(folder)
    show(outcome, evidence, console)
    console.print(Text.assemble(("verdict  ", "dim"), str(folder / FILE)), soft_wrap=True)
    console.print(Text.assemble(("report   ", "dim"), str(page)), soft_wrap=True)
    return outcome


def examine(folder: Path) -> tuple[Outcome, dict[str, Any]]:
    """A run's outcome, and what its mismatch did. Raises ValueError if there is no run."""
    metrics = rows_file(folder, "metrics")
    if metrics is None:
        cells = sorted(file.parent.name for file in folder.glob("*/metrics.jsonl*"))
        there = f". There are runs in it: {', '.join(cells[:3])}, ..." if cells else ""
        raise ValueError(f"{folder}: no metrics.jsonl here. Name a recipe (.toml), or one run folder{there}")
    rows = read_rows(metrics)
    outcome = outcome_of(folder, rows)
    return outcome, evidence(rows, outcome)


def evidence(rows: Sequence[Mapping[str, Any]], outcome: Outcome) -> dict[str, Any]:
    """The mismatch at the start, at the peak of accuracy and at the end (of a collapse: at its step); medians of the 20
    steps up to there. `prob_diff` is the largest |pi - mu| of the run and its step."""
    steps = [row for row in rows if row.get("train/accuracy") is not None]
    if not steps:
        return {}
    places = {
        "start": steps[0]["step"] + WINDOW - 1,
        "peak": outcome.peak_step,
        "end": outcome.collapsed_at or outcome.steps,
    }
    found: dict[str, Any] = {}
    for name, key in (("kl_k3", "mismatch/kl_k3"), ("entropy", "policy/entropy"), ("grad_norm", "optim/grad_norm")):
        at = {place: _median(steps, key, step) for place, step in places.items() if step is not None}
        if any(value is not None for value in at.values()):
            found[name] = at
    extremes = [(value, row["step"]) for row in steps if (value := extreme(row)) is not None]
    if extremes:
        found["prob_diff"], found["prob_diff_step"] = max(extremes)
    skipped = [row["optim/skipped"] for row in steps if row.get("optim/skipped") is not None]
    return found | ({"skipped": sum(skipped)} if skipped else {})


def _median(steps: Sequence[Mapping[str, Any]], key: str, last: int) -> float | None:
    """Of the `WINDOW` steps up to `last`."""
    known = [row[key] for row in steps if last - WINDOW < row["step"] <= last and row.get(key) is not None]
    return median(known) if known else None


def show(outcome: Outcome, found: Mapping[str, Any], console: Console) -> None:
    """The verdict, and what speaks for it."""
    console.print()
    console.print(Text.assemble((outcome.kind.upper(), STYLES.get(outcome.kind, "bold")), f"  {outcome.reason}"))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, label in (("kl_k3", "mismatch, KL k3"), ("entropy", "entropy"), ("grad_norm", "gradient norm")):
        if name in found:
            shown = (f"{place} {value:.2g}" for place, value in found[name].items() if value is not None)
            table.add_row(label, ", ".join(shown))
    if "prob_diff" in found:
        table.add_row("largest |π − μ|", f"{found['prob_diff']:.3g} at step {found['prob_diff_step']}")
    if found.get("skipped"):
        table.add_row("skipped updates", f"{found['skipped']:.0f}")
    console.print(table)
