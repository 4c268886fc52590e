"""An evaluation's rows -> its numbers (`evaluation.json`) and the tables that a terminal shows.

    result = summarise(plan, {"rollout": rows, "train": rows}, {"rollout": "vllm fp16", ...})
    show(result, console)

Everything is computed from the rows as they stand in the files, so an evaluation that was interrupted ends with the
same numbers. Each score comes with a 95% interval over problems (`evaluate.interval`): it says how far the score could
be off for problems of this kind, not only for more samples of these. With several sets there is also "all sets",
their problems taken together.

The gap is pi's score less mu's, problem by problem; its interval is of those differences. It can be told from zero
when the interval leaves zero out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenbit.evaluate import Judged, Scores, difference_interval, interval, ks_of, per_problem
from tenbit.studies.evaluation_plan import Plan

Rows = list[dict[str, Any]]
Estimate = dict[str, float]  # value, low, high

ALL = "all sets"
PAIRING = (
    "Both sides draw with the same seeds. On one engine a response is the same on both until rounding changes a token, "
    "so chance that both share drops out of the gap and its interval: the interval is of this paired difference, and "
    "two samples with seeds of their own would lie further apart. Another engine draws its own random numbers, and "
    "responses differ wherever chance decides."
)
SYMBOL = {"rollout": "μ", "train": "π"}


def summarise(plan: Plan, rows: Mapping[str, Rows], words: Mapping[str, str]) -> dict[str, Any]:
    """The content of evaluation.json. `rows` and `words` (what each side is) by the side's name."""
    sets = list(dict.fromkeys(row["set"] for row in rows["rollout"]))
    results = []
    for name in [*sets, ALL] if len(sets) > 1 else sets:
        for budget in plan.budgets:
            groups = {
                side: [r["samples"] for r in found if r["max_tokens"] == budget and name in (r["set"], ALL)]
                for side, found in rows.items()
            }
            results.append({"set": name, "max_tokens": budget} | _result(groups, plan.recipe.seed))
    recipe = plan.recipe
    return {
        "model": recipe.model.path,
        "precision": recipe.precision.name,
        "policies": dict(words),
        "samples": recipe.eval.samples,
        "temperature": recipe.eval.temperature,
        "top_p": recipe.eval.top_p,
        "template": recipe.task.template,
        "grader": recipe.task.grader,
        "seed": recipe.seed,
        "confidence": 0.95,
        "results": results,
    }


def _result(groups: Mapping[str, Sequence[Sequence[dict[str, Any]]]], seed: int) -> dict[str, Any]:
    """One set under one budget: the scores of each side, and the gap where there are two."""
    ks = ks_of(len(groups["rollout"][0]))
    scores = {side: _scores(found, ks) for side, found in groups.items()}
    out: dict[str, Any] = {}
    for side, found in groups.items():
        estimates = _named(scores[side], *interval(_stacked(scores[side]), seed=seed))
        out[side] = {"scores": estimates} | _lengths(found)
    if len(scores) == 2:
        gap = {name: scores["train"][name] - scores["rollout"][name] for name in scores["rollout"]}
        out["gap"] = _named(gap, *difference_interval(_stacked(gap), ks[-1], seed=seed))
        out["differing"] = _differing(groups["train"], groups["rollout"])
    return out


