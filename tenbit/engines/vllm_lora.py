"""vLLM with the adapter itself: the base is sent once, and at every update the adapter alone, with proof.

vLLM reads adapters from folders in PEFT's format, so one is written to shared memory, read in place of the last one,
and removed. (A request that names a known id keeps the old adapter, whatever its folder holds, unless the new one is
loaded in place.) Then the factors that its kernels read are held against what was sent, layer by layer, bit by bit.
vLLM multiplies B by alpha / rank in the rollout format; `LoraSpec.refuse` lets only those through that are exact.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tenbit.engines.delivery import checksum, undelivered
from tenbit.engines.vllm_start import SHARED_MEMORY, unfit
from tenbit.models.loading import Model
from tenbit.models.lora import A, Adapter, B, is_adapter, peft_config, peft_name
from tenbit.precision import Precision
from tenbit.types import EngineFailed

NAME, ID = "tenbit", 1
PREFIX = "tenbit-adapter-"

Held = Mapping[str, list[str]]
"""A layer's name, with the checksums of A and of B, the latter times alpha / rank; in plain values that cross borders.
"""
NOTHING = ["0", "0"]


class Apart:
    """The adapter of one vLLM engine. `request` is what every prompt must come with, once an adapter is there."""

    def __init__(self, model: Model, adapter: Adapter, precision: Precision) -> None:
        self._adapter, self._precision = adapter, precision
        self._shapes = {name: t.shape for name, t in model.module.state_dict().items() if is_adapter(name)}
        self._arrived: dict[str, Tensor] = {}
        self.has_base = False
        self.request: Any = None

    def divert(self, named: Iterable[tuple[str, Tensor]], refused: list[Exception]) -> Iterator[tuple[str, Tensor]]:
        """Passes frozen weights on under their plain names and keeps the adapter; ends at one that does not fit."""
        self._arrived = {}
        for name, tensor in named:
            if not is_adapter(name):
                yield name.replace(".base_layer", ""), tensor
                continue
            held = tensor.detach().to(self._precision.rollout.dtype)
            refused += unfit(name, held, self._shapes, self._precision.rollout)
            if refused:
                return
            self._arrived[name] = held

    def install(self, call: Callable[..., Any], llm: Any, request: Any) -> None:
        """The adapter that arrived, in place of the one before. `request` is vLLM's class of that.

        Raises ValueError, EngineFailed or Undelivered.
        """
        missing = [name for name in self._shapes if name not in self._arrived]
        if missing:
            raise ValueError(f"the adapter is not whole: missing: {', '.join(missing[:5])}. Send all of it")
        doing, wanted = "an adapter's update", sent(self._arrived, self._adapter.spec.scaling)
        with shared_folder() as folder:
            save_file(
                {peft_name(n): t.cpu().contiguous() for n, t in self._arrived.items()},
                folder / "adapter_model.safetensors",
            )
            (folder / "adapter_config.json").write_text(json.dumps(peft_config(self._adapter.spec, list(self._shapes))))
            new = request(NAME, ID, str(folder), load_inplace=True)
            if not call(doing, llm.llm_engine.add_lora, new):
                raise undelivered("vLLM did not take the adapter")
        self.request = request(NAME, ID, str(folder))
        (held,) = call(doing, llm.collective_rpc, "tenbit_adapter", args=(self._adapter.spec.rank,))
        compare(wanted, held)
        self._arrived = {}
        self.has_base = True

    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        """The factors as `Precision.verify` is to see them; `install` has read their bits back in this format."""
        for name, shape in self._shapes.items():
            yield "rollout", name, torch.empty(shape, dtype=self._precision.rollout.dtype, device="meta")


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder in shared memory, gone afterwards."""
    where = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    try:
        with tempfile.TemporaryDirectory(dir=where, prefix=PREFIX) as folder:
            yield Path(folder)
    except (OSError, SafetensorError) as error:
        raise EngineFailed(f"an adapter could not be handed over through {where}: {error}") from error


def sent(tensors: Mapping[str, Tensor], scaling: float) -> Held:
    """What vLLM is to hold of the factors that were sent, by layer."""
    layers = {name.partition(B)[0]: (tensors[name.replace(B, A)], b) for name, b in tensors.items() if B in name}
    return {layer: [_sum(a), _sum(b * scaling)] for layer, (a, b) in layers.items()}


def held(manager: Any, rank: int) -> dict[str, list[str]]:
    """What the kernels of vLLM's `manager` of adapters read, by layer, in the worker.

    A and B lie in rows of a larger tensor; what is beyond `rank` must be zero.
    """
    slot = manager.lora_index_to_id.index(ID)
    out: dict[str, list[str]] = {}
    for name, module in manager.modules.items():
        for i, layer in enumerate(manager.packed_modules.get(name, [name])):
            a, b = module.lora_a_stacked[i][slot, 0], module.lora_b_stacked[i][slot, 0]
            beyond = bool(a[rank:].any()) or bool(b[:, rank:].any())
            out[layer] = ["beyond its rank"] * 2 if beyond else [_sum(a[:rank]), _sum(b[:, :rank])]
    return out


def _sum(tensor: Tensor) -> str:
    """0 for zeros of either sign; the layers without an adapter hold nothing else."""
    return f"{checksum(tensor):x}" if bool(tensor.any()) else NOTHING[0]


def compare(wanted: Held, found: Held) -> None:
    """Raises Undelivered naming the first layer whose adapter is not the one that was sent."""
    for layer, factors in wanted.items():
        if layer not in found:
            raise undelivered(f"{layer!r}: vLLM computes without its adapter")
        if found[layer] != factors:
            which = "A" if found[layer][0] != factors[0] else "B"
            raise undelivered(f"{layer!r}: vLLM holds another {which} of the adapter than was sent")
    for layer, factors in found.items():
        if layer not in wanted and factors != NOTHING:
            raise undelivered(f"{layer!r}: vLLM has an adapter there, and none was sent")
