"""What the precision plan says about a model's inside, done to vLLM's model: the other half of `models/fit.py`.

vLLM makes its model, then this, then it compiles and captures graphs; so it is done in a model loader of our own (load
format "tenbit"), which otherwise gives random weights as vLLM's "dummy" does. The plan travels in vLLM's
`additional_config`. Importing this file does not import vLLM.

    linear layers   the method that multiplies is replaced by one that upcasts; it keeps the weights as they came, where
                    vLLM's own packs them on CPUs
    others          `forward` of single instances is replaced
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenbit.models.experts import is_mixture
from tenbit.models.fit import WIDE
from tenbit.precision import Precision

LOAD_FORMAT = "tenbit"
KEY = "tenbit"
_LINEAR = "UnquantizedLinearMethod"
_USE_TORCH = "Use rollout.engine = 'torch', whose model is the trainer's"
_WHOLE = (".mlp", ".mlp.down_proj", ".self_attn.o_proj")  # ends of the names of what stands alone in vLLM, too


def plan_of(precision: Precision) -> dict[str, Any]:
    """For `additional_config`: what there is to do, in plain values."""
    parts = {"router": precision.router, "fp32": list(precision.fp32), "residual_scale": precision.residual_scale}
    return {KEY: parts}


def not_followed(precision: Precision, module: Any, apart: bool = False) -> list[str]:
    """What vLLM cannot do of a plan, each with the reason; told from the model in transformers, before vLLM starts.

    `apart`: beside an adapter that is not merged. `fit_vllm` refuses the same of vLLM's own model, where it is seen.
    """
    found = []
    if apart and is_mixture(module.config):
        found.append(
            "lora.rollout = 'adapter' in a mixture of experts: on CPUs it crashes (lora.rollout = 'merged' works)"
        )
    if apart and precision.alters:
        found.append(
            "precision.fp32 or precision.residual_scale beside an adapter, which it multiplies in the rollout format "
            "whatever they say (lora.rollout = 'merged' works)"
        )
        return found
    parts = dict(module.named_modules())
    for name in precision.fp32:
        if why := _why_not_alone(name, parts.get(name)):
            found.append(f"precision.fp32: {name!r}, {why}")
    if precision.residual_scale != 1:
        where = "in a mixture of experts" if is_mixture(module.config) else "for this family"
        if is_mixture(module.config) or not _has_plain_ends(module):
            found.append(f"precision.residual_scale = {precision.residual_scale:g} {where}")
    return found


def _why_not_alone(name: str, part: Any) -> str:
    """Why vLLM cannot take a module to FP32 by itself; empty for dense MLPs and linear layers that it does not join."""
    if part is None:
        return ""  # the model has no such module at all, which its own fit says
    if any(hasattr(inner, "head_dim") for inner in part.modules()):
        return "which holds attention, whose keys and values have one format there"
    if any(p.dim() == 3 for p in part.parameters()) or hasattr(part, "experts"):
        return "which holds experts, which cannot be taken to FP32 by themselves there"
    if name.endswith(_WHOLE):
        return ""
    holder = name.rpartition(".")[0]
    if holder.endswith(".mlp"):
        return f"which is no module of its own there: it joins projections. Name the part that holds it, {holder!r}"
    return "which cannot be taken to FP32 by itself there"


def _has_plain_ends(module: Any) -> bool:
    """Whether every branch ends in a product without a bias, or in a norm as in Gemma 2."""
    for layer in module.base_model.layers:
        ends = (getattr(layer.self_attn, "o_proj", None), getattr(layer.mlp, "down_proj", None))
        plain = all(end is not None and getattr(end, "bias", None) is None for end in ends)
        if not plain and not hasattr(layer, "post_feedforward_layernorm"):
            return False
    return True


def refuse(precision: Precision, module: Any, apart: bool = False) -> None:
    """Raises ValueError for a plan that vLLM cannot follow with this model."""
    if found := not_followed(precision, module, apart):
        raise ValueError(f"vLLM does not follow {'; nor '.join(found)}. {_USE_TORCH}")


@contextlib.contextmanager
def fp16_allowed(told: Mapping[str, Any]) -> Iterator[None]:
    """Meanwhile vLLM opens every family in FP16, if the plan in `told`, its arguments, rescales the residual stream.

    It refuses families whose stream is known to pass 65504, Gemma 2 and 3. With the stream rescaled the reason is gone.
    """
    if told["additional_config"][KEY]["residual_scale"] == 1:
        yield
        return
    refused: dict[str, str] = import_module("vllm.config.model")._FLOAT16_NOT_SUPPORTED_MODELS
    before = dict(refused)
    refused.clear()
    try:
        yield
    finally:
        refused.update(before)


def register() -> None:
    """Makes the load format known to the vLLM of this process, if there is one."""
    if "vllm" not in sys.modules:
        return
    loaders: Any = import_module("vllm.model_executor.model_loader")
    dummy: Any = loaders.DummyModelLoader

    class FittedLoader(dummy):
        """Random weights in a model that computes as the plan says."""

        def create_model(self, vllm_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
            model = super().create_model(vllm_config, *args, **kwargs)
            fit_vllm(model, vllm_config.additional_config[KEY])
            return model

    if LOAD_FORMAT not in loaders._LOAD_FORMAT_TO_MODEL_LOADER:
        loaders.register_model_loader(LOAD_FORMAT)(FittedLoader)


def fit_vllm(model: nn.Module, plan: Mapping[str, Any]) -> None:
    """Raises ValueError for what cannot be done to this model."""
    if plan["router"] == "fp32":
        for gate in _gates(model):
            gate.quant_method = _wide_method(gate, back=False)
            for name in [n for n in vars(gate) if n.startswith("allow_")]:
                setattr(gate, name, False)  # kernels that would go round the method
    known = dict(model.named_modules())
    for name in plan["fp32"]:
        if name not in known:
            raise ValueError(
                f"precision.fp32: {name!r} is no module of its own in vLLM, which joins projections. Name the part "
                f"that holds it, {name.rpartition('.')[0]!r}, or use rollout.engine = 'torch'"
            )
        _in_fp32(name, known[name])
    if plan["residual_scale"] != 1:
        _rescale(model, plan["residual_scale"])


def _gates(model: nn.Module) -> list[Any]:
    """Routers: a linear layer called gate beside experts."""
    gates = []
    for name, module in model.named_modules():
        gate = getattr(module, "gate", None)
        if gate is None or not hasattr(module, "experts"):
            continue
        if type(getattr(gate, "quant_method", None)).__name__ != _LINEAR:
            raise ValueError(
                f"precision.router = 'fp32': what {name}.gate does in vLLM is not known. {_USE_TORCH}, or set "
                "precision.router = 'model'"
            )
        gates.append(gate)
    return gates


def _wide_method(linear: Any, back: bool) -> Any:
    """A method like the layer's, with a product in FP32."""
    base: Any = type(linear.quant_method)

    class WideLinear(base):
        def process_weights_after_loading(self, layer: nn.Module) -> None:
            """They stay as they are."""

        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            wide = F.linear(x.to(WIDE), layer.weight.to(WIDE), None if bias is None else bias.to(WIDE))
            return wide.to(x.dtype) if back else wide

    return WideLinear()


