"""The paper's claims held against the study's runs: FP16 beside BF16, algorithm by algorithm, seed by seed.

    python benchmarks/study.py --run             the study: hours on two cores; the same command goes on with it
    python benchmarks/study.py --pack runs/study compresses what was run into results/study, which is committed
    python benchmarks/study.py                   from there results/study.json, and the tables in docs/

Seeds are equal across cells, so differences are taken within a seed and averaged over seeds (and algorithms), with a
95% interval by Student's t over the pairs. Every figure comes from `metrics.jsonl.gz`, nothing is kept by hand.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from common import RESULTS, write

from tenbit import Recipe
from tenbit.outcome import Outcome, extreme, outcome_of
from tenbit.report.many_curves import interval
from tenbit.runlog import read_rows, write_atomic
from tenbit.signals import LEVELS
from tenbit.studies.ablation_grid import cell_name
from tenbit.studies.watching import watched

STUDY = RESULTS / "study"
DOCUMENTS = [Path(__file__).parents[1] / "docs" / name for name in ("results.md", "watch.md")]
RECIPE = Path(__file__).parents[1] / "recipes/cpu/sanity.toml"
ALGORITHMS = ("pg-is", "grpo", "grpo-token-tis", "grpo-seq-mis", "gspo")
SEEDS = (0, 1, 2)
LAST = 20  # steps whose mean is a run's final accuracy
PARTS: dict[str, list[str]] = {
    "builtin": ["--precision", "fp16,bf16", "--algorithm", ",".join(ALGORITHMS)],
    "pairs": ["--precision", "bf16/fp16,bf16/fp32", "--algorithm", "grpo"],
    "vllm": ["rollout.engine=vllm", "--precision", "fp16,bf16", "--algorithm", "grpo"],
    # too high a learning rate: what a collapse looks like
    "overdriven": ["optim.lr=2e-4", "steps=90", "--precision", "fp16,bf16", "--algorithm", "grpo"],
    "long": ["steps=180", "--precision", "fp16,bf16", "--algorithm", "pg-is,grpo"],
}
PILOTS = "pilots"  # short runs on seeds 100 and 101 that settings were chosen on; not in any figure
PRECISIONS = ("fp16", "bf16", "bf16/fp16", "bf16/fp32")
KEPT = ("recipe.toml", "summary.json", "alarms.jsonl")


@dataclass(frozen=True)
class Cell:
    rows: list[dict[str, Any]]
    outcome: Outcome

    @classmethod
    def read(cls, folder: Path) -> Cell:
        rows = read_rows(next(folder.glob("metrics.jsonl*")))
        return cls([r for r in rows if r.get("train/accuracy") is not None], outcome_of(folder, rows))

    @property
    def accuracy(self) -> float:
        return fmean(row["train/accuracy"] for row in self.rows[-LAST:])

    @property
    def area(self) -> float:
        """Mean accuracy of the whole run: how fast it learnt, and whether it kept it."""
        return fmean(row["train/accuracy"] for row in self.rows)

    @property
    def held_out(self) -> float | None:
        scores = [v for row in self.rows for k, v in row.items() if k.startswith("eval/") and "/avg@" in k]
        return scores[-1] if scores else None

    def typical(self, key: str) -> float:
        return median(row[key] for row in self.rows if row.get(key) is not None)

    @property
    def extreme(self) -> float:
        return max(v for row in self.rows if (v := extreme(row)) is not None)


class Part:
    """The cells of one ablation, by (algorithm, precision, seed)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def cell(self, algorithm: str, precision: str, seed: int) -> Cell | None:
        folder = self.folder / cell_name(algorithm, precision, seed)
        return Cell.read(folder) if (folder / "summary.json").is_file() else None  # finished

    def seeds(self, algorithm: str, precision: str) -> list[Cell]:
        return [c for seed in SEEDS if (c := self.cell(algorithm, precision, seed)) is not None]

    def paired(
        self, algorithms: Iterable[str], a: str, b: str, value: Callable[[Cell], float | None]
    ) -> list[tuple[float, float]]:
        """(value under a, value under b) of every algorithm and seed that has both."""
        found = []
        for algorithm in algorithms:
            for seed in SEEDS:
                cells = [self.cell(algorithm, precision, seed) for precision in (a, b)]
                values = [None if c is None else value(c) for c in cells]
                if None not in values:
                    found.append((values[0], values[1]))
        return found  # type: ignore[return-value]


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    mean, half = interval(values)
    return {"mean": mean, "half_width_95": half, "n": len(values)}


