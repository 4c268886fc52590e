"""An audit in the terminal: the modules nearest to an edge, the verdict, the remedies as a recipe writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenbit.report.words import number, percent, power_of_two, scientific
from tenbit.studies.audit_anatomy import is_wide
from tenbit.studies.audit_forward import Place, Range
from tenbit.studies.audit_notes import seen as said_seen
from tenbit.studies.audit_verdict import narrowest, toml_lines

if TYPE_CHECKING:
    from tenbit.studies.audit import Audit

STYLES = {"safe": "bold green", "safe with": "bold yellow", "unsafe": "bold red"}
ROWS, REASONS = 6, 8


def show(audit: Audit, console: Console) -> None:
    wide = Console(file=console.file, highlight=False, width=max(console.width, 100))
    wide.print("", forward(audit), "", backward(audit), "", sep="\n")
    if any(not w.fits or w.lossy for w in audit.weights):
        wide.print(weights(audit), "", sep="\n")
    v = audit.verdict
    lines = toml_lines(v.remedies)
    otherwise = f": train it in {' or '.join(audit.instead)}" if audit.instead else ""
    what = {"safe": f" in {audit.base.name}", "unsafe": f" in {audit.base.name}{otherwise}"}
    looked = f"   {said_seen(audit.answers, audit.tokens)} seen"
    end = what.get(v.kind, f", for {audit.base.name}:")
    console.print(Text.assemble((v.kind.upper(), STYLES[v.kind]), end, (looked, "dim")), soft_wrap=True)
    if lines:
        console.print(Text("[precision]\n" + "\n".join(lines), style="bold"), soft_wrap=True)
    for text in v.because[:REASONS]:
        console.print(Text(f"  {text}"), soft_wrap=True)
    if len(v.because) > REASONS:
        console.print(Text(f"  and {len(v.because) - REASONS} more, in audit.json", style="dim"))
    for text in (*audit.unfollowed, *audit.notes):
        console.print(Text(f"note: {text}", style="yellow"), soft_wrap=True)
    if audit.trial is not None:
        console.print(Text(_tried(audit), style="dim"), soft_wrap=True)
    asked = audit.settings.get("answers", {})
    if asked:
        stop = f", stop tokens {', '.join(map(repr, asked['stop_tokens']))}" if asked["stop_tokens"] else ""
        at = f"temperature {asked['temperature']:g}, up to {asked['max_tokens']:,} tokens"
        said = f"asked with template {asked['template']!r}{stop}, {at}"
        console.print(Text(said, style="dim"), soft_wrap=True)


def _tried(audit: Audit) -> str:
    trial = audit.trial
    assert trial is not None
    if trial.failed:
        return f"tried in {audit.plan.name}: {trial.failed}"
    at = f" at a loss scale of {power_of_two(trial.scale)}" if audit.plan.loss_scale else ""
    return (
        f"tried in {audit.plan.name}: all finite{at}; KL from FP32 "
        f"{scientific(trial.trainer or 0)}, between training and sampling {scientific(trial.engine or 0)} per token; "
        f"the gradient's norm off by {scientific(trial.bent or 0)} of itself"
    )


def _table(*heads: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for i, head in enumerate(heads):
        table.add_column(Text(head), no_wrap=True, justify="left" if i == 0 else "right")
    return table


def forward(audit: Audit) -> Table:
    """The places with the largest activations that the plan holds in 16 bits."""
    top = narrowest(audit.plan.compute, audit.plan.rollout).largest
    first: dict[Range, Place] = {}  # what was measured of two places is equal if they hold the same tensor
    for place, seen in audit.seen.forward.items():
        if not is_wide(place, audit.plan, audit.anatomy):
            first.setdefault(seen, place)
    held = {place: seen for seen, place in first.items()}
    table = _table("forward, the largest", "|x|", f"below {top:.6g} by")
    for place in sorted(held, key=lambda p: -held[p].largest)[:ROWS]:
        largest = held[place].largest
        table.add_row(Text(str(place)), number(largest), f"{number(top / largest)}×" if largest else "–")
    return table


def backward(audit: Audit) -> Table:
    """The places with the largest gradients, and the one that decides the lowest loss scale."""
    held = {p: h for p, h in audit.seen.backward.items() if h.values and not is_wide(p, audit.plan, audit.anatomy)}
    window, at = audit.window, power_of_two(audit.scale)
    table = _table("backward, the largest, and the first to vanish", "|g| up to", "flushed at 1", f"flushed at {at}")
    chosen = sorted(held, key=lambda p: -held[p].largest)[: ROWS - 1]
    if window.low_at is not None and window.low_at not in chosen:
        chosen.append(window.low_at)
    for place in chosen:
        shares = (percent(held[place].at(scale).flushed_share) for scale in (1.0, audit.scale))
        table.add_row(Text(str(place)), number(held[place].largest), *shares)
    if audit.plan.loss_scale is not None:
        low, high = power_of_two(window.low), power_of_two(window.high) if window.high_at else "∞"
        said = f"loss scales from {low} to {high} lose nothing"
        said = f"no loss scale fits: {low} is needed, {high} allowed" if window.empty else said
        table.caption = Text(said, style="bold")
        table.caption_justify = "left"
    return table


def weights(audit: Audit) -> Table:
    table = _table("weights that the cast changes", "become inf", "become 0", "subnormal", "error of the norm")
    for w in [w for w in audit.weights if not w.fits or w.lossy][:ROWS]:
        table.add_row(
            Text(f"{w.name} ({w.format})"),
            f"{w.overflowed:,}",
            f"{w.flushed:,}",
            f"{w.subnormal:,}",
            percent(w.rms_error),
        )
    return table