def _in_fp32(name: str, module: nn.Module) -> None:
    if any(hasattr(part, "kv_cache") for part in module.modules()):
        raise ValueError(
            f"precision.fp32: {name} holds attention, whose keys and values have one format in vLLM. {_USE_TORCH}"
        )
    for inner, part in module.named_modules():
        if not any(True for _ in part.parameters(recurse=False)):
            continue
        if type(getattr(part, "quant_method", None)).__name__ != _LINEAR:
            what = f"{name}.{inner}".rstrip(".")
            raise ValueError(
                f"precision.fp32: in vLLM {what} ({type(part).__name__}) cannot be taken to FP32 by itself. "
                f"{_USE_TORCH}"
            )
        part.quant_method = _wide_method(part, back=True)  # type: ignore[assignment]
    _replace(module, partial(_wide_forward, module.forward))


def _wide_forward(inner: Any, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Tensors in FP32 on the way in, and in the format they had on the way out."""
    given = next((a.dtype for a in (*args, *kwargs.values()) if _is_float(a)), WIDE)
    out = inner(*(_to(a, WIDE) for a in args), **{k: _to(v, WIDE) for k, v in kwargs.items()})
    return tuple(_to(o, given) for o in out) if isinstance(out, tuple) else _to(out, given)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if _is_float(value) and not isinstance(value, nn.Parameter) else value


def _replace(module: Any, forward: Any) -> None:
    module.forward = types.MethodType(forward, module)


# --- the residual stream


def _rescale(model: Any, scale: float) -> None:
    base = getattr(model, "model", None)
    layers = getattr(base, "layers", None)
    if base is None or layers is None or not hasattr(base, "embed_tokens") or not hasattr(base, "norm"):
        raise _not_rescalable(type(model).__name__)
    _replace(base.embed_tokens, partial(_times_output, base.embed_tokens.forward, scale))
    for layer in layers:
        sandwiched = hasattr(layer, "pre_feedforward_layernorm") and hasattr(layer, "post_feedforward_layernorm")
        before_mlp = "pre_feedforward_layernorm" if sandwiched else "post_attention_layernorm"
        for name in ("input_layernorm", before_mlp):
            _scale_eps(getattr(layer, name, None), scale)
        ends = [getattr(layer.self_attn, "o_proj", None), getattr(layer.mlp, "down_proj", None)]
        if sandwiched:
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                _replace(norm, partial(_wide_norm, norm.forward, scale))
        elif any(end is None or getattr(end, "bias", None) is not None for end in ends):
            raise _not_rescalable(type(layer).__name__)
        else:
            for end in ends:
                _replace(end, partial(_times_input, end.forward, scale))  # type: ignore[union-attr]
    _scale_eps(base.norm, scale)


def _not_rescalable(what: str) -> ValueError:
    return ValueError(f"precision.residual_scale: where {what} ends its branches in vLLM is not known. {_USE_TORCH}")


def _scale_eps(norm: Any, scale: float) -> None:
    if not isinstance(getattr(norm, "variance_epsilon", None), float):
        raise _not_rescalable(type(norm).__name__)
    norm.variance_epsilon *= scale * scale


def _times_input(inner: Any, scale: float, self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return inner(x * scale, *args, **kwargs)


def _wide_norm(inner: Any, scale: float, self: nn.Module, x: Tensor) -> Tensor:
    """In FP32 until it is scaled: before that it may be out of range."""
    return (inner(x.to(WIDE)) * scale).to(x.dtype)


def _times_output(inner: Any, scale: float, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return inner(*args, **kwargs) * scale