def difference(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    return mean_of([a - b for a, b in pairs])


def describe(part: Part, algorithm: str, precision: str) -> dict[str, Any] | None:
    """A line of the table of cells."""
    cells = part.seeds(algorithm, precision)
    if not cells:
        return None
    held_out = [c.held_out for c in cells if c.held_out is not None]
    return {
        "algorithm": algorithm,
        "precision": precision,
        "steps": [c.outcome.steps for c in cells],
        "outcomes": [c.outcome.kind for c in cells],
        "accuracy": mean_of([c.accuracy for c in cells]),
        "peak": [c.outcome.peak for c in cells],
        "area": mean_of([c.area for c in cells]),
        "held_out": mean_of(held_out) if held_out else None,
        "kl_k3": median(c.typical("mismatch/kl_k3") for c in cells),
        "seq_logratio_std": median(c.typical("mismatch/seq_logratio_std") for c in cells),
        "prob_diff": max(c.extreme for c in cells),
        "rollout_seconds": median(c.typical("time/rollout") for c in cells),
        "step_seconds": median(c.typical("time/step") for c in cells),
    }


def warned(part: Part) -> dict[str, Any] | None:
    """What early warning does on a part's runs, by the defaults of now: leads before collapse, and false alarms."""
    runs = [watched(folder) for folder in sorted(part.folder.glob("*")) if any(folder.glob("metrics.jsonl*"))]
    runs = [run for run in runs if run.outcome.kind != "running"]
    if not runs:
        return None
    fallen = [run for run in runs if run.outcome.kind == "collapsed"]
    return {
        "runs": len(runs),
        "collapsed": len(fallen),
        "lead": {level: [run.lead.get(level) for run in fallen] for level in LEVELS},
        "false": {level: sum(level in run.first for run in runs if run not in fallen) for level in LEVELS},
    }


def claims() -> dict[str, Any]:
    """The numbers behind docs/results.md."""
    parts = {name: Part(STUDY / name) for name in PARTS}
    builtin, vllm, two = parts["builtin"], parts["vllm"], ("fp16", "bf16")
    ratios = {
        name: mean_of([b / a for a, b in part.paired(some, *two, lambda c: c.typical("mismatch/seq_logratio_std"))])
        for name, part, some in (("builtin", builtin, ALGORITHMS), ("vllm", vllm, ("grpo",)))
        if part.paired(some, *two, lambda c: 0.0)
    }
    spread = {
        p: max(cs) - min(cs)
        for p in two
        if len(cs := [fmean(c.accuracy for c in x) for a in ALGORITHMS if (x := builtin.seeds(a, p))]) > 1
    }
    cells = [(name, a, p) for name in PARTS for a in ALGORITHMS for p in PRECISIONS]
    measures: dict[str, Callable[[Cell], float | None]] = {
        "accuracy": lambda c: c.accuracy, "area": lambda c: c.area, "held_out": lambda c: c.held_out,
    }  # fmt: skip

    def differences(part: Part, some: Sequence[str]) -> dict[str, Any]:
        return {m: difference(found) for m, value in measures.items() if (found := part.paired(some, *two, value))}

    by_part = {name: found for name, part in parts.items() if (found := differences(part, ALGORITHMS))}
    return {
        "command": "python benchmarks/study.py",
        "fp16_minus_bf16": by_part,
        "mismatch_bf16_over_fp16": ratios,
        "by_algorithm": {a: found for a in ALGORITHMS if (found := differences(builtin, [a]))},
        "spread_between_algorithms": spread,
        "watch": {name: found for name, part in parts.items() if (found := warned(part))},
        "cells": [row | {"part": n} for n, a, p in cells if (row := describe(parts[n], a, p)) is not None],
    }


def run(out: Path) -> None:
    for name, options in PARTS.items():
        command = [
            sys.executable,
            "-m",
            "tenbit",
            "ablate",
            str(RECIPE),
            *options,
            "--seeds",
            "3",
            "--out",
            str(out / name),
        ]
        subprocess.run(command, check=True)


def steps_of(part: str) -> int:
    return Recipe.load(RECIPE, [item for item in PARTS[part] if "=" in item]).steps


def pack(source: Path) -> None:
    """Run folders -> results/study: metrics with six digits, compressed; the same runs give the same bytes."""
    for name in (*PARTS, PILOTS):
        for file in sorted((source / name).glob("*/metrics.jsonl")):
            if name != PILOTS and read_rows(file)[-1]["step"] < steps_of(name):
                continue  # not finished; of `long`, not begun
            folder = STUDY / name / file.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({k: _short(v) for k, v in row.items()}) + "\n" for row in read_rows(file))
            write_atomic(folder / "metrics.jsonl.gz", gzip.compress("".join(lines).encode(), mtime=0))
            for kept in KEPT:
                if (file.parent / kept).is_file():
                    shutil.copy(file.parent / kept, folder / kept)


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def percent(found: dict[str, Any], signed: bool = False) -> str:
    half = f" ± {found['half_width_95']:.1%}" if found["half_width_95"] is not None else ""
    return f"{found['mean']:{'+' if signed else ''}.1%}{half}"


