"""FP8 rollouts with FP16 training: what the mismatch becomes, on the built-in model with the built-in engine.

    python benchmarks/fp8.py [--prompts N] [--samples N]        some two minutes; no timings, any machine will do
    python benchmarks/fp8.py --training FOLDER                   adds an ablation's runs to the result (docs/fp8.md)

The paper leaves FP8 rollouts open. Here the weights of linear layers are rounded to e4m3 with a scale a row, as engines
that quantise do; everything is still computed in 16 bits, so this is the rounding alone. Each row is one precision on
the same weights, prompts and seeds. Writes results/fp8.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write

from tenbit.compare import compare
from tenbit.models import loading
from tenbit.outcome import outcome_of
from tenbit.prompts import ask
from tenbit.recipe import Recipe
from tenbit.runlog import read_rows, rows_file

PAGE = Path(__file__).parent.parent / "docs" / "fp8.md"
PRECISIONS = ("fp32", "fp16", "bf16", "fp16/fp16~5", "fp16/fp16~4", "fp16/fp16~3", "fp16/fp8", "bf16/fp8")


def mismatch(prompts: int, samples: int) -> list[dict[str, Any]]:
    recipe = Recipe.of(
        {
            "steps": 1,
            "rollout": {"max_tokens": 320},
            "compare": {"precisions": PRECISIONS, "prompts": prompts, "samples": samples},
        }
    )
    model = loading.load(recipe.model)
    asked = ask(recipe.task.data, recipe, model, 320, None)
    rows = []
    for name in recipe.compare.precisions:
        row = compare(recipe, model, asked, name)
        rows.append({k: v for k, v in row.items() if k != "by_length"})
        spread, ess = row["seq_logratio_std"], row["seq_ess"]
        print(f"{name:12} KL k3 {row['kl_k3']:.2e}  seq log-ratio std {spread:.2e}  ESS {ess:.3f}")
    return rows


def training(folder: Path) -> list[dict[str, Any]]:
    """Of each run of an ablation: how it ended, and its mismatch at the start and over its last tenth."""
    found = []
    for run in sorted(p.parent for p in folder.glob("*/recipe.toml")):
        file = rows_file(run, "metrics")
        rows = [r for r in read_rows(file) if r["step"]] if file else []
        recipe, last = Recipe.load(run / "recipe.toml"), rows[-max(1, len(rows) // 10) :]
        outcome = outcome_of(run)
        found.append(
            {
                "precision": recipe.precision.name,
                "algorithm": recipe.algorithm.name,
                "seed": recipe.seed,
                "steps": len(rows),
                "outcome": outcome.kind,
                "accuracy": sum(r["train/accuracy"] for r in last) / len(last),
                "kl_k3_first": rows[0]["mismatch/kl_k3"],
                "kl_k3_last": sum(r["mismatch/kl_k3"] for r in last) / len(last),
                "outside_last": sum(r["correction/outside"] for r in last) / len(last),
            }
        )
    return found


def tables(result: dict[str, Any]) -> dict[str, list[str]]:
    """What docs/fp8.md shows, between its marks."""
    fp16 = next(row["kl_k3"] for row in result["mismatch"] if row["precision"] == "fp16")
    apart = ["| training / rollout | KL k3 | against FP16 | std of Σ log π − log μ | ESS |", "|---|---|---|---|---|"]
    for row in result["mismatch"]:
        ratio = f"{row['kl_k3'] / fp16:,.0f}×" if row["kl_k3"] > fp16 else ""
        spread, ess = row["seq_logratio_std"], row["seq_ess"]
        apart.append(f"| {row['precision']} | {row['kl_k3']:.1e} | {ratio} | {spread:.1e} | {ess:.3f} |")
    runs = [
        "| algorithm | precision | seed | accuracy, last tenth | KL k3, first step | last tenth |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["training"]:
        name = f"| {row['algorithm']} | {row['precision']} | {row['seed']} "
        runs.append(f"{name}| {row['accuracy']:.1%} | {row['kl_k3_first']:.1e} | {row['kl_k3_last']:.1e} |")
    return {"mismatch": apart, "training": runs}


def write_page(result: dict[str, Any]) -> None:
    text = PAGE.read_text()
    for name, lines in tables(result).items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        head, rest = text.split(begin)
        text = head + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--training", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    file = RESULTS / "fp8.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    if options.training is not None:
        result = {"mismatch": before["mismatch"], "training": training(options.training)}
        for row in result["training"]:
            print({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    else:
        result = {"mismatch": mismatch(options.prompts, options.samples), "training": before.get("training", [])}
    print(write("fp8", result))
    write_page(result)


if __name__ == "__main__":
    main()
