"""What the benchmarks share: the model they run on, how contestants take turns, and how results are written down."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

RESULTS = Path(__file__).parent / "results"
EOS = 1
PAD = 0


def small_qwen2(*, hazard: float | None = None, context: int = 512, seed: int = 0) -> Qwen2ForCausalLM:
    """A random Qwen2 of 5.1M parameters in FP32, with an untied head.

    With `hazard` every step ends the response with that probability, whatever came before, so lengths are geometric:
    dimension 0 of the residual stream is a large constant that no block writes to, only the row of the
    end-of-sequence token in the head reads it, and that row reads nothing else. Without `hazard` the row is as
    random as the others, and benchmarks give no stop token.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = Qwen2ForCausalLM(config).eval()
    if hazard is not None:
        _constant_hazard(model, hazard)
    return model


@torch.no_grad()
def _constant_hazard(model: Qwen2ForCausalLM, hazard: float) -> None:
    model.model.embed_tokens.weight[:, 0] = 8.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    head = model.lm_head.weight
    head[:, 0] = 0.0
    head[EOS] = 0.0
    tokens = torch.randint(2, model.config.vocab_size, (8, 64))
    hidden = model.model(tokens).last_hidden_state
    logits = model.lm_head(hidden)
    others = logits[..., torch.arange(logits.shape[-1]) != EOS].logsumexp(-1).mean()
    head[EOS, 0] = (math.log(hazard / (1.0 - hazard)) + others) / hidden[..., 0].mean()


def prompts(count: int, low: int, high: int, vocabulary: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts of random lengths in [low, high], without the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(2, vocabulary, (n,), generator=generator).tolist()) for n in lengths]


def alternate(contestants: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each contestant in each round. A contestant returns how many tokens it made.

    They take turns within a round, so that whatever else the machine does hits all of them; compare them within
    rounds, by `ratio`.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant()
    for _ in range(rounds):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            tokens = contestant()
            rates[name].append(tokens / (time.perf_counter() - start))
    return rates


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    return {
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write(name: str, result: dict[str, Any]) -> Path:
    """Writes a result, with the machine it was measured on, to ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    return path
