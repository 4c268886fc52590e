"""Where inf or NaN first shows in a model that was cast as the plan says, forward or backward.

    first_bad(model, recipe, precision, rows, totals)        "model.layers.1.mlp.down_proj input", or None

Only a trial that failed is looked at in this way. Values beyond the format have become inf by then, and what they were
the FP32 pass has said; but what a kernel holds between a module's input and output only shows in what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tenbit.batching import Row
from tenbit.models.fit import fit_loaded
from tenbit.models.loading import Model
from tenbit.models.logprobs import Head, response_hidden, token_logprobs
from tenbit.precision import Precision
from tenbit.recipe import Recipe
from tenbit.studies.audit_anatomy import head_name
from tenbit.studies.audit_backward import Backward
from tenbit.studies.audit_forward import Forward, Place
from tenbit.studies.audit_inside import inside_seen
from tenbit.studies.audit_passes import batches_of, copied, flat_targets, loss_of
from tenbit.types import Batch, Totals


def first_bad(model: Model, recipe: Recipe, precision: Precision, rows: Sequence[Row], totals: Totals) -> Place | None:
    """The first place that is not finite in training; None where nothing that can be seen is."""
    module: Any = copied(model)
    fit_loaded(module, precision)
    if precision.has_copy:
        for p in module.parameters():
            p.data = p.data.to(precision.compute.dtype)
    for _, on_cpu in batches_of(rows, recipe.optim.token_budget, model.pad_token_id):
        found = _first_bad(module, recipe, precision, on_cpu.to(model.device), totals)
        if found is not None:
            return found
    return None


def _first_bad(module: Any, recipe: Recipe, precision: Precision, batch: Batch, totals: Totals) -> Place | None:
    head, name = Head.of(module, precision.head_dtype("train")), head_name(module)
    forward, backward = Forward(module), Backward(module, precision.compute)
    scale = precision.loss_scale.initial if precision.loss_scale else 1.0

    def look(place: Place, x: Tensor) -> None:
        forward.see(place, x)
        backward.await_gradient(place, x)

    with precision.autocast(batch.tokens.device):
        with forward.watching(), backward.watching(), inside_seen(module, look):
            hidden = response_hidden(module, batch.tokens, batch.prompt_length, batch.mask)
        at, targets = flat_targets(batch)
        flat, _ = token_logprobs(hidden, head, targets, recipe.rollout.temperature)
    # query times key is computed here once more, in 16 bits; the kernel holds it so only where attention is eager
    eager = getattr(module.config, "_attn_implementation", None) == "eager"
    seen = [p for p, r in forward.ranges().items() if r.not_finite and (eager or p.kind not in ("product", "scores"))]
    if seen:
        return seen[0]
    if not bool(flat.isfinite().all()):
        return Place(name, "logits")
    value, _ = loss_of(recipe.algorithm.build(), flat, at, batch, totals)
    (value * scale).backward()
    backward.see_parameters()
    return next(backward.not_finite(), None)
