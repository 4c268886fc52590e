"""The training policy as one module, so that a sharding framework sees one forward pass from tokens to log pi.

FSDP and ZeRO gather weights when a module's forward is called. The log-probabilities here never call the model's own
forward (it would make all logits at once), so the call that they hook into is this module's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tenbit.models.logprobs import Head, batch_logprobs


class Scorer(nn.Module):
    """tokens [B, L], prompt_length [B], mask [B, T] -> (log pi(y_t) [B, T] float32, entropies [N] of response tokens).

    `model` is the causal language model; parameter names have the prefix ``model.``, which `own_name` takes off.
    """

    def __init__(self, model: Any, head_dtype: torch.dtype, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.head_dtype, self.temperature = head_dtype, temperature

    def forward(self, tokens: Tensor, prompt_length: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        head = Head.of(self.model, self.head_dtype)  # at every call: between calls its weight may be a shard
        return batch_logprobs(self.model, head, tokens, prompt_length, mask, self.temperature)


def own_name(name: str) -> str:
    """A parameter's name in the language model, from its name in the scorer."""
    return name.removeprefix("model.")


def decoder_layers(model: Any) -> list[nn.Module]:
    """The repeated blocks of a language model: the units in which its weights are gathered."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [m for m in model.modules() if type(m).__name__ in kinds]
    if blocks:
        return blocks
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []
