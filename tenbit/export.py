"""The model a run ends with: one Hugging Face folder, from any backend, in the format that was rolled out."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from torch import Tensor

from tenbit import world
from tenbit.backends import Backend
from tenbit.checkpoint import replace_folder
from tenbit.models.loading import Model, first_names
from tenbit.precision import Precision


def export(folder: Path, model: Model, backend: Backend, precision: Precision) -> None:
    """A model folder with tokenizer, in `precision.export`, so that what is deployed is what was trained for.

    Called on all ranks. Rank 0 holds the whole model in host memory, in that format, and writes it. Tied tensors stay
    tied.
    """
    dtype = precision.export.dtype
    first = first_names(model.module)
    state: dict[str, Tensor] = {}
    for name, weight in backend.weights(dtype):
        if world.is_first():
            tensor = precision.rolled_out(weight)
            known = state.get(first.get(name, name))
            state[name] = tensor.to("cpu", dtype if tensor.is_floating_point() else None) if known is None else known
    world.first(lambda: _write(folder, model, state, dtype))


def _write(folder: Path, model: Model, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    model.module.save_pretrained(draft, state_dict=state)
    config = copy.deepcopy(model.module.config)
    config.dtype = dtype  # save_pretrained wrote the dtype of the module, which is the trainer's
    config.save_pretrained(draft)
    model.tokenizer.save_pretrained(draft)
    replace_folder(draft, folder)
