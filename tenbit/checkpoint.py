"""Checkpoints: written whole or not at all, so that a killed run finds only complete ones.

A checkpoint is a folder ``checkpoints/step-000010``: the backend's state and ``state.json`` (step, place in the
data order). It is written beside its final place, synced to disk, and renamed; a rename is atomic.
The model a run ends with is exported in the format that was rolled out, so what is deployed is what was trained for.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from tenbit.backends import Backend
from tenbit.models.loading import Model
from tenbit.precision import Precision


@dataclass(frozen=True)
class Progress:
    """How far a run is: `step` steps are done, `position` problems taken."""

    step: int = 0
    position: int = 0


def save(folder: Path, backend: Backend, progress: Progress, keep: int) -> Path:
    """Writes ``folder/step-N`` atomically, then removes all but the newest `keep`."""
    folder.mkdir(exist_ok=True)
    final = folder / f"step-{progress.step:06d}"
    draft = folder / f".{final.name}.tmp"
    for left in folder.glob(".step-*.tmp"):  # by a run that was killed while it wrote or removed one
        shutil.rmtree(left)
    draft.mkdir()
    backend.save(draft)
    (draft / "state.json").write_text(json.dumps(asdict(progress)))
    replace_folder(draft, final)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old.rename(folder / f".{old.name}.tmp"))
    return final


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def latest(folder: Path) -> Path | None:
    found = complete(folder)
    return found[-1] if found else None


def at(folder: Path, step: int) -> bool:
    """Whether there is a complete checkpoint of this step."""
    return any(int(p.name.removeprefix("step-")) == step for p in complete(folder))


def load_progress(checkpoint: Path) -> Progress:
    """How far the run was when the checkpoint was written."""
    return Progress(**json.loads((checkpoint / "state.json").read_text()))


def export(folder: Path, model: Model, backend: Backend, precision: Precision) -> None:
    """A Hugging Face model folder with tokenizer, in `precision.export`. Tied tensors stay tied."""
    dtype = precision.export.dtype
    cast: dict[int, Tensor] = {}
    state = {}
    for name, tensor in backend.weights():
        key = tensor.data_ptr()
        if key not in cast:
            cast[key] = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()
        state[name] = cast[key]
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    model.module.save_pretrained(draft, state_dict=state)
    config = copy.deepcopy(model.module.config)
    config.dtype = dtype  # save_pretrained wrote the dtype of the module, which is the trainer's
    config.save_pretrained(draft)
    model.tokenizer.save_pretrained(draft)
    replace_folder(draft, folder)


def replace_folder(draft: Path, final: Path) -> None:
    """Moves a complete draft to its place: contents on disk first, then the name."""
    for file in draft.rglob("*"):
        if file.is_file():
            _sync(file)
    _sync(draft)
    if final.exists():
        shutil.rmtree(final)
    draft.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
