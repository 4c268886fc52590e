"""Run by torchrun: bytes that each rank really holds between two micro-batches, for each backend in the arguments.

torchrun ... ranks_of_plan.py '{"name": "fsdp"}' '{"name": "deepspeed", "stage": 2}'
"""

from __future__ import annotations

import gc
import json
import sys

import ranks
import torch
from common_training import fixed_rows, fresh_backend, one_step

from tenbit import world
from tenbit.batching import collate


def held() -> dict[int, int]:
    """Bytes of every storage that some tensor of this process uses, subclasses' inner tensors included."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, getattr(thing, "_local_tensor", None), thing.grad if thing.is_leaf else None):
                tensor = getattr(tensor, "_local_tensor", tensor)
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return storages


def measured(how: dict) -> dict[str, int]:
    if how["name"] == "deepspeed":  # in a small model its buckets would be as large as all weights together
        from tenbit.backends import deepspeed

        deepspeed.BUCKET = 10000
    before = held().keys()
    backend = fresh_backend(**how)
    one_step(backend, fixed_rows(seed=1), 64)
    gc.collect()
    asleep = {k: v for k, v in held().items() if k not in before}
    batch = collate(fixed_rows(4), 257)
    backend.accumulate(batch, lambda logp, b: (logp.sum(), {}))
    summing = {k: v for k, v in held().items() if k not in before}
    buffers = sum(b.numel() * b.element_size() for b in backend._module.buffers())  # pyright: ignore
    return {"resident": sum(asleep.values()) - buffers, "with gradients": sum(summing.values()) - buffers}


torch.set_num_threads(1)
with world.joined():
    ranks.report({text: measured(json.loads(text)) for text in sys.argv[1:]})
