"""Which experts vLLM's routers chose: for every token that was run, of a mixture of experts.

vLLM returns them by itself where its second model runner serves, which is on GPUs (`NATIVE`; asked for if the recipe
replays). On CPUs `Recorder` does it in the worker: each router reports its choice, and after each pass the rows are
given to their requests. Tokens from the prefix cache are not run, and nothing would be known of them, so requests that
are recorded do not read it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tenbit.models.experts import NUMBERS, UNKNOWN, router_layers
from tenbit.models.loading import Model
from tenbit.types import EngineFailed, Sampling

NATIVE = "enable_return_routed_experts"

Call = Callable[..., Any]
Plain = tuple[int, int, int, bytes]
"""tokens, layers, k, and the int16 numbers: what crosses the border of a process."""


class Recorder:
    """In the worker: from `start` to `stop`, the experts of all tokens by request."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        modules = [m for m in runner.get_model().modules() if hasattr(m, "layer_id")]
        self._routers = [
            (m.layer_id, m.router) for m in modules if hasattr(getattr(m, "router", None), "set_capture_fn")
        ]
        self._pass: dict[int, Tensor] = {}  # layer -> [tokens, k] of the pass that is running
        self._taken: dict[str, list[tuple[int, Tensor]]] = {}  # request -> where tokens begin, [tokens, layers, k]

    def start(self) -> None:
        for layer, router in self._routers:
            router.set_capture_fn(partial(self._pass.__setitem__, layer))
        self._runner.execute_model = partial(self._execute, self._runner.execute_model)

    def stop(self) -> dict[str, Plain]:
        for _, router in self._routers:
            router.set_capture_fn(None)
        del self._runner.execute_model  # the class's own shows again
        return {request: _plain(parts) for request, parts in self._taken.items()}

    def _execute(self, execute: Call, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        self._pass.clear()
        out = execute(scheduled, *args, **kwargs)
        if self._pass:
            chosen = torch.stack([ids for _, ids in sorted(self._pass.items())], 1).to("cpu", NUMBERS)
            batch, row = self._runner.input_batch, 0
            for place, request in enumerate(batch.req_ids):
                count, begin = scheduled.num_scheduled_tokens[request], int(batch.num_computed_tokens_cpu[place])
                self._taken.setdefault(request, []).append((begin, chosen[row : row + count]))
                row += count
        return out


def _plain(parts: Sequence[tuple[int, Tensor]]) -> Plain:
    """In order; what was run twice, after vLLM had to give up its keys and values, as it was run last."""
    length = max(begin + len(chosen) for begin, chosen in parts)
    whole = torch.full((length, *parts[0][1].shape[1:]), UNKNOWN, dtype=NUMBERS)
    for begin, chosen in parts:
        whole[begin : begin + len(chosen)] = chosen
    tokens, layers, k = whole.shape
    return tokens, layers, k, whole.numpy().tobytes()


class Routing:
    """Beside the engine: asks for the experts and puts them to their completions."""

    def __init__(self, model: Model) -> None:
        self._layers = router_layers(model.module)
        self._recorded = bool(self._layers) and model.device.type != "cuda"

    def begin(self, sampling: Sampling, rpc: Call) -> dict[str, Any]:
        """To be called before sampling; what a request's parameters say besides."""
        if not (sampling.experts and self._recorded):
            return {}
        rpc("tenbit_begin_experts")
        return {"skip_reading_prefix_cache": True}

    def end(self, sampling: Sampling, outs: Sequence[Any], rpc: Call) -> list[Tensor | None]:
        """After sampling: per completion ``[tokens run, layers, k]``, None where vLLM does not say."""
        if not (sampling.experts and self._layers):
            return [None] * len(outs)
        if not self._recorded:
            return [self._native(out.outputs[0].routed_experts, _run(out)) for out in outs]
        # vLLM appends a dash and eight letters to the id of a request
        taken = {request.rpartition("-")[0]: plain for request, plain in rpc("tenbit_end_experts")[0].items()}
        return [_experts(taken[out.request_id], _run(out)) for out in outs]

    def _native(self, found: Any, tokens: int) -> Tensor | None:
        """vLLM numbers all decoder layers, those without experts too."""
        if found is None:
            return None
        return _whole(torch.from_numpy(found.astype("int16"))[:, self._layers], tokens)


def _run(out: Any) -> int:
    """Tokens that were an input: all but the last of the response."""
    return len(out.prompt_token_ids) + len(out.outputs[0].token_ids) - 1


def _experts(plain: Plain, tokens: int) -> Tensor:
    *shape, numbers = plain
    return _whole(torch.frombuffer(bytearray(numbers), dtype=NUMBERS).view(*shape), tokens)


def _whole(chosen: Tensor, tokens: int) -> Tensor:
    if len(chosen) < tokens:
        raise EngineFailed(f"vLLM gave the experts of {len(chosen)} tokens where {tokens} were run")
    return chosen[:tokens].clone()
