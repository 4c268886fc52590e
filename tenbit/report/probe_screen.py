"""A probe in the terminal: measures with intervals, sequence log-ratios by length, the worst tokens, the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenbit.report.probe_words import LABELS, ROUTING, compact, harmless, read, verdict
from tenbit.report.words import factor, number, scientific
from tenbit.studies.probe import Pair, Study
from tenbit.studies.probe_measures import Measure

WORST = 3
LABEL, CELL, ROOM_BEFORE_CONTEXT = 34, 33, 88  # characters


def show(study: Study, console: Console) -> None:
    """Tables are cut into as many columns as fit, two at least; a narrow window scrolls or wraps."""
    wide = Console(file=console.file, highlight=False, width=max(console.width, 100))
    beside = max(2, (wide.width - LABEL) // CELL)
    for i in range(0, len(study.pairs), beside):
        some = study.pairs[i : i + beside]
        wide.print(measures(some), "", by_length(some), "", sep="\n")
    for a, b, found in study.ratios():
        said = ", ".join(f"{_SIZE[k]} {factor(m.value)}{_within(m.low, m.high)}" for k, m in found.items())
        console.print(Text(f"{a.name} over {b.name}: {said}"))
    wide.print("", worst(study, max(12, wide.width - ROOM_BEFORE_CONTEXT)), sep="\n")
    if study.attribution:
        from tenbit.studies.attribution import show as show_causes

        for found in study.attribution.values():
            console.print()
            show_causes(found, wide)
    for name, why in study.left_out.items():
        console.print(Text(f"\n{name} left out: {why}", style="bold red"))
    for text in study.notes:
        console.print(Text(f"\nnote: {text}", style="yellow"))
    console.print()
    for text in verdict(study):
        console.print(Text(text))


_SIZE = {
    "kl_k3": "KL",
    "logp_abs_mean": "|log ratio|",
    "prob_diff_abs_mean": "|π − μ|",
    "seq_logratio_std": "spread of sequences",
}


def _within(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({factor(low)} to {factor(high)})"


def _table(*heads: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for i, head in enumerate(heads):
        table.add_column(Text(head), no_wrap=True, justify="left" if i == 0 else "right")
    return table


def measures(pairs: Sequence[Pair]) -> Table:
    table = _table("training/sampling", *(p.name for p in pairs))
    for key, label, form in LABELS:
        found = [compact(read(pair, key), form) for pair in pairs]
        table.add_row(Text(label), *(Text.assemble((value, "bold"), (within, "dim")) for value, within in found))
    for key, label in ROUTING:
        if any(p.routing for p in pairs):
            table.add_row(label, *(scientific(p.routing[key]) if p.routing else "–" for p in pairs))
    table.add_row("tokens", *(f"{p.tokens:,}" for p in pairs))
    table.add_row("responses", *(f"{len(p.table):,}" for p in pairs))
    return table


def by_length(pairs: Sequence[Pair]) -> Table:
    buckets = sorted({b for p in pairs for b in p.by_length}, key=lambda b: int(b.split("-")[0]))
    table = _table("std of Σ, by response tokens", *(p.name for p in pairs))
    for bucket in buckets:
        cells = []
        for pair in pairs:
            found = pair.by_length.get(bucket)
            if found is None:
                cells.append(Text("–"))
                continue
            value, within = compact(Measure(**found["std"]), scientific)
            cells.append(Text.assemble((value, "bold"), (f"{within} n={found['n']:,}", "dim")))
        table.add_row(Text(bucket), *cells)
    return table


def worst(study: Study, room: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for head in ("largest |log π/μ|", "π", "μ", "|log π/μ|", "token", "it is", "after"):
        table.add_column(head, no_wrap=True)
    for pair in study.pairs:
        for row in pair.worst(study.tokenizer)[:WORST]:
            table.add_row(
                Text(pair.name),
                number(row["pi"]),
                number(row["mu"]),
                number(abs(row["logratio"])),
                f"{row['position'] + 1} of {row['length']}",
                Text(repr(row["token"])[:12]),
                Text(harmless(row["context"])[-room:], style="dim"),
            )
    return table
