"""Forward and backward passes of one micro-batch on a CPU, ours against plain transformers.

    python benchmarks/training.py [--rounds N] [--threads N]

32 sequences of 16 + 128 tokens through a small Qwen2 (5.8M parameters), in FP16 and BF16, until gradients exist:

    ours       fused layers (`tenbit/models/fused.py`), log-probabilities without the full logits
    unfused    the same without fusing
    plain      transformers' own layers, full logits in FP32, log_softmax and gather

They take turns within each round. Writes results/training.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from common import alternate, ratio, small_qwen2, write
from transformers import Qwen2ForCausalLM

from tenbit.models.fused import fuse
from tenbit.models.logprobs import Head, batch_logprobs
from tenbit.precision import Format

ROWS, PROMPT, RESPONSE = 32, 16, 128


def ours(model: Qwen2ForCausalLM, tokens: torch.Tensor) -> Callable[[], int]:
    head = Head.of(model, model.dtype)
    length, mask = torch.full((ROWS,), PROMPT), torch.ones(ROWS, RESPONSE, dtype=torch.bool)

    def step() -> int:
        logp, _ = batch_logprobs(model, head, tokens, length, mask, 1.0)
        (logp.sum() * 1e-2).backward()
        model.zero_grad()
        return ROWS * RESPONSE

    return step


def plain(model: Qwen2ForCausalLM, tokens: torch.Tensor) -> Callable[[], int]:
    def step() -> int:
        logits = model(input_ids=tokens, use_cache=False).logits[:, PROMPT - 1 : -1].float()
        logp = logits.log_softmax(-1).gather(-1, tokens[:, PROMPT:, None])
        (logp.sum() * 1e-2).backward()
        model.zero_grad()
        return ROWS * RESPONSE

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    results = {}
    for form in (Format.FP16, Format.BF16):
        model = small_qwen2().to(form.dtype).train()
        fused = copy.deepcopy(model)
        names = fuse(fused)
        tokens = torch.randint(2, model.config.vocab_size, (ROWS, PROMPT + RESPONSE), generator=generator)
        rates = alternate(
            {"ours": ours(fused, tokens), "unfused": ours(model, tokens), "plain": plain(model, tokens)}, options.rounds
        )
        results[form.value] = {
            "fused": names,
            "response_tokens_per_second": rates,
            "medians": {name: statistics.median(values) for name, values in rates.items()},
            "ours_over_unfused": ratio(rates["ours"], rates["unfused"]),
            "ours_over_plain": ratio(rates["ours"], rates["plain"]),
        }
        shown = {name: round(value) for name, value in results[form.value]["medians"].items()}
        print(f"{form.value}: response tokens/s {shown}", end="  ")
        print({k: round(v, 2) for k, v in results[form.value].items() if k.startswith("ours_over")}, flush=True)
    print(write("training", {"rows": ROWS, "prompt": PROMPT, "response": RESPONSE, "formats": results}))


if __name__ == "__main__":
    main()
