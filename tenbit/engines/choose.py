"""The engine that a recipe names, still without weights."""

from __future__ import annotations

from tenbit.engines import Engine
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.recipe import RolloutSpec


def make_engine(
    rollout: RolloutSpec, model: Model, precision: Precision, seed: int = 0, longest: int | None = None
) -> Engine:
    """An engine for `model`'s architecture, to be closed after use. Raises ValueError where it cannot be had.

    `longest` is the longest prompt and response together that will be asked for; None: the model's whole context.
    vLLM and Ray are imported here, and only when they are asked for.
    """
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
    )
