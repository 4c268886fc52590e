"""What the precision plan says about a model's inside, done to a model: the trainer's, or the built-in engine's.

    fit(module, precision)          once, before the model is sharded, fused or asked for anything

    router          a mixture's routers take their product, softmax and top-k in FP32, so that two tokens' near-ties are
                    not decided by rounding. Their weights stay in the format of their side
    fp32            the named modules compute in FP32: inputs and weights are upcast, outputs cast back
    residual_scale  c, a power of two. Embeddings and the branches of every layer enter the residual stream times c, and
                    the norms that read it have eps times c^2; as they divide by the stream's own size, the function is
                    the same, and a stream that reaches 300,000 is carried as 18,750

Only `forward` of some instances is replaced and a few hooks are set; parameters, their names and state dicts are
untouched, so sharding, checkpoints, weight updates and exports know nothing of it. vLLM's model has other modules under
the same names: `engines/vllm_fit.py` does the same there.
"""

from __future__ import annotations

import contextlib
import copy
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tenbit.precision import Format, Precision

WIDE = Format.FP32.dtype
EPS = ("variance_epsilon", "eps")
TRIAL_TOLERANCE = 1e-3  # of the logits' size; a stream that is scaled wrongly is off by as much as the logits are


def fit(module: nn.Module, precision: Precision) -> None:
    """Makes a causal language model compute as the plan says. Raises ValueError for what it has no place for."""
    plan = (precision.router, precision.fp32, precision.residual_scale)
    before = vars(module).get("fitted_to")
    if before is not None:
        assert before == plan, f"this model computes by another plan already: {before}, not {plan}"
        return
    vars(module)["fitted_to"] = plan
    if precision.router == "fp32":
        for router in all_routers(module).values():
            _in_fp32(router, back=False)
    for name in precision.fp32:
        _in_fp32(_named(module, name), back=True)
    if precision.residual_scale != 1:
        _rescale(module, precision.residual_scale)


def all_routers(module: nn.Module) -> dict[str, nn.Module]:
    """A mixture's routers by name, also of forms that `experts.py` cannot replay (DeepSeek's ...TopkRouter)."""
    return {name: m for name, m in module.named_modules() if type(m).__name__.lower().endswith("topkrouter")}


def refuse_own_formats(config: Any, precision: Precision) -> None:
    """Raises ValueError for an architecture that keeps parameters of its own in FP32 where the plan rolls out in less:
    sampler and trainer would not compute in the same format there."""
    if precision.rollout is Format.FP32:
        return
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=precision.rollout.dtype)
    wide = [name for name, p in module.named_parameters() if p.dtype == WIDE]
    if wide:
        more = f" and {len(wide) - 1} more" if len(wide) > 1 else ""
        raise ValueError(
            f"precision: model_type {config.model_type!r} keeps parameters in FP32 by itself ({wide[0]}{more}), which "
            f"a plan that rolls out in {precision.rollout.value!r} does not follow. Set precision = 'fp32'"
        )


def _named(module: nn.Module, name: str) -> nn.Module:
    """A decoder layer, or a part of one."""
    known = {n: m for n, m in module.named_modules() if re.search(r"\.\d+(\.|$)", n)}
    if name in known:
        return known[name]
    if name in dict(module.named_modules()):
        head = module.get_submodule(name) is getattr(module, "get_output_embeddings", lambda: None)()
        remedy = "Set precision.head = 'fp32' for the head" if head else "Name layers or parts of them"
        raise ValueError(f"precision.fp32: {name!r} is no layer of the model, and no part of one. {remedy}")
    last = name.rpartition(".")[2]
    near = [n for n in known if n.rpartition(".")[2] == last][:3] or [n for n in known if n.endswith("mlp")][:3]
    raise ValueError(
        f"precision.fp32: the model has no module {name!r}. Names are as in the model, for example "
        f"{', '.join(map(repr, near))}"
    )


# --- FP32


@dataclass(frozen=True)
class _Change:
    """How a module's forward differs from its class's: what is cast to FP32, by what its bias and its result are
    multiplied, and whether that is cast back to the format of what came in."""

    weights: bool = False
    inputs: bool = False
    bias: float = 1.0
    times: float = 1.0
    back: bool = False


def _in_fp32(module: nn.Module, back: bool) -> None:
    """Every part with weights upcasts them for the moment of its own call: a sharded one is gathered only then."""
    for part in module.modules():
        if any(p is not None for p in part._parameters.values()):
            _alter(part, weights=True)
    _alter(module, inputs=True, back=back)


def _alter(module: Any, **more: Any) -> None:
    module.change = replace(getattr(module, "change", _Change()), **more)
    # no closure over the module: a deep copy must compute with its own weights
    module.forward = types.MethodType(_altered_forward, module)


def _altered_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    change: _Change = self.change
    given = next((a.dtype for a in (*args, *kwargs.values()) if _is_float(a)), WIDE)
    if change.inputs:
        args, kwargs = _cast(args, WIDE), _cast(kwargs, WIDE)
    with contextlib.ExitStack() as stack:
        if change.weights:
            stack.enter_context(_instead(self, lambda _, p: p.to(WIDE)))
        if change.bias != 1:
            stack.enter_context(_instead(self, lambda name, p: p * change.bias if name == "bias" else p))
        if change.weights or change.inputs:
            stack.enter_context(torch.autocast(_device(args, kwargs), enabled=False))
        out = type(self).forward(self, *args, **kwargs)
    out = _times(out, change.times)
    return _cast(out, given) if change.back else out


