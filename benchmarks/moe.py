"""Mixtures of experts: how differently sampler and trainer route the same tokens, and what replay does about it.

    python benchmarks/moe.py [--sequences N] [--engines torch vllm]
    python benchmarks/moe.py --model models/mixture             a trained one: python -m tenbit.models.upcycle makes it

A random Qwen3-MoE (4 layers, 32 experts of which each token takes 4), sampled at temperature 1 by each engine, in each
format, with the router in FP32 and in the model's format; the same responses are scored by the single backend without
and with routing replay. With --model, a mixture that can do arithmetic, on its own problems, routers in FP32. Nothing
here depends on how fast anything is. Writes results/moe.json or results/moe_trained.json, which docs/moe.md shows.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from common import write
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, set_seed

from tenbit.models import loading
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.prompts import ask
from tenbit.recipe import ModelSpec, Recipe
from tenbit.scoring import measured, sample, score
from tenbit.types import Prompt, merge

FORMATS, ROUTERS, ENGINES = ("fp16", "bf16", "fp32"), ("fp32", "model"), ("torch", "vllm")
TOKENS, LONGEST_PROMPT = 256, 64
KEYS = ("kl_k3", "logp_abs_max", "seq_logratio_std", "seq_ess")
SHAPE = {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "intermediate_size": 256,
    "norm_topk_prob": True, "max_position_embeddings": 512, "initializer_range": 0.08, "tie_word_embeddings": False,
}  # fmt: skip


def random_mixture() -> Model:
    """FP32 weights; the tokenizer is the built-in model's, for it must have one."""
    set_seed(0)
    tokenizer = loading.load_tokenizer(ModelSpec.model_validate({"path": "builtin"}))
    module: Any = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SHAPE, bos_token_id=None, eos_token_id=None))
    return Model(module.eval(), tokenizer, (), 0, SHAPE["max_position_embeddings"], torch.device("cpu"))


def row(model: Model, engine: str, name: str, router: str, prompts: list[Prompt]) -> dict[str, Any]:
    """One plan on one engine: the same responses scored without and with replay."""
    precision = Precision.parse({"preset": name, "router": router})
    out: dict[str, Any] = {"engine": engine, "precision": name, "router": router}
    drawn = None
    for replay in (False, True):
        rollout = {"max_tokens": TOKENS, "engine": engine, "replay": replay}
        recipe = Recipe.of({"steps": 1, "rollout": rollout})
        drawn = sample(recipe, model, precision, prompts) if drawn is None else drawn
        scored = score(recipe, model, precision, drawn)
        found = measured(scored).metrics()
        out["replay" if replay else "no replay"] = {key: found[key] for key in KEYS}
        if not replay:
            routing = merge(s.routing for s in scored)
            out |= {name.removeprefix("routing/"): stat.mean for name, stat in routing.items()}
            out["tokens"] = sum(s.length for s in scored)
    return out


def trained_rows(model: Model, engines: list[str], sequences: int) -> list[dict[str, Any]]:
    """The same for a model with a task: its own problems, answers as long as it makes them."""
    recipe = Recipe.of({"steps": 1, "rollout": {"max_tokens": TOKENS}})
    asked = ask("arithmetic_perfectible", recipe, model, TOKENS, sequences)
    prompts = [Prompt(tuple(a.ids), seed) for seed, a in enumerate(asked)]
    return [row(model, engine, name, "fp32", prompts) for engine in engines for name in FORMATS]


def table(rows: list[dict[str, Any]]) -> str:
    """As in docs/moe.md."""
    heads = ("engine", "format", "router", "tokens", "token × layer", "KL", "KL, replay", "largest", "largest, replay")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in rows:
        a, b = r["no replay"], r["replay"]
        engine = {"torch": "built-in", "vllm": "vLLM"}[r["engine"]]
        numbers = [f"{r['tokens_differ']:.2%}", f"{r['layers_differ']:.2%}"]
        numbers += [f"{x[key]:.1e}" for key in ("kl_k3", "logp_abs_max") for x in (a, b)]
        lines.append(f"| {engine} | {r['precision']} | {r['router']} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--model", help="a folder; instead of the random mixture")
    options = parser.parse_args()
    if options.model:
        model = loading.load(ModelSpec.model_validate({"path": options.model}))
        rows = trained_rows(model, options.engines, options.sequences)
        command = f"python benchmarks/moe.py --model {options.model} --engines {' '.join(options.engines)}"
        print(write("moe_trained", {"command": command, "rows": rows}))
        print(table(rows))
        return
    model, chance = random_mixture(), random.Random(0)
    lengths = [chance.randint(1, LONGEST_PROMPT) for _ in range(options.sequences)]
    prompts = [Prompt(tuple(chance.randrange(512) for _ in range(n)), seed) for seed, n in enumerate(lengths)]
    rows = []
    for engine in options.engines:
        for name in FORMATS:
            for router in ROUTERS:
                rows.append(row(model, engine, name, router, prompts))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(write("moe", {"command": "python benchmarks/moe.py", "shape": SHAPE, "rows": rows}))
    print(table(rows))


if __name__ == "__main__":
    main()