def _differing(one: Sequence[Sequence[dict[str, Any]]], other: Sequence[Sequence[dict[str, Any]]]) -> dict[str, int]:
    """How many responses are not the same tokens on both sides; each has the same prompt and seed there."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return {"responses": sum(a["ids"] != b["ids"] for a, b in pairs), "of": len(pairs)}


def _scores(groups: Sequence[Sequence[dict[str, Any]]], ks: Sequence[int]) -> Scores:
    judged = [[Judged(**{"text": "", **{k: v for k, v in s.items() if k != "ids"}}) for s in group] for group in groups]
    return per_problem(judged, ks)


def _stacked(scores: Scores) -> NDArray[np.float64]:
    return np.stack(list(scores.values()), axis=1)


def _named(scores: Scores, low: NDArray[np.float64], high: NDArray[np.float64]) -> dict[str, Estimate]:
    return {
        name: {"value": float(values.mean()), "low": float(a), "high": float(b)}
        for (name, values), a, b in zip(scores.items(), low, high, strict=True)
    }


def _lengths(groups: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float | int]:
    """What the responses were like, whatever they scored."""
    every = [sample for group in groups for sample in group]
    return {
        "problems": len(groups),
        "length": fmean(s["length"] for s in every),
        "truncated": fmean(s["finish"] == "length" for s in every),
        "no_answer": fmean(s["vote"] is None for s in every),
        "grading_failed": sum(s["failure"] is not None for s in every),
    }


# --- the terminal


def show(result: Mapping[str, Any], console: Console) -> None:
    """Scores with intervals, a table for each set; the responses' lengths, pass@k and maj@k by k; then the gap."""
    n, policies = result["samples"], result["policies"]
    if len(policies) > 1:
        console.print(Text.assemble("\n", *(f"{SYMBOL[side]} is {words}   " for side, words in policies.items())))
    main = [f"avg@{n}"] if n == 1 else [f"avg@{n}", f"pass@{n}", f"maj@{n}"]
    for name in dict.fromkeys(r["set"] for r in result["results"]):
        results = [r for r in result["results"] if r["set"] == name]
        problems = results[0]["rollout"]["problems"]
        console.print(Text.assemble("\n", (name, "bold"), f"  {problems} problem{'s' * (problems != 1)}"))
        rows = _cells(results, lambda side: [_percent(side["scores"][m]) for m in main])
        console.print(_table(["tokens", "", *main], [row[1:] for row in rows]))
    tables = [(["length", "cut off", "no answer"], _described)]
    for metric in ("pass", "maj") if n > 1 else ():
        names = [m for m in result["results"][0]["rollout"]["scores"] if m.startswith(f"{metric}@")]
        tables.append((names, lambda side, names=names: [f"{100 * side['scores'][m]['value']:.1f}" for m in names]))
    for heads, numbers in tables:
        console.print()
        console.print(_table(["set", "tokens", "", *heads], _cells(result["results"], numbers)))
    if "train" in policies:
        console.print()
        for line in gap_lines(result):
            console.print(line, soft_wrap=True)
    failed = sum(r[side]["grading_failed"] for r in result["results"] for side in policies if r["set"] != ALL)
    if failed:
        console.print(f"{failed} responses could not be graded (a hang, a crash or an error) and count as wrong.")
    if result["temperature"] == 0 and n > 1:
        console.print("At temperature 0 the responses to a problem are all equal; --samples 1 says as much.")
    console.print()


def _cells(results: Iterable[Mapping[str, Any]], numbers: Callable[[dict[str, Any]], list[str]]) -> list[list[str]]:
    """Rows of a table: set, budget and policy, then `numbers` of each; what repeats is left blank."""
    rows, before = [], ""
    for r in results:
        found = [side for side in SYMBOL if side in r]
        for i, side in enumerate(found):
            policy = SYMBOL[side] if len(found) > 1 else ""
            name = r["set"] if r["set"] != before else ""
            rows.append([name, f"{r['max_tokens']:,}" if i == 0 else "", policy, *numbers(r[side])])
            before = r["set"]
    return rows


def _described(side: dict[str, Any]) -> list[str]:
    return [f"{side['length']:,.0f}", f"{side['truncated']:.1%}", f"{side['no_answer']:.1%}"]


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def gap_lines(result: Mapping[str, Any]) -> list[Text]:
    """The deployment gap of avg@k, a line for each set and budget, and what must be known to read it."""
    metric = f"avg@{result['samples']}"
    policies = result["policies"]
    lines = [
        Text.assemble(
            ("deployment gap", "bold"),
            f"  {metric} of π ({policies['train']}) less that of μ ({policies['rollout']}), in points",
        )
    ]
    for r in result["results"]:
        found = r["gap"][metric]
        numbers = f"{100 * found['value']:+.2f} [{100 * found['low']:+.2f}, {100 * found['high']:+.2f}]"
        where = f"  {r['set']}, {r['max_tokens']:,} tokens  "
        lines.append(Text.assemble(where, (numbers, "bold"), f"  {verdict(found)}"))
        differing, of = r["differing"]["responses"], r["differing"]["of"]
        said = f"    {differing:,} of {of:,} responses differ between π and μ"
        if not differing:
            said += ": the two are one sample here, so this gap says nothing about other problems or seeds"
        lines.append(Text(said))
    lines.append(Text(PAIRING, style="dim"))
    return lines


def verdict(gap: Estimate) -> str:
    """Whether a gap can be told from zero, in words."""
    if gap["low"] > 0:
        return "the trained policy scores higher than the deployed one"
    if gap["high"] < 0:
        return "the deployed policy scores higher than the trained one"
    return "cannot be told from zero"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for i, head in enumerate(heads):
        words = head in ("set", "")
        table.add_column(
            head, style="bold" if i == 0 else "", justify="left" if words else "right", no_wrap=i > 0, overflow="fold"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table
