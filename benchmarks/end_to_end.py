"""End to end, sampling + grading + update: tenbit against TRL's GRPOTrainer, same model, batch, lengths and dtype.

    pip install trl accelerate && python benchmarks/end_to_end.py [--quick] [--rounds N]

16 prompts x 8 samples, at most 128 new tokens, one gradient step per batch, the weights of both cast whole to FP16 or
BF16. TRL runs with the static cache (its faster setting), without a reference model, and updates its 16-bit weights
in place without loss scaling; tenbit updates FP32 masters, scales the loss, and measures the mismatch as always. The
reward is `rewards.even`: in TRL's process, and in tenbit's worker processes as any user's function.
`same`: every response has 128 tokens. `tail`: lengths are geometric, mean about a third of the maximum.
Contestants take turns; figures are completion tokens per second of steps 2 and 3 of a run, the ratio is the median
over rounds. Writes results/end_to_end.json.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import rewards
import torch
from common import EOS, PAD, prompts, ratio, small_qwen2, write
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from tenbit import Recipe, train
from tenbit.precision import Format

PROMPTS, SAMPLES, NEW = 16, 8, 128
HAZARDS = {"same": 1e-9, "tail": 0.0225}
BARS = {("fp16", "same"): 1.5, ("bf16", "same"): 1.8, ("fp16", "tail"): 3.0, ("bf16", "tail"): 3.0}
STEPS = 3


def make_folder(folder: Path, hazard: float) -> None:
    """A model folder whose tokenizer splits "t17 t4" into ids 17 and 4, and 64 random problems for both."""
    small_qwen2(hazard=hazard).save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({f"t{i}": i for i in range(2048)}, unk_token="t2"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=f"t{EOS}", pad_token=f"t{PAD}").save_pretrained(folder)
    with (folder / "problems.jsonl").open("w") as file:
        for ids in prompts(64, 8, 24, 2048):
            text = " ".join(f"t{i}" for i in ids)
            file.write(json.dumps({"problem": text, "answer": "7"}) + "\n")


def tenbit_rate(folder: Path, precision: str) -> tuple[float, dict[str, float]]:
    """Completion tokens per second of a real `train`, and where the time went."""
    tree = {
        "steps": STEPS,
        "precision": precision,
        "model": {"path": str(folder)},
        "task": {"data": str(folder / "problems.jsonl"), "grader": f"{Path(rewards.__file__)}:even"},
        "rollout": {"prompts": PROMPTS, "samples": SAMPLES, "max_tokens": NEW},
        "optim": {"updates": 1, "token_budget": 4096},
        "checkpoint": {"every": 0},
    }
    with tempfile.TemporaryDirectory() as scratch:
        out = train(Recipe.of(tree), Path(scratch) / "run", console=Console(file=io.StringIO()))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    seconds = sum(row["time/step"] for row in rows)
    tokens = sum(row["train/response_length"] for row in rows) * PROMPTS * SAMPLES
    parts = {name: tokens / sum(row[f"time/{name}"] for row in rows) for name in ("rollout", "update")}
    return tokens / seconds, {**parts, "length": tokens / (len(rows) * PROMPTS * SAMPLES)}


class Stopwatch(TrainerCallback):
    """When each step of TRL's trainer ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def trl_rate(folder: Path, precision: str, micro_batch: int) -> float:
    """Completion tokens per second of TRL's GRPOTrainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    lengths: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        lengths.append(sum(map(len, completion_ids)))
        return [rewards.even(None, text) for text in completions]

    rows = [json.loads(line)["problem"] for line in (folder / "problems.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=Format(precision).dtype)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=PROMPTS * SAMPLES // micro_batch,
            num_generations=SAMPLES,
            max_completion_length=NEW,
            temperature=1.0,
            beta=0.0,
            learning_rate=1e-6,
            max_steps=STEPS,
            cache_implementation="static",
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            args=config,
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": rows}),
            processing_class=tokenizer,
            callbacks=[stopwatch],
        )
        trainer.train()
    assert len(lengths) == STEPS, "one batch of completions per step"
    return sum(lengths[1:]) / (stopwatch.ends[-1] - stopwatch.ends[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--micro-batch", type=int, default=32, help="TRL's per-device batch")
    options = parser.parse_args()
    torch.set_num_threads(2)
    results = []
    for lengths, hazard in HAZARDS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_folder(folder, hazard)
            for precision in ("fp16", "bf16"):
                ours, theirs, parts = [], [], {}
                for _ in range(1 if options.quick else options.rounds):
                    theirs.append(trl_rate(folder, precision, options.micro_batch))
                    rate, parts = tenbit_rate(folder, precision)
                    ours.append(rate)
                row = {
                    "precision": precision,
                    "lengths": lengths,
                    "mean_length": parts["length"],
                    "tenbit": statistics.median(ours),
                    "tenbit_sampling": parts["rollout"],
                    "tenbit_update": parts["update"],
                    "trl": statistics.median(theirs),
                    "ratio": ratio(ours, theirs),
                    "bar": BARS[precision, lengths],
                }
                results.append(row)
                print(
                    f"{precision} {lengths:5} tenbit {row['tenbit']:8,.0f} (sampling {row['tenbit_sampling']:,.0f}, "
                    f"update {row['tenbit_update']:,.0f})  TRL {row['trl']:8,.0f}  "
                    f"ratio {row['ratio']:.2f}  bar {row['bar']}",
                    flush=True,
                )
    from importlib.metadata import version

    print(write("end_to_end", {"trl": version("trl"), "tokens_per_second": results}))


if __name__ == "__main__":
    main()
