"""Sampling alone: the built-in engine against `transformers.generate` with a static cache, same model and same work.

    python benchmarks/sampling.py [--quick] [--rounds N] [--paths auto,plain]

16 prompts x 8 samples, at most 128 new tokens, temperature 1, no truncation, in FP16 and BF16:
`same` lets every response run to 128 tokens; `tail` ends each with a constant probability per token, so that the mean
is about a third of the maximum. Contestants take turns in every round; the ratio is the median over rounds.
`generate` is not asked for log-probabilities, the engine returns them. Writes results/sampling.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from common import EOS, PAD, alternate, prompts, ratio, small_qwen2, write

from tenbit.engines.torch import Path, TorchEngine
from tenbit.precision import Precision
from tenbit.types import Prompt, Sampling

PROMPTS, SAMPLES, NEW = 16, 8, 128
HAZARD = 0.0225  # mean of min(geometric, 128): 42
BARS = {("fp16", "same"): 1.6, ("bf16", "same"): 2.0, ("fp16", "tail"): 3.0, ("bf16", "tail"): 3.0}


def _generate(model: torch.nn.Module, rows: list[tuple[int, ...]], stop: bool) -> Callable[[], int]:
    """`transformers.generate` on left-padded prompts."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    model.generation_config.eos_token_id = EOS if stop else None

    def contestant() -> int:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=NEW,
                pad_token_id=PAD,
                cache_implementation="static",
            )[:, longest:]
        if not stop:
            return out.numel()
        ended = (out == EOS).long().cumsum(-1)
        return int((ended - (out == EOS).long() == 0).sum())

    return contestant


def _engine(engine: TorchEngine, rows: list[tuple[int, ...]], stop: bool) -> Callable[[], int]:
    sampling = Sampling(max_tokens=NEW, stop_token_ids=(EOS,) if stop else ())
    calls = iter(range(1 << 30))

    def contestant() -> int:
        call = next(calls)
        requests = [Prompt(row, seed=call * len(rows) + i) for i, row in enumerate(rows)]
        return sum(completion.length for completion in engine.generate(requests, sampling))

    return contestant


def measure(name: str, lengths: str, paths: list[Path], rounds: int) -> dict[str, object]:
    """One row of the table."""
    precision = Precision.parse(name)
    stop = lengths == "tail"
    master = small_qwen2(hazard=HAZARD if stop else None)
    rows = [row for row in prompts(PROMPTS, 20, 28, master.config.vocab_size) for _ in range(SAMPLES)]
    engines = [
        TorchEngine(master.config, precision, path=path, max_batch=len(rows), pad_token_id=PAD) for path in paths
    ]
    contestants = {}
    for engine in engines:
        engine.load_weights(master.state_dict().items(), version=0)
        contestants[f"engine ({engine.path})"] = _engine(engine, rows, stop)
    contestants["generate"] = _generate(master.to(precision.rollout.dtype), rows, stop)
    work: dict[str, list[int]] = {key: [] for key in contestants}

    def counted(key: str, contestant: Callable[[], int]) -> Callable[[], int]:
        def call() -> int:
            tokens = contestant()
            work[key].append(tokens)
            return tokens

        return call

    rates = alternate({key: counted(key, contestant) for key, contestant in contestants.items()}, rounds)
    tokens = {key: statistics.mean(counts) for key, counts in work.items()}
    ours = next(iter(rates))
    allowed = 0.0 if not stop else 0.15
    for key, mean in tokens.items():
        if abs(mean / tokens["generate"] - 1.0) > allowed:
            raise SystemExit(
                f"{key} made {mean:.0f} tokens a round, generate {tokens['generate']:.0f}: not the same work"
            )
    return {
        "precision": name,
        "lengths": lengths,
        "rounds": rounds,
        "mean_length": {key: mean / len(rows) for key, mean in tokens.items()},
        "tokens_per_second": {key: statistics.median(values) for key, values in rates.items()},
        "ratio": {key: ratio(values, rates["generate"]) for key, values in rates.items() if key != "generate"},
        "bar": BARS[name, lengths],
        "reached": ratio(rates[ours], rates["generate"]) >= BARS[name, lengths],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds in place of 7")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--paths", default="auto,plain", help="the engine's ways of computing, comma-separated")
    options = parser.parse_args()
    rounds = options.rounds or (2 if options.quick else 7)
    table = []
    for lengths in ("same", "tail"):
        for name in ("fp16", "bf16"):
            row = measure(name, lengths, options.paths.split(","), rounds)
            table.append(row)
            rates = "  ".join(f"{key} {value:,.0f}" for key, value in row["tokens_per_second"].items())
            ratios = "  ".join(f"{value:.2f}x" for value in row["ratio"].values())
            print(f"{name} {lengths}: {rates} tokens/s  |  {ratios}  (bar {row['bar']}x)", flush=True)
    path = write("sampling", {"command": "python benchmarks/sampling.py", "rows": table})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
