"""Equations 5 to 7 need no forward pass under theta': training time of a `pg-is` step against a `grpo` step.

    python benchmarks/proximal.py [--rounds N]

Real runs on the built-in benchmark model, FP16, 4 gradient steps per batch as in section 4.1; training time is
time/proximal + time/update of metrics.jsonl. Runs take turns. Writes results/proximal.json. The bar is 0.8.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
from pathlib import Path

import torch
from common import write
from end_to_end import HAZARDS, NEW, PROMPTS, SAMPLES, make_folder
from rich.console import Console

from tenbit import Recipe, train


def training_seconds(folder: Path, algorithm: str) -> float:
    """Training seconds per step, without the first."""
    tree = {
        "steps": 3,
        "precision": "fp16",
        "model": {"path": str(folder)},
        "task": {"data": str(folder / "problems.jsonl"), "grader": "exact"},
        "algorithm": {"name": algorithm},
        "rollout": {"prompts": PROMPTS, "samples": SAMPLES, "max_tokens": NEW},
        "optim": {"updates": 4, "token_budget": 4096},
        "checkpoint": {"every": 0},
    }
    with tempfile.TemporaryDirectory() as scratch:
        out = train(Recipe.of(tree), Path(scratch) / "run", console=Console(file=io.StringIO()))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    return statistics.mean(row["time/proximal"] + row["time/update"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(2)
    seconds: dict[str, list[float]] = {"pg-is": [], "grpo": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder, HAZARDS["same"])
        for _ in range(options.rounds):
            for algorithm, found in seconds.items():
                found.append(training_seconds(folder, algorithm))
    ratios = [a / b for a, b in zip(seconds["pg-is"], seconds["grpo"], strict=True)]
    rounds = [round(r, 3) for r in ratios]
    print(f"pg-is / grpo training time: {statistics.median(ratios):.3f} (rounds: {rounds}), bar 0.8")
    print(write("proximal", {"seconds_per_step": seconds, "ratio": statistics.median(ratios), "bar": 0.8}))


if __name__ == "__main__":
    main()
