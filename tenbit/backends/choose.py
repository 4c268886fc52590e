"""The backend that a recipe names."""

from __future__ import annotations

import torch

from tenbit import world
from tenbit.backends import Backend
from tenbit.backends.adapted import Adapted
from tenbit.backends.single import SingleBackend
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.recipe import BackendSpec, OptimSpec


def backend_name(spec: BackendSpec) -> str:
    """``auto`` resolved. Raises ValueError for a backend that this many processes cannot use."""
    name = spec.name
    if name == "auto":
        name = "single" if world.size() == 1 else "fsdp"
    if name == "single" and world.size() > 1:
        raise ValueError(
            f"backend.name = 'single' trains in one process, but the launcher started {world.size()}. Set it to 'fsdp' "
            "or 'deepspeed', or leave it out"
        )
    if name != "single" and not world.launched():
        raise ValueError(
            f"backend.name = {name!r} trains in processes that a launcher starts, and none did. Run it by torchrun "
            "--nproc-per-node N -m tenbit train RECIPE, or set backend.name = 'single'"
        )
    return name


def check_backend(spec: BackendSpec, precision: Precision, device: torch.device) -> None:
    """Raises ValueError for a backend that cannot be had here, before anything is loaded."""
    if backend_name(spec) == "deepspeed":
        from tenbit.backends.deepspeed import check_library

        precision.deepspeed()
        check_library(device)


def make_backend(
    model: Model, precision: Precision, optim: OptimSpec, temperature: float, updates: int, spec: BackendSpec
) -> Backend:
    """Takes over `model` (on several ranks: rank 0's weights). `updates` is the gradient steps of the whole run."""
    backend = _make(model, precision, optim, temperature, updates, spec)
    return backend if model.adapter is None else Adapted(backend, model.adapter)


def _make(
    model: Model, precision: Precision, optim: OptimSpec, temperature: float, updates: int, spec: BackendSpec
) -> Backend:
    """DeepSpeed is imported here, and only when it is asked for."""
    name = backend_name(spec)
    if name == "single":
        return SingleBackend(model, precision, optim, temperature, updates)
    if name == "fsdp":
        from tenbit.backends.fsdp import FsdpBackend

        return FsdpBackend(model, precision, optim, temperature, updates, spec)
    from tenbit.backends.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(model, precision, optim, temperature, updates, spec)
