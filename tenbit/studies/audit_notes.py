"""What must be read beside a verdict: how little was looked at, and what the recipe has that an audit does not follow.

few(answers, tokens)                       "seen were only 1 token of 1 answer; ..."
unfollowed(precision, recipe, module)      what vLLM would refuse of a plan that the built-in engine follows
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tenbit.models.experts import is_mixture
from tenbit.precision import Precision
from tenbit.recipe import Recipe

FEW_ANSWERS, FEW_TOKENS = 16, 500  # below either a verdict says little of what training will meet

WITH_VLLM = (".mlp", ".mlp.down_proj", ".self_attn.o_proj")
"""Ends of the names of modules that vLLM can take to FP32 by themselves; projections that it joins have none there."""


def seen(answers: int, tokens: int) -> str:
    return f"{tokens:,} token{'s' * (tokens != 1)} of {answers:,} answer{'s' * (answers != 1)}"


def few(answers: int, tokens: int) -> list[str]:
    if answers >= FEW_ANSWERS and tokens >= FEW_TOKENS:
        return []
    return [
        f"seen were only {seen(answers, tokens)}; below {FEW_TOKENS} tokens or {FEW_ANSWERS} answers a verdict says "
        "little of what training will meet. Raise --prompts, --samples or --max-tokens"
    ]


def of_recipe(recipe: Recipe, own: Recipe | None, target: Path | None) -> list[str]:
    """`recipe` is the audit's, `own` the one that `--apply` named."""
    notes = []
    if own is not None and not _same(own.model.path, recipe.model.path):
        notes.append(
            f"{recipe.model.path} was audited, but {target} trains model.path = {own.model.path!r}: what is found is "
            "of the former. Audit the model that is trained"
        )
    if recipe.lora is not None or (own is not None and own.lora is not None):
        notes.append(
            "the adapter (lora.*) is not looked at: gradients are those of all weights, as in full fine-tuning"
        )
    return notes


def _same(a: str, b: str) -> bool:
    one, other = (Path(path).expanduser() for path in (a, b))
    return a == b or (one.is_dir() and one.resolve() == other.resolve())


def unfollowed(precision: Precision, recipe: Recipe | None, module: Any) -> list[str]:
    """What the recipe's engine will refuse of the plan. vLLM is not started: this is what is known of it."""
    engine = None if recipe is None else recipe.rollout.engine
    if recipe is None or "vllm" not in (engine, recipe.rollout.ray.engine if engine == "ray" else None):
        return []
    key = "rollout.engine" if engine == "vllm" else "rollout.ray.engine"
    refused = list(_refused(precision, recipe, module))
    if not refused:
        return []
    return [
        f"{key} = 'vllm' does not follow {'; '.join(refused)}. {key} = 'torch' does; vLLM will refuse to start with "
        "this plan"
    ]


def _refused(precision: Precision, recipe: Recipe, module: Any) -> Iterator[str]:
    apart = recipe.lora is not None and recipe.lora.rollout == "adapter"
    mixture = is_mixture(module.config)
    names = [n for n in precision.fp32 if apart or not _is_alone(module, n)]
    if names:
        why = " beside an adapter (lora.rollout = 'merged' would do)" if apart else ""
        yield f"precision.fp32 = {names}{why}"
    if precision.residual_scale != 1 and (mixture or apart or not _has_plain_ends(module)):
        why = " in a mixture of experts" if mixture else " beside an adapter" if apart else " for this family"
        yield f"precision.residual_scale = {precision.residual_scale:g}{why}"


def _is_alone(module: Any, name: str) -> bool:
    """Whether vLLM has such a module and can take it to FP32: dense MLPs, and linear layers that it does not join."""
    part = dict(module.named_modules()).get(name)
    experts = part is None or any(p.dim() == 3 for p in part.parameters()) or hasattr(part, "experts")
    return name.endswith(WITH_VLLM) and not experts


def _has_plain_ends(module: Any) -> bool:
    """Whether every branch ends in a product without a bias, or in a norm as in Gemma 2."""
    for layer in module.base_model.layers:
        ends = (getattr(layer.self_attn, "o_proj", None), getattr(layer.mlp, "down_proj", None))
        plain = all(end is not None and getattr(end, "bias", None) is None for end in ends)
        if not plain and not hasattr(layer, "post_feedforward_layernorm"):
            return False
    return True
