"""How differently two sides route the same tokens through a mixture of experts.

Both choices are indices ``[..., layers, k]``. The order among a token's k experts means nothing, so sets are compared.
A token counts where both choices are known (not negative) and `mask` says so.

    tokens_differ     share of tokens with at least one layer whose set of experts differs
    layers_differ     share of (token, layer) pairs whose set differs
    experts_differ    share of single choices that the other side did not make

The last is a lower bound on what differs: after one flip the two hidden states are different tokens to later layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenbit.types import Stat, Stats


def not_shared(a: Tensor, b: Tensor) -> Tensor:
    """How many of a's experts ``[..., k]`` are not among b's ``[..., k]``."""
    return (a.unsqueeze(-1) != b.unsqueeze(-2)).all(-1).sum(-1)


def compare(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Stats:
    """Choices ``[..., layers, k]`` and a mask ``[...]`` of tokens -> statistics that add up over batches and ranks.

    Nothing where no token counts.
    """
    a, b = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
    known = (a >= 0).flatten(1).all(-1) & (b >= 0).flatten(1).all(-1)
    if mask is not None:
        known &= mask.reshape(-1)
    if not bool(known.any()):
        return {}
    apart = not_shared(a[known], b[known])  # [tokens, layers]
    return {
        "routing/tokens_differ": Stat.of((apart > 0).any(-1)),
        "routing/layers_differ": Stat.of(apart > 0),
        "routing/experts_differ": Stat.of(apart.double() / a.shape[-1]),
    }


def padded(experts: list[Tensor | None], length: int) -> Tensor | None:
    """Per row ``[tokens run, layers, k]`` -> ``[rows, length, layers, k]``, -1 where unknown; None if none has any."""
    known = [e for e in experts if e is not None]
    if not known:
        return None
    layers, k = known[0].shape[1:]
    out = torch.full((len(experts), length, layers, k), -1, dtype=known[0].dtype)
    for row, e in enumerate(experts):
        if e is not None:
            out[row, : len(e)] = e
    return out
