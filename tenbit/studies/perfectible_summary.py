"""The rows of `tenbit perfectible` as numbers, and what a terminal shows of them.

Computed from the rows as they stand in the file, so a run that was interrupted ends with the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.text import Text

from tenbit.studies.perfectible_plan import Plan
from tenbit.studies.perfectible_rule import VERDICTS

BINS = ("none right", *(f"{10 * i}%–{10 * i + 10}%" for i in range(10)), "all right")


def summarise(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of the summary, but for the settings.

    `accuracy` is over each problem's first round, whose size nothing was decided on: unbiased, unlike a mean of
    `initial_accuracy` where sampling stopped early. Tokens that were saved are an estimate, at each problem's own mean
    length.
    """
    first = plan.rule.more(0, 0, plan.round)
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    sampled, tokens = sum(r["samples"] for r in rows), sum(sum(r["lengths"]) for r in rows)
    of = plan.rule.samples * len(rows)
    unsampled = sum((plan.rule.samples - r["samples"]) * fmean(r["lengths"]) for r in rows)
    kept = [r for r in rows if r["verdict"] == "kept"]
    return {
        "finished": True,
        "model": plan.recipe.model.path,
        "data": plan.recipe.eval.data[0],
        "problems": len(rows),
        "kept": counts["kept"],
        "too_easy": counts["too easy"],
        "unsolvable": counts["unsolvable"],
        "samples": plan.rule.samples,
        "keeps": {"low": plan.low, "high": plan.high, "fewest": plan.rule.fewest, "most": plan.rule.most},
        "accuracy": fmean(r["responses"][:first].count("1") / first for r in rows),
        "accuracy_of_kept": fmean(r["initial_accuracy"] for r in kept) if kept else None,
        "histogram": histogram(rows),
        "responses": {"sampled": sampled, "of": of, "saved": of - sampled},
        "tokens": {"sampled": tokens, "saved_about": round(unsampled)},
        "stopped_early": sum(r["prefix"] for r in rows),
        "cut": sum(r["cut"] for r in rows),
        "grading_failed": sum(r["grading_failed"] for r in rows),
    }


def histogram(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many problems have which initial accuracy, by verdict: none right, tenths, all right."""
    out: list[dict[str, Any]] = [{"accuracy": name} | dict.fromkeys(VERDICTS, 0) for name in BINS]
    for row in rows:
        out[bin_of(row["correct"], row["samples"])][row["verdict"]] += 1
    return out


def bin_of(correct: int, samples: int) -> int:
    """The place among `BINS`; a border belongs to the bin above it."""
    if correct == 0:
        return 0
    return len(BINS) - 1 if correct == samples else 1 + 10 * correct // samples


def show(summary: Mapping[str, Any], console: Console) -> None:
    """The closing lines."""
    n, keeps, responses = summary["problems"], summary["keeps"], summary["responses"]
    borders = f"{keeps['fewest']} to {keeps['most']} of {summary['samples']} right"
    console.print()
    for name, count, what in (
        ("kept", summary["kept"], borders),
        ("too easy", summary["too_easy"], f"more than {keeps['most']} right"),
        ("unsolvable", summary["unsolvable"], f"fewer than {keeps['fewest']} right"),
    ):
        bold = "bold" if name == "kept" else ""
        console.print(Text.assemble((f"{name:<11}", bold), (f"{count:>7,}  {count / n:6.1%}", bold), f"  {what}"))
    share = responses["saved"] / responses["of"]
    console.print(
        f"saved       {responses['saved']:>6,}  {share:6.1%}  of {responses['of']:,} responses were not needed, "
        f"about {summary['tokens']['saved_about']:,} tokens",
        soft_wrap=True,
    )
    console.print(f"accuracy            {summary['accuracy']:6.1%}  of all problems", soft_wrap=True)
    for text in remarks(summary):
        console.print(text, soft_wrap=True)
    console.print()


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What must be known to read the numbers, where there is something."""
    out, sampled = [], summary["responses"]["sampled"]
    failed = summary["grading_failed"]
    if failed:
        out.append(f"{failed:,} responses ({failed / sampled:.1%}) could not be graded and count as wrong.")
    if not summary["kept"]:
        advice = "An easier or a harder set, or another template, may hold some."
        out.append(f"No problem is kept. {'Look at the grader first.' if failed else advice}")
    if summary["cut"]:
        share = summary["cut"] / sampled
        out.append(f"{share:.1%} of the responses were cut off by --max-tokens and graded as they stood.")
    return out
