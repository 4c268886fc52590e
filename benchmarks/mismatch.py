"""The mismatch of FP16 and BF16 on the built-in model: engine against backend, same weights, prompts and seeds.

    python benchmarks/mismatch.py [--prompts N] [--samples N]

What `[compare]` in a recipe does before training, at a larger size, for three formats. Writes results/mismatch.json.
The bar: KL (k3) of BF16 at least 24 times FP16's (the paper's Figure 2: about 24 times, at sequence level).
"""

from __future__ import annotations

import argparse

import torch
from common import write

from tenbit.compare import compare
from tenbit.models import loading
from tenbit.prompts import ask
from tenbit.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(2)
    recipe = Recipe.of(
        {
            "steps": 1,
            "rollout": {"max_tokens": 320},
            "compare": {"precisions": ["bf16", "fp16", "fp32"], "prompts": options.prompts, "samples": options.samples},
        }
    )
    model = loading.load(recipe.model)
    asked = ask(recipe.task.data, recipe, model, 320, None)
    rows = [compare(recipe, model, asked, name) for name in recipe.compare.precisions]
    for row in rows:
        print(
            f"{row['precision']}: KL k3 {row['kl_k3']:.3e}  seq log-ratio std {row['seq_logratio_std']:.3e}", end="  "
        )
        print(f"max |pi - mu| {max(-row['prob_diff_min'], row['prob_diff_max']):.3e}  tokens {row['tokens']}")
    bf16, fp16, _ = rows
    ratios = {key: bf16[key] / fp16[key] for key in ("kl_k3", "logp_abs_mean", "seq_logratio_std")}
    print({k: round(v, 1) for k, v in ratios.items()}, "bar for kl_k3: 24")
    print(write("mismatch", {"formats": rows, "bf16_over_fp16": ratios, "bar": {"kl_k3": 24}}))


if __name__ == "__main__":
    main()
