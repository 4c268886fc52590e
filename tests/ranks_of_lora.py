"""Run by torchrun: a few steps on an adapter, on each backend named in the arguments, for `test_lora_ranks.py`.

torchrun ... ranks_of_lora.py '{"name": "fsdp", "plan": "fp16"}' '{"name": "deepspeed", "stage": 3, "plan": "fp16"}'
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ranks
import torch
from common_training import fixed_rows, fresh_backend, trajectory

from tenbit import world
from tenbit.backends import Backend
from tenbit.batching import collate
from tenbit.precision import Precision

LORA = {"rank": 4, "alpha": 8}


def kept(backend: Backend) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold, of all ranks, whole."""
    state = backend.state().tensors
    whole = {k: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for k, t in state.items()}
    return {k: t for part in world.gather(whole) for k, t in part.items()}


def comes_back(backend: Backend, plan: Any) -> bool:
    """Whether a fresh backend of the same kind, given the state, has the same policy."""
    tensors, counts = kept(backend), backend.state().counts
    batch = collate(fixed_rows(3), 257)

    def read(wanted: dict[str, torch.Tensor]) -> None:
        for name, place in wanted.items():
            target = place.to_local() if hasattr(place, "to_local") else place
            source = tensors[name]
            if hasattr(place, "to_local"):
                from torch.distributed.tensor import distribute_tensor

                source = distribute_tensor(source, place.device_mesh, place.placements).to_local()
            target.copy_(source)

    before = backend.logprobs(batch)
    snapshot = backend.snapshot()
    for _ in range(1):
        trajectory(backend, 64, updates=1)
    moved = not torch.equal(backend.logprobs(batch), before)
    with backend.at(snapshot):
        then = torch.equal(backend.logprobs(batch), before)
    backend.restore(counts, read)
    return moved and then and torch.equal(backend.logprobs(batch), before)


def main() -> None:
    found = {}
    for text in sys.argv[1:]:
        how = json.loads(text)
        backend = fresh_backend(lora=LORA, **how)
        parts = {n: t.clone() for n, t in backend.weights(None, "parts")}
        found[text] = trajectory(backend, 64)
        found[text]["before"] = parts
        found[text]["parts"] = {n: t.clone() for n, t in backend.weights(None, "parts")}
        found[text]["trained"] = [n for n, _ in backend.weights(None, "trained")]
        found[text]["state"] = sorted(kept(backend))
        found[text]["seen"] = Precision.parse(how["plan"]).verify(backend.live())
        found[text]["comes back"] = comes_back(backend, how["plan"])
    ranks.report(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with world.joined():
        main()
