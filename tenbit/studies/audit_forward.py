"""How large a model's numbers get on the way forward: every module's input and output, attention scores, logits.

    forward = Forward(module)
    with forward.watching():
        hidden = response_hidden(module, ...)
        forward.see_logits(hidden, head, "lm_head")
    forward.ranges()                {Place("model.layers.0.mlp.down_proj", "input"): Range(largest=1.2e5, ...), ...}

The model runs in FP32, so what is seen are true values, also beyond the range of the format that is asked about. Of
what is inside a module, its children's inputs and outputs are seen: the product of gate and up of an MLP is the
input of its `down_proj`. Padding is counted too: it is computed as everything else is, and an inf there becomes NaN in
a weight's gradient.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tenbit.models.logprobs import CHUNK_ELEMENTS, Head

Kind = Literal["input", "output", "inside", "table", "product", "scores", "logits", "weight"]
"""`inside`: of experts. `table`: every token's embedding, also of tokens that no answer has. `product`: query times
key, which eager attention holds; `scores`: the same after scaling. `weight`: of gradients only."""

TOKENS = 4096  # of the vocabulary, looked up at a time
# passed along to modules, and no activations: masks hold the lowest number there is
NOT_ACTIVATIONS = ("attention_mask", "position_embeddings", "position_ids", "causal_mask_mapping")


class Place(NamedTuple):
    """Where a tensor of numbers is: a module's name as in the Hugging Face model, and which of its tensors."""

    module: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.module} {self.kind}"


@dataclass(frozen=True)
class Range:
    """What was seen at a place: the largest |x|, the root mean square, values that were inf or NaN, and how many."""

    largest: float
    rms: float
    not_finite: int
    count: int

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


class _Seen:
    """The same as running values on the device, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.largest, self.squares = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        self.not_finite = torch.zeros((), dtype=torch.int64, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        finite = x.isfinite()
        size = torch.where(finite, x, 0.0).abs()
        self.largest = torch.maximum(self.largest, size.max().double())
        self.squares += size.double().square().sum() if size.numel() < CHUNK_ELEMENTS else size.norm().double() ** 2
        self.not_finite += (~finite).sum()
        self.count += x.numel()

    def range(self) -> Range:
        rms = (float(self.squares) / self.count) ** 0.5 if self.count else 0.0
        return Range(float(self.largest), rms, int(self.not_finite), self.count)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a module's arguments or of what it returned."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in NOT_ACTIVATIONS:
                yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def watched_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """All modules but the model itself, its trunk (its output is the last norm's) and rotary tables."""
    for name, module in model.named_modules():
        if name and module is not model.base_model and "rotary" not in name:
            yield name, module


class Forward:
    """Watches a model. `module` is not changed; its hooks are gone after `watching`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._seen: dict[Place, _Seen] = {}
        self._names = {id(module): name for name, module in model.named_modules()}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for name, module in watched_modules(self._model):
            # first of all: the plan's own hooks may scale an input that has been large until then
            handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._after(name)))
        try:
            with _attention_seen(self._see_attention):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def see(self, place: Place, x: Tensor) -> None:
        with torch._C.DisableTorchFunction():  # what is computed here is no part of what is watched
            if place not in self._seen:
                self._seen[place] = _Seen(x.device)
            self._seen[place].add(x.detach())

    @torch.no_grad()
    def see_logits(self, hidden: Tensor, head: Head, name: str) -> None:
        """The head's product, before a softcap: it is what is rounded to the head's format."""
        rows = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
        for part in hidden.detach().split(rows):
            bias = None if head.bias is None else head.bias.to(part.dtype)
            self.see(Place(name, "logits"), F.linear(part, head.weight.to(part.dtype), bias))

    @torch.no_grad()
    def see_table(self) -> None:
        """What enters the stream for any token of the vocabulary: weights are known without its being sampled."""
        table = self._model.get_input_embeddings()
        place = Place(self._names[id(table)], "table")
        for ids in torch.arange(len(table.weight), device=table.weight.device).split(TOKENS):
            self.see(place, table(ids))

    def ranges(self) -> dict[Place, Range]:
        """In the order in which they were first computed."""
        return {place: seen.range() for place, seen in self._seen.items()}

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            for x in tensors_in((args, kwargs)):
                self.see(Place(name, "input"), x)

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for x in tensors_in(output):
                self.see(Place(name, "output"), x)

        return hook

    @torch.no_grad()
    def _see_attention(self, module: nn.Module, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """Query times key of one row and one key head at a time: [queries of the group, L, L] is all that is held."""
        name = self._names.get(id(module))
        if name is None:
            return
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        group = query.shape[1] // key.shape[1]
        for q, k in zip(
            query.detach().unflatten(1, (key.shape[1], group)).flatten(0, 1), key.flatten(0, 1), strict=True
        ):
            product = q @ k.detach().T
            self.see(Place(name, "product"), product)
            self.see(Place(name, "scores"), product * factor)


@contextlib.contextmanager
def _attention_seen(see: Callable[[nn.Module, Tensor, Tensor, float | None], None]) -> Iterator[None]:
    """Meanwhile attention functions show their query and key first. Which one computes does not change."""

    def wrapped(name: str) -> Callable[..., Any]:
        registered = ALL_ATTENTION_FUNCTIONS.get(name)

        def attend(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            see(module, query, key, kwargs.get("scaling"))
            own = registered or vars(sys.modules[type(module).__module__])["eager_attention_forward"]
            return own(module, query, key, *args, **kwargs)

        return attend

    functions: Any = ALL_ATTENTION_FUNCTIONS
    before = {name: functions.get(name) for name in ("sdpa", "eager")}
    try:
        for name in before:
            functions[name] = wrapped(name)
        yield
    finally:
        for name, own in before.items():
            del functions[name]  # the library-wide one shows again
            if functions.get(name) is not own:
                functions[name] = own
