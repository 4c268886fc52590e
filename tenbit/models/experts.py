"""Which experts a mixture's routers choose: seen on the way through a forward pass, and, where asked, given to it.

    with routed(routers(module)) as routes:                     the pass as it is
        backend.logprobs(batch)
    routes.chosen                                               [tokens, layers, k] int16: what each router chose

    with routed(routers(module), batch.experts) as routes:      routing replay
        backend.accumulate(batch, loss)

At a near-tie between two experts, a rounding error decides which one a token goes to, and the two compute different
things. So sampler and trainer, in the same format on the same weights, can differ by far more than rounding on single
tokens. Replay removes this: where a token's experts are given, they take the place of the router's own top k. Their
weights are the trainer's own, made by the router's own rule from its own probabilities at those experts, so that
gradients flow into the router as ever.

Any architecture whose router chooses by one call of `topk` is covered: its own forward runs, and only that call is
answered differently. What the routers would have chosen is recorded in both cases.

Everything happens inside the context, backward included: gradient checkpointing runs layers again in it, with the same
answers. Nothing stays behind when it is left.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tenbit.models.fit import all_routers

UNKNOWN = -1  # stands for the experts of a token that no engine has run, and for padding
NUMBERS = torch.int16  # transformers knows no mixture with more than 32,767 experts
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # as families name it


def routers(module: nn.Module) -> list[nn.Module]:
    """A mixture's routers in the order of their layers; none for a dense model, or for a form that is not known."""
    return [part for _, part in _named(module)]


def router_layers(module: nn.Module) -> list[int]:
    """The decoder layer that each router belongs to: in some mixtures a few layers are dense."""
    found = [re.search(r"\blayers\.(\d+)\.", name) for name, _ in _named(module)]
    return [int(m.group(1)) if m else i for i, m in enumerate(found)]


def _named(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in module.named_modules() if type(part).__name__.endswith("TopKRouter")]


def is_mixture(config: Any) -> bool:
    """Whether a model of this configuration has experts to choose among."""
    text = config.get_text_config()
    return any((getattr(text, name, None) or 0) > 1 for name in COUNTS)


def refuse_replay(module: Any) -> None:
    """Raises ValueError if `rollout.replay` can mean nothing for this model."""
    if routers(module):
        return
    kind = module.config.model_type
    why = "its routers have a form that is not known" if is_mixture(module.config) else "it has no experts"
    raise ValueError(
        f"rollout.replay = true: there is no routing to replay in model_type {kind!r}, for {why}. Set it to false"
    )


def unseen(module: Any, on_gpu_vllm: bool) -> str:
    """Why a mixture's routing is not compared in a run without replay; empty if it is, or if there is none."""
    if not is_mixture(module.config):
        return ""
    if not routers(module):
        plain = "" if all_routers(module) else "; nor can they compute in FP32: they stay in the model's format"
        return f"model_type {module.config.model_type!r} has routers of a form that is not known{plain}"
    return "vLLM on GPUs says which experts it chose only with rollout.replay = true" if on_gpu_vllm else ""


@dataclass
class Routes:
    """One pass through a model: `own` is what each router chose by itself, ``[tokens, k]``, in the order of layers."""

    own: list[Tensor | None] = field(default_factory=list)

    @property
    def chosen(self) -> Tensor | None:
        """[tokens, layers, k] int16, before replay; None for a model without routers, or if one chose otherwise."""
        known = [o for o in self.own if o is not None]
        return torch.stack(known, 1) if known and len(known) == len(self.own) else None


@contextlib.contextmanager
def routed(found: Sequence[nn.Module], replay: Tensor | None = None) -> Iterator[Routes]:
    """Meanwhile the passes of `found` are recorded, and with `replay` ``[..., layers, k]`` take these experts.

    The leading dimensions of `replay` are those of the tokens, padding included; tokens with UNKNOWN choose by
    themselves. Raises ValueError if it is of another model.
    """
    routes = Routes([None] * len(found))
    given: Sequence[Tensor | None] = [None] * len(found)
    if replay is not None and found:
        if replay.shape[-2] != len(found):
            raise ValueError(
                f"routing replay: experts of {replay.shape[-2]} layers are given to a model with {len(found)} routers"
            )
        given = replay.reshape(-1, *replay.shape[-2:]).unbind(1)
    before = [vars(router).get("forward") for router in found]
    try:
        for i, router in enumerate(found):
            _set_forward(router, _watched(router.forward, routes, i, given[i]))
        yield routes
    finally:
        for router, forward in zip(found, before, strict=True):
            _set_forward(router, forward)


def _set_forward(router: Any, forward: Any) -> None:
    if forward is None:
        vars(router).pop("forward", None)  # the class's own shows again
    else:
        router.forward = forward


def _watched(forward: Any, routes: Routes, place: int, given: Tensor | None) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _TopK(given) as answered:
            out = forward(*args, **kwargs)
        if len(answered.own) == 1:
            routes.own[place] = answered.own[0].detach().to(NUMBERS)
        elif given is not None:
            raise ValueError(
                f"{type(getattr(forward, '__self__', None)).__name__} does not choose its experts by one call of topk, "
                "so they cannot be given to it. Set rollout.replay = false"
            )
        return out

    return run


class _TopK(TorchFunctionMode):
    """Meanwhile the one call of `topk` is answered with the given experts ``[tokens, k]``, where they are known."""

    def __init__(self, given: Tensor | None) -> None:
        super().__init__()
        self.given = given
        self.own: list[Tensor] = []  # one, or its choice is of a form that is not known

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return out
        self.own.append(out.indices)
        if self.given is None or len(self.own) > 1:
            return out
        scores: Tensor = args[0] if args else kwargs["input"]
        given = self.given.to(scores.device, out.indices.dtype)
        if given.shape != out.indices.shape:
            raise ValueError(
                f"routing replay: {list(given.shape)} experts are given for a router's choice of "
                f"{list(out.indices.shape)} (tokens, experts of a token). Set rollout.replay = false"
            )
        taken = torch.where(given >= 0, given, out.indices)
        return torch.return_types.topk((scores.gather(-1, taken), taken))  # pyright: ignore
