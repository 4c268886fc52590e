"""The model a run ends with: one Hugging Face folder, from any backend, in the format that was rolled out.

Of a run with an adapter, also the adapter alone, in PEFT's format and in FP32.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tenbit import world
from tenbit.backends import Backend
from tenbit.checkpoint import replace_folder
from tenbit.models.loading import Model, first_names, model_folder
from tenbit.models.lora import misread_by_peft, peft_config, peft_name
from tenbit.precision import Precision

BASE_FILE = "tenbit_base.json"


def export(folder: Path, model: Model, backend: Backend, precision: Precision) -> None:
    """A model folder with tokenizer, in `precision.export`, so that what is deployed is what was trained for.

    Called on all ranks. Rank 0 holds the whole model in host memory, in that format, and writes it. Tied tensors stay
    tied.
    """
    dtype = precision.export.dtype
    first = first_names(model.module)
    state: dict[str, Tensor] = {}
    for name, weight in backend.weights(precision.asked(precision.export)):
        if world.is_first():
            tensor = precision.rolled_out(name, weight)
            known = state.get(first.get(name, name))
            state[name] = tensor.to("cpu", dtype if tensor.is_floating_point() else None) if known is None else known
    world.first(lambda: _write(folder, model, state, dtype))


def export_adapter(folder: Path, model: Model, backend: Backend, base: str) -> None:
    """The FP32 adapter as PEFT has it: for ``PeftModel.from_pretrained(model, folder)``, and for vLLM. On all ranks.

    It belongs to the model at `base` with its weights rounded to the format that the run computed in; `BASE_FILE`
    beside PEFT's files says which weights those are (`models/lora.py`, `base_digest`).
    """
    state: dict[str, Tensor] = {}
    for name, factor in backend.weights(None, "trained"):
        if world.is_first():
            state[peft_name(name)] = factor.to("cpu", copy=True).contiguous()
    world.first(lambda: _write_adapter(folder, model, state, base))


def _write_adapter(folder: Path, model: Model, state: dict[str, Tensor], base: str) -> None:
    adapter = model.adapter
    assert adapter is not None
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    save_file(state, draft / "adapter_model.safetensors", metadata={"format": "pt"})
    found = Path(model_folder(base))
    path = str(found.resolve()) if found.is_dir() else base
    config = peft_config(adapter.spec, state, path, misread_by_peft(model.module.config, adapter.spec, state))
    about = {"base": path, "format": adapter.base.value, "digest": model.base}
    for name, content in (("adapter_config.json", config), (BASE_FILE, about)):
        (draft / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    replace_folder(draft, folder)


def _write(folder: Path, model: Model, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    model.module.save_pretrained(draft, state_dict=state)
    config = copy.deepcopy(model.module.config)
    config.dtype = dtype  # save_pretrained wrote the dtype of the module, which is the trainer's
    config.save_pretrained(draft)
    model.tokenizer.save_pretrained(draft)
    replace_folder(draft, folder)
