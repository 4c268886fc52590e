"""The mismatch of real vLLM against the single backend, on the built-in model: every length, every format.

    python benchmarks/vllm_mismatch.py [--sequences N]

By default 4 x 32 sequences of exactly 256, 384, 512 and 768 tokens (no stop token ends them), temperature 1, the same
prompts and seeds in each format. Writes results/vllm_mismatch.json. The bar: KL (k3) of BF16 at least 24 times FP16's.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from common import write

from tenbit import mismatch
from tenbit.engines.choose import make_engine
from tenbit.models import loading
from tenbit.precision import Precision
from tenbit.prompts import ask
from tenbit.recipe import Recipe
from tenbit.scoring import Scored, measured, train_logps
from tenbit.types import Prompt, Sampling

LENGTHS = (256, 384, 512, 768)
FORMATS = ("bf16", "fp16", "fp32")


def samples(recipe: Recipe, model: loading.Model, precision: Precision, each: int) -> list[Scored]:
    """Responses of every length, drawn by vLLM, scored by the single backend."""
    asked = ask("arithmetic_perfectible", recipe, model, max(LENGTHS), None)
    drawn = []
    with make_engine(recipe.rollout, model, precision, longest=model.context) as engine:
        engine.load_weights(precision.to_engine(model.module.state_dict().items()), version=0)
        for i, length in enumerate(LENGTHS):
            prompts = [Prompt(a.ids, seed=1000 * i + j) for j, a in enumerate(asked[:each])]
            drawn += engine.generate(prompts, Sampling(max_tokens=length))
    trained = train_logps(model, precision, recipe, [(c.prompt_ids, c.response_ids) for c in drawn])
    return [Scored(c.prompt_ids, c.response_ids, c.logp, t) for c, t in zip(drawn, trained, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=32, help="of each length")
    options = parser.parse_args()
    torch.set_num_threads(2)
    recipe = Recipe.of({"steps": 1, "rollout": {"max_tokens": max(LENGTHS), "engine": "vllm"}})
    model = loading.load(recipe.model)
    model = replace(model, module=model.module.eval())
    rows = []
    for name in FORMATS:
        scored = samples(recipe, model, Precision.parse(name), options.sequences)
        seen: mismatch.Mismatch = measured(scored)
        edges = [*LENGTHS, model.context]
        row = {"precision": name, **seen.metrics(), "by_length": seen.by_length(edges)}
        rows.append(row | {"sequences": len(scored), "tokens": sum(s.length for s in scored)})
        spread = "  ".join(f"{k}: {v['std']:.2e}" for k, v in row["by_length"].items())
        print(f"{name}: KL k3 {row['kl_k3']:.3e}  std of the sequence log-ratio by length {spread}", flush=True)
    bf16, fp16, fp32 = rows
    keys = ("kl_k3", "logp_abs_mean", "seq_logratio_std")
    result = {
        "formats": rows,
        "bf16_over_fp16": {k: bf16[k] / fp16[k] for k in keys},
        "fp16_over_fp32": {k: fp16[k] / fp32[k] for k in keys},
        "bar": {"bf16_over_fp16 kl_k3": 24},
    }
    print({k: round(v, 1) for k, v in result["bf16_over_fp16"].items()}, "bar for kl_k3: 24")
    print("fp16 over fp32:", {k: f"{v:.3g}" for k, v in result["fp16_over_fp32"].items()})
    print(write("vllm_mismatch", {"command": "python benchmarks/vllm_mismatch.py", **result}))


if __name__ == "__main__":
    main()
