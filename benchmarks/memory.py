"""Peak memory of an update with a 150,000-token vocabulary, as the micro-batch grows.

    python benchmarks/memory.py

One forward and backward pass of a small Qwen2 (hidden 128, 2 layers) in FP16, in a fresh process per size, once with
chunked log-probabilities and once with the full logits through log_softmax. The full logits grow by 600 kB a token in
FP32, and so do their gradient and softmax. Writes results/memory.json.
"""

from __future__ import annotations

import json
import subprocess
import sys

from common import write

CHILD = """
import json, resource, sys, torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from tenbit.models.logprobs import Head, batch_logprobs
from tenbit.precision import Format
torch.set_num_threads(2)
torch.manual_seed(0)
rows, chunked = int(sys.argv[1]), sys.argv[2] == "chunked"
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=150_000, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2)).to(Format.FP16.dtype)
tokens = torch.randint(0, 150_000, (rows, 128))
length, mask = torch.full((rows,), 16), torch.ones(rows, 112, dtype=torch.bool)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if chunked:
    logp, _ = batch_logprobs(model, Head.of(model, Format.FP16.dtype), tokens, length, mask, 1.0)
else:
    logits = model(tokens).logits[:, 15:-1].float()
    logp = logits.log_softmax(-1).gather(-1, tokens[:, 16:, None])
(logp.sum() * 1e-3).backward()
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
"""


def main() -> None:
    results = []
    for rows in (2, 4, 8, 16):
        row = {"tokens": rows * 112, "logits_mb": rows * 112 * 150_000 * 4 / 2**20}
        for kind in ("chunked", "full"):
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(rows), kind], capture_output=True, text=True, check=True
            )
            row[f"{kind}_mb"] = json.loads(done.stdout)
        results.append(row)
        print({k: round(v) for k, v in row.items()}, flush=True)
    print(write("memory", {"peak_of_one_update": results}))


if __name__ == "__main__":
    main()