def cells_table(found: dict[str, Any]) -> list[str]:
    """The cells, as docs/results.md has them."""
    heads = ("part", "algorithm", "precision", "outcomes", "accuracy", "held out", "KL k3", "largest", "s/rollout")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for c in found["cells"]:
        outcomes = ", ".join(f"{c['outcomes'].count(k)} {k}" for k in dict.fromkeys(c["outcomes"]))
        held_out = percent(c["held_out"]) if c["held_out"] else "–"
        numbers = (f"{c['kl_k3']:.1e}", f"{c['prob_diff']:.3f}", f"{c['rollout_seconds']:.2f}")
        line = (c["part"], c["algorithm"], c["precision"], outcomes, percent(c["accuracy"]), held_out, *numbers)
        lines.append(f"| {' | '.join(line)} |")
    return lines


def differences_table(found: dict[str, Any]) -> list[str]:
    """FP16 less BF16, seed by seed."""
    lines = ["| FP16 − BF16, points | pairs | accuracy | mean accuracy of the run | held out |", "|---" * 5 + "|"]
    rows = [(f"{name}, all", values) for name, values in found["fp16_minus_bf16"].items()]
    rows += [(f"builtin, {name}", values) for name, values in found["by_algorithm"].items()]
    for name, values in rows:
        shown = (percent(values[key], signed=True) for key in ("accuracy", "area", "held_out"))
        lines.append(f"| {name} | {values['accuracy']['n']} | {' | '.join(shown)} |")
    return lines


def watch_table(found: dict[str, Any]) -> list[str]:
    """Early warning over finished runs, as docs/watch.md has it."""
    heads = ("runs", "finished", "collapsed", "lead of warn", "lead of act", "false alarms: note, warn, act")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, w in found["watch"].items():
        leads = (", ".join("never" if v is None else f"{v}" for v in w["lead"][level]) or "–" for level in LEVELS[1:])
        false = ", ".join(str(w["false"][level]) for level in LEVELS)
        lines.append(f"| {name} | {w['runs']} | {w['collapsed']} | {' | '.join(leads)} | {false} |")
    return lines


def show(found: dict[str, Any]) -> None:
    for lines in (cells_table(found), differences_table(found), watch_table(found)):
        print(*lines, "", sep="\n")
    print("spread between algorithms:", {k: f"{v:.1%}" for k, v in found["spread_between_algorithms"].items()})
    print("std of sequence log-ratio, BF16 / FP16:", found["mismatch_bf16_over_fp16"])


def written(text: str, tables: dict[str, list[str]]) -> str:
    """A document with its tables as they are now; each stands between ``<!-- NAME -->`` and ``<!-- end -->``."""
    for name, lines in tables.items():
        body = "\n".join(["", *lines, ""])
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, b=body: m[1] + b + "\n" + m[2], text, flags=re.S
        )
    return text


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
    return {"cells": cells_table(found), "differences": differences_table(found), "watch": watch_table(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the study into runs/study, or go on with it")
    parser.add_argument("--pack", type=Path, help="a folder of finished runs, for results/study")
    options = parser.parse_args()
    if options.run:
        run(Path("runs/study"))
    if options.pack or options.run:
        pack(options.pack or Path("runs/study"))
    found = claims()
    show(found)
    print(write("study", found))
    for document in DOCUMENTS:
        document.write_text(written(document.read_text(encoding="utf-8"), tables(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
