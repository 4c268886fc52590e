"""The demo with both engines: does training reach the same accuracy when vLLM samples?

    python benchmarks/demo_engines.py [--torch RUN] [--vllm RUN]

Runs recipes/demo.toml once with each engine, or reads run folders that are finished. The same seed draws other tokens
in vLLM, so the curves are two samples of the same experiment, not the same curve. Writes results/demo_engines.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from common import write

from tenbit import Recipe, train

RECIPE = Path(__file__).parents[1] / "recipes/demo.toml"
LAST = 10


def summary(folder: Path) -> dict[str, Any]:
    """What a finished run reached."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "train/accuracy" in r]
    last = steps[-LAST:]
    evals = [r["eval/arithmetic_test/avg@2"] for r in rows if "eval/arithmetic_test/avg@2" in r]
    return {
        "steps": len(steps),
        "first_accuracy": steps[0]["train/accuracy"],
        f"accuracy_last_{LAST}": statistics.mean(r["train/accuracy"] for r in last),
        "held_out_first": evals[0],
        "held_out_last": evals[-1],
        "kl_k3_median": statistics.median(r["mismatch/kl_k3"] for r in steps),
        "skipped": sum(r["optim/skipped"] for r in steps),
        "seconds_per_step": statistics.median(r["time/step"] for r in steps),
        "sync_share": statistics.median(r["time/sync"] / r["time/step"] for r in steps[1:]),
        "accuracy": [round(r["train/accuracy"], 4) for r in steps],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path)
    parser.add_argument("--vllm", type=Path)
    options = parser.parse_args()
    result = {}
    for engine in ("torch", "vllm"):
        folder = getattr(options, engine) or train(Recipe.load(RECIPE, [f"rollout.engine={engine}"]))
        result[engine] = summary(folder)
        print(engine, {k: v for k, v in result[engine].items() if k != "accuracy"}, flush=True)
    print(write("demo_engines", {"command": "python benchmarks/demo_engines.py", **result}))


if __name__ == "__main__":
    main()