def _times(out: Any, factor: float) -> Any:
    """Of a router's (logits, scores, experts) the scores."""
    if factor == 1 or not isinstance(out, tuple):
        return out if factor == 1 else out * factor
    logits, scores, *rest = out
    return (logits, scores * factor, *rest)


@contextlib.contextmanager
def _instead(part: nn.Module, made: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Meanwhile `part` computes with what is made of its parameters, differentiably: they get the gradient."""
    held: dict[str, Any] = dict(part._parameters)
    others: dict[str, Any] = {name: None if p is None else made(name, p) for name, p in held.items()}
    try:
        part._parameters.update(others)
        yield
    finally:
        part._parameters.update(held)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value.to(dtype) if _is_float(value) else value


def _device(args: Any, kwargs: Any) -> str:
    return next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), "cpu")


# --- the residual stream


def _rescale(module: Any, scale: float) -> None:
    """Raises ValueError for layers that are not x + branch(norm(x))."""
    base = module.base_model
    layers, last = getattr(base, "layers", None), getattr(base, "norm", None)
    if layers is None or last is None:
        raise _not_rescalable(type(base).__name__)
    embedding = module.get_input_embeddings()
    factor = getattr(embedding, "embed_scale", None)  # Gemma's, which its embedding multiplies by itself
    if isinstance(factor, Tensor):
        factor.mul_(scale)
    else:
        _alter(embedding, times=scale)
    for layer in layers:
        for norm in _reading(layer):
            _scale_eps(norm, scale)
        _scale_branches(layer, scale)
    _scale_eps(last, scale)


def _not_rescalable(what: str) -> ValueError:
    return ValueError(
        f"precision.residual_scale: {what} is not known to carry its residual stream as x + branch(norm(x)), so it "
        "cannot be rescaled without changing the function. Remove the key, or train in 'bf16' or 'fp32'"
    )


def _reading(layer: Any) -> list[Any]:
    """The norms that read the residual stream."""
    before_mlp = "pre_feedforward_layernorm" if _sandwiched(layer) else "post_attention_layernorm"
    found = [getattr(layer, name, None) for name in ("input_layernorm", before_mlp)]
    if None in found or not hasattr(layer, "self_attn") or not hasattr(layer, "mlp"):
        raise _not_rescalable(type(layer).__name__)
    return found


def _sandwiched(layer: Any) -> bool:
    """Gemma 2 and 3 have norms at the end of the branches, too."""
    return hasattr(layer, "pre_feedforward_layernorm") and hasattr(layer, "post_feedforward_layernorm")


def _scale_branches(layer: Any, scale: float) -> None:
    """Each branch is scaled before its last product, whose result might overflow, or within its last norm."""
    if _sandwiched(layer):
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            _alter(norm, inputs=True, times=scale, back=True)
        return
    ends = [layer.self_attn.o_proj]
    if hasattr(layer.mlp, "down_proj"):
        ends.append(layer.mlp.down_proj)
    elif hasattr(layer.mlp, "experts") and all_routers(layer):
        for router in all_routers(layer).values():
            _alter(router, times=scale)
    else:
        raise _not_rescalable(type(layer.mlp).__name__)
    for linear in ends:
        _scale_linear(linear, scale)


def _scale_linear(linear: Any, scale: float) -> None:
    """c (W x + b), computed as W (c x) + (c b): the large product never comes to be, and nothing cancels."""
    linear.register_forward_pre_hook(partial(_times_input, scale))
    plain = getattr(linear, "base_layer", linear)  # of a layer with an adapter, which has no bias of its own
    if plain.bias is not None:
        _alter(plain, bias=scale)


def _times_input(scale: float, module: nn.Module, args: Any) -> Any:
    return (args[0] * scale, *args[1:])


def _scale_eps(norm: Any, scale: float) -> None:
    name = next((n for n in EPS if isinstance(getattr(norm, n, None), float)), None)
    if name is None:
        raise _not_rescalable(type(norm).__name__)
    setattr(norm, name, getattr(norm, name) * scale * scale)


def fit_loaded(module: Any, precision: Precision) -> None:
    """The same for a model that has its weights: a rescaled stream is tried out, and refused if it changes anything."""
    if precision.residual_scale == 1 or "fitted_to" in vars(module):
        fit(module, precision)
        return
    before = _trial(module)
    fit(module, precision)
    off = float((_trial(module) - before).abs().max() / before.abs().max())
    if not off <= TRIAL_TOLERANCE:
        raise ValueError(
            f"precision.residual_scale = {precision.residual_scale:g} changes what {module.config.model_type} computes "
            f"(by {off:.2g} of the size of its hidden states): something besides norms reads its residual stream. "
            "Remove the key, or train in 'bf16' or 'fp32'"
        )


@torch.no_grad()
def _trial(module: Any) -> Tensor:
    ids = torch.arange(1, 9, device=module.device).remainder(module.config.get_text_config().vocab_size)[None]
    return module.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
