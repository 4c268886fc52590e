"""What no module's input or output shows: the numbers inside a mixture's experts, whose weights are one 3D parameter.

    with inside_seen(module, look):                look(Place("model.layers.0.mlp.experts", "inside"), tensor)
        module(...)

Experts are applied by functions (a loop over experts, or one grouped product; transformers has several), so while such
a module's forward runs, every torch function's floating-point result is looked at: gate and up, their product, the
result before it is weighted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tenbit.studies.audit_forward import Place, tensors_in, watched_modules

Look = Callable[[Place, Tensor], None]


class _Results(TorchFunctionMode):
    def __init__(self, place: Place, look: Look) -> None:
        super().__init__()
        self._place, self._look = place, look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tensors_in(out):
            if not isinstance(x, nn.Parameter):  # a weight that was only looked up
                self._look(self._place, x)
        return out


def holds_experts(module: nn.Module) -> bool:
    return any(p.dim() == 3 for p in module.parameters(recurse=False))


@contextlib.contextmanager
def inside_seen(model: Any, look: Look) -> Iterator[None]:
    handles = []
    for name, module in watched_modules(model):
        if holds_experts(module):
            mode = _Results(Place(name, "inside"), look)

            def before(module: nn.Module, args: Any, mode: _Results = mode) -> None:
                mode.__enter__()

            def after(module: nn.Module, args: Any, output: Any, mode: _Results = mode) -> None:
                mode.__exit__(None, None, None)

            handles.append(module.register_forward_pre_hook(before))
            # first of the hooks after it, so that these are not seen as its inside; also when forward fails
            handles.append(module.register_forward_hook(after, prepend=True, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
