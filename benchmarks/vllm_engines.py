"""The two engines on the same work in FP16: the built-in one and vLLM, and what a proven weight update costs.

    python benchmarks/vllm_engines.py [--rounds N]

Sampling: responses of equal length (128 tokens, no stop token) and of lengths that vary (a constant chance of ending,
mean a third of 128), for 8, 32 and 128 requests, on a random Qwen2 of 5.1M parameters. Both return log-probabilities;
the engines take turns in every round, the ratio is the median over rounds. Then, on the built-in model: vLLM's own
reload of its weights, the same with checksums and a tried-out cache (`load_weights`), and the canary on both sides.
Last, four steps of recipes/demo.toml with vLLM: the share of a step that sending and proving weights takes. The bar for
the proof: 3% of a step. Writes results/vllm_engines.json.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import EOS, PAD, alternate, prompts, ratio, small_qwen2, write
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from tenbit import Recipe, train
from tenbit.backends.single import SingleBackend
from tenbit.canary import Canary
from tenbit.engines import Engine
from tenbit.engines.choose import make_engine
from tenbit.models import loading
from tenbit.precision import Precision
from tenbit.prompts import ask
from tenbit.types import Prompt, Sampling

NEW = 128
HAZARD = 0.0225  # mean of min(geometric, 128): 42
DEMO = Path(__file__).parents[1] / "recipes/demo.toml"


def contestant(engine: Engine, rows: list[tuple[int, ...]], stop: bool) -> Callable[[], int]:
    sampling = Sampling(max_tokens=NEW, stop_token_ids=(EOS,) if stop else ())
    calls = iter(range(1 << 30))

    def call() -> int:
        turn = next(calls)
        return sum(
            c.length for c in engine.generate([Prompt(r, turn * 1000 + i) for i, r in enumerate(rows)], sampling)
        )

    return call


def sampling_rows(rounds: int) -> list[dict[str, Any]]:
    precision = Precision.parse("fp16")
    table = []
    for lengths in ("same", "tail"):
        module = small_qwen2(hazard=HAZARD if lengths == "tail" else None)
        module.config._name_or_path = "small"
        tokenizer: Any = PreTrainedTokenizerFast
        model = loading.Model(module, tokenizer, (EOS,), PAD, 512, torch.device("cpu"))
        spec = {"max_tokens": NEW, "max_batch": 128}
        engines = {
            name: make_engine(
                Recipe.of({"steps": 1, "rollout": {**spec, "engine": name}}).rollout, model, precision, longest=256
            )
            for name in ("torch", "vllm")
        }
        for engine in engines.values():
            engine.load_weights(precision.to_engine(module.state_dict().items()), version=0)
        for requests in (8, 32, 128):
            asked = prompts(requests, 20, 28, module.config.vocab_size)
            turns = {name: contestant(engine, asked, lengths == "tail") for name, engine in engines.items()}
            rates = alternate(turns, rounds)
            row = {
                "lengths": lengths,
                "requests": requests,
                "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
                "torch_over_vllm": ratio(rates["torch"], rates["vllm"]),
            }
            table.append(row)
            print(lengths, requests, row["tokens_per_second"], f"{row['torch_over_vllm']:.2f}x", flush=True)
        for engine in engines.values():
            engine.close()
    return table


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def update_costs(rounds: int) -> dict[str, float]:
    """Milliseconds of one update of the built-in model: vLLM's own reload, with the proof, and the canary."""
    recipe = Recipe.of({"steps": 1, "rollout": {"max_tokens": 320, "engine": "vllm"}})
    model, plan = loading.load(recipe.model), recipe.precision
    asked = ask("arithmetic_perfectible", recipe, model, 320, 64)
    backend = SingleBackend(model, plan, recipe.optim, 1.0, 1)
    with make_engine(recipe.rollout, model, plan, longest=400) as engine:
        runner = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        canary = Canary.of(asked, model, plan, Sampling(320), 400)

        def plain() -> None:
            runner.reload_weights(weights_iterator=plan.to_engine(backend.weights()))
            engine._llm.reset_prefix_cache()

        costs = {
            "vllm's reload alone": milliseconds(plain, rounds),
            "load_weights, proven": milliseconds(
                lambda: engine.load_weights(plan.to_engine(backend.weights()), 0), rounds
            ),
            "canary": milliseconds(lambda: canary.prove(engine, backend), rounds),
        }
    print({k: f"{v:.1f} ms" for k, v in costs.items()}, flush=True)
    return costs


def shares_of_a_step() -> dict[str, float]:
    """Seconds and shares of steps 2 to 5 of the demo with vLLM."""
    recipe = Recipe.load(DEMO, ["rollout.engine=vllm", "steps=5", "eval.every=0", "compare.precisions=[]"])
    with tempfile.TemporaryDirectory() as folder:
        run = train(recipe, Path(folder) / "run", console=Console(file=io.StringIO()))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    parts = {k: statistics.median(r[f"time/{k}"] for r in rows) for k in ("rollout", "update", "sync", "step")}
    return {**parts, "sync_share": parts["sync"] / parts["step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(2)
    table = sampling_rows(options.rounds)
    costs = update_costs(4 * options.rounds)
    step = shares_of_a_step()
    proof = costs["load_weights, proven"] - costs["vllm's reload alone"] + costs["canary"]
    share = proof / 1e3 / step["step"]
    print(f"proof {proof:.0f} ms, {share:.1%} of a step of {step['step']:.2f} s; sync in all {step['sync_share']:.1%}")
    result = {"sampling": table, "update_ms": costs, "demo_step_s": step, "proof_share": share, "bar": 0.03}
    print(write("vllm_engines", {"command": "python benchmarks/vllm_engines.py", **result}))


if __name__ == "__main__":
    main()
