"""What a run looks like in a terminal, and in a log file: lines and tables, made from values.

On a terminal a progress bar stays below the lines. Elsewhere (`nohup`, CI) the same lines come plain, without a
control code, and never wrapped.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from tenbit.precision import Precision

Values = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Column:
    head: str
    width: int
    key: str
    show: Callable[[float], str]


def show_scale(value: float) -> str:
    """``2^16``; loss scales are powers of two unless a recipe says otherwise."""
    fraction, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if fraction == 0.5 else f"{value:.6g}"


COLUMNS = (
    Column("step", 6, "step", lambda v: f"{v:.0f}"),
    Column("reward", 8, "train/reward", lambda v: f"{v:.3f}"),
    Column("correct", 8, "train/accuracy", lambda v: f"{v:.1%}"),
    Column("tokens", 8, "train/response_length", lambda v: f"{v:.0f}"),
    Column("KL k3", 9, "mismatch/kl_k3", lambda v: f"{v:.1e}"),
    Column("grad", 8, "optim/grad_norm", lambda v: f"{v:.3g}"),
    Column("tok/s", 8, "perf/tokens_per_second", lambda v: f"{v:,.0f}"),
    Column("s/step", 8, "time/step", lambda v: f"{v:.1f}" if v < 100 else f"{v:.0f}"),
    Column("scale", 7, "optim/loss_scale", show_scale),
)


def step_line(row: Values) -> Text | None:
    """One line about a step; None for a row that only holds an evaluation."""
    shown = [(c, row.get(c.key)) for c in COLUMNS]
    if all(value is None for _, value in shown[1:]):
        return None
    line = Text("".join(f"{'–' if v is None else c.show(v):>{c.width}}" for c, v in shown))
    if row.get("optim/skipped"):
        line.append("  skipped", style="bold red")
    return line


def eval_lines(row: Values) -> list[Text]:
    """``eval SET  avg@8 71.2%  pass@8 93.0%``, one line a set."""
    sets: dict[str, list[str]] = {}
    for key, value in row.items():
        if key.startswith("eval/") and value is not None:
            name, _, metric = key.removeprefix("eval/").rpartition("/")
            share = "@" in metric
            sets.setdefault(name, []).append(f"{metric} {f'{value:.1%}' if share else f'{value:.4g}'}")
    return [Text(f"{'':6}  eval {name}  {'  '.join(found)}", style="cyan") for name, found in sets.items()]


def default_console() -> Console:
    """Standard output. A terminal that lacks a character shows a question mark; it must not end a run."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    return Console(highlight=False)


def is_live(console: Console) -> bool:
    """Whether a bar can be redrawn in place: a real terminal, whatever FORCE_COLOR and the like say."""
    isatty = getattr(console.file, "isatty", lambda: False)
    return console.is_interactive and bool(isatty())


# What `Precision.verify` counts, by the plan's key that it checks.
_CHECKS = {
    "master": "master",
    "optimizer": "optimizer",
    "compute": "copy",
    "reduce": "gradient",
    "logits": "logits",
    "rollout": "rollout",
}


def plan_table(precision: Precision, seen: Mapping[str, int]) -> Table:
    """The plan; ``live`` is the number of tensors that were found in the format the plan gives them."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False)
    table.add_column("part", no_wrap=True)
    table.add_column("format", style="bold", no_wrap=True)
    if seen:
        table.add_column("live", justify="right", style="green", no_wrap=True)
    table.add_column("what it is", style="dim")
    for part, shown, meaning in precision.rows():
        value, _, rules = shown.partition(", ")  # the loss scale's rules are a sentence, not a format
        count = seen.get(_CHECKS.get(part, ""))
        what = f"{rules}; {meaning}" if rules else meaning
        live = [f"{count:,}" if count else ""] if seen else []
        table.add_row(Text(part), Text(value), *live, Text(what))
    return table


def header() -> Text:
    """The names over `step_line`'s columns."""
    return Text("".join(f"{column.head:>{column.width}}" for column in COLUMNS), style="dim")


def progress_bar(console: Console) -> Progress:
    """Steps done, time gone, time left. Switched off where it could not be redrawn in place."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", style="dim"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left", style="dim"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not is_live(console),
        refresh_per_second=4,  # two cores have better things to do
        speed_estimate_period=24 * 3600.0,  # steps may take many minutes
    )
