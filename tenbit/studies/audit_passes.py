"""What an audit's passes over the same answers share: micro-batches, a copy of the model, the loss, log-probabilities.

for rows_of_it, batch in batches_of(rows, recipe.optim.token_budget, model.pad_token_id): ...
logps_of(module, model, recipe, rows)         log pi of every row's response in FP32, and no gradient
kl(logps, other)                              how far apart two of these are, per token
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tenbit import algorithms
from tenbit.algorithms import Algorithm
from tenbit.batching import Row, collate, micro_batches
from tenbit.mismatch import measure
from tenbit.models.loading import Model
from tenbit.models.logprobs import Head, response_hidden, token_logprobs
from tenbit.precision import Format
from tenbit.recipe import Recipe
from tenbit.types import Batch, Totals


def batches_of(rows: Sequence[Row], budget: int, pad_token_id: int) -> list[tuple[list[int], Batch]]:
    """(row indices, batch) a micro-batch."""
    return [
        (part, collate([rows[i] for i in part], pad_token_id))
        for part in micro_batches([r.length for r in rows], budget)[0]
    ]


def copied(model: Model) -> Any:
    """The FP32 module once more, on its device; the model itself is never changed."""
    module: Any = copy.deepcopy(model.module)
    return module.to(model.device)


def flat_targets(batch: Batch) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where the response's tokens are in ``[B, T]``, and which they are."""
    row, t = batch.mask.nonzero(as_tuple=True)
    return (row, t), batch.tokens[row, batch.prompt_length[row] + t]


def loss_of(
    how: Algorithm, flat: Tensor, at: tuple[Tensor, Tensor], batch: Batch, totals: Totals
) -> tuple[Tensor, Tensor]:
    """The algorithm's loss from log-probabilities of the response's tokens, and these as ``[B, T]``."""
    logp = torch.zeros(batch.mask.shape, device=flat.device).index_put(at, flat)
    if how.needs_old:
        batch = batch.with_old(logp.detach())
    return algorithms.loss(how, logp, batch, totals)[0], logp


@torch.no_grad()
def logps_of(module: Any, model: Model, recipe: Recipe, rows: Sequence[Row]) -> list[Tensor]:
    """Log pi of every row's response by `module`, FP32 weights beside the model's own, ``[T]`` each."""
    head = Head.of(module, Format.FP32.dtype)
    out: list[Tensor] = [torch.zeros(0)] * len(rows)
    for part, on_cpu in batches_of(rows, recipe.optim.token_budget, model.pad_token_id):
        batch = on_cpu.to(model.device)
        hidden = response_hidden(module, batch.tokens, batch.prompt_length, batch.mask)
        flat, _ = token_logprobs(hidden, head, flat_targets(batch)[1], recipe.rollout.temperature)
        lengths = on_cpu.mask.sum(-1).tolist()
        for i, values in zip(part, flat.cpu().split(lengths), strict=True):
            out[i] = values.clone()
    return out


def kl(pi: Sequence[Tensor], mu: Sequence[Tensor]) -> float:
    """KL k3 per token between the log-probabilities of the same responses; inf where one is not finite."""
    p, q = (pad_sequence([x.cpu() for x in side], batch_first=True) for side in (pi, mu))
    mask = pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in pi], batch_first=True)
    if not bool(p.isfinite().all() and q.isfinite().all()):
        return math.inf
    return measure(p, q, mask).metrics()["kl_k3"]
