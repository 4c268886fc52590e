"""The two runs of an audit: one in FP32 that is watched, and one by the plan that must come out finite.

    seen = watch(model, recipe, precision, rows)          true values of activations and gradients, none overflows
    trial = confirm(model, recipe, precision, rows, seen.logps)      the same tokens by tenbit's own backend and engine

`rows` are sampled answers with advantages of +1 and -1 in turn; the loss is the recipe's algorithm's, cut into the
recipe's micro-batches and divided by `Totals`, as training does it. `precision` may hold remedies: of these the
residual scale changes values, so the watched copy is rescaled; modules in FP32 change none.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tenbit import algorithms
from tenbit.backends.single import SingleBackend
from tenbit.batching import Row, collate, micro_batches
from tenbit.engines.choose import make_engine
from tenbit.mismatch import measure
from tenbit.models.fit import fit_loaded
from tenbit.models.loading import Model
from tenbit.models.logprobs import Head, response_hidden, token_logprobs
from tenbit.precision import Format, Precision
from tenbit.recipe import Recipe
from tenbit.studies.audit_anatomy import head_name
from tenbit.studies.audit_backward import Backward, Histogram
from tenbit.studies.audit_forward import Forward, Place, Range
from tenbit.studies.audit_inside import inside_seen
from tenbit.types import Batch, Completion, Overflow, Problem, Rollout, Stats, Totals

MOST_DRIFT = 1e-2  # KL per token between the plan and FP32; BF16's rounding gives 1e-5 to 1e-3


@dataclass(frozen=True)
class Seen:
    """True values: `forward` and `backward` by place, and log pi of every row's response, ``[T]`` each."""

    forward: dict[Place, Range]
    backward: dict[Place, Histogram]
    logps: list[Tensor]
    micro_batches: int


@dataclass(frozen=True)
class Trial:
    """What came of the plan. `trainer` and `engine` are KL k3 per token: from FP32, and between the two sides."""

    finite: bool
    scale: float
    grad_norm: float | None
    trainer: float | None
    engine: float | None
    failed: str = ""  # what was not finite, or too far off

    @property
    def passed(self) -> bool:
        return not self.failed

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"passed": self.passed}


def rows_of(completions: Sequence[Completion]) -> list[Row]:
    """Advantages of +1 and -1 in turn: as large as a reward of 0 or 1 makes them, and of both signs."""
    return [
        Row(Rollout(Problem("", "", ""), c, "", 0.0, False, i), 1.0 if i % 2 == 0 else -1.0)
        for i, c in enumerate(completions)
    ]


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


def watch(model: Model, recipe: Recipe, precision: Precision, rows: Sequence[Row], totals: Totals) -> Seen:
    """Forward and backward in FP32 over all rows; on a copy of the model if it has to be rescaled."""
    wide, module = Format.FP32, model.module
    if precision.residual_scale != 1:
        module = copied(model)
        fit_loaded(module, Precision.parse({"preset": wide.value, "residual_scale": precision.residual_scale}))
    head, name = Head.of(module, wide.dtype), head_name(module)
    forward, backward = Forward(module), Backward(module, precision.compute)
    how, heat = recipe.algorithm.build(), recipe.rollout.temperature
    logps: list[Tensor] = [torch.zeros(0)] * len(rows)
    parts = batches_of(rows, recipe.optim.token_budget, model.pad_token_id)

    def look(place: Place, x: Tensor) -> None:
        forward.see(place, x)
        backward.await_gradient(place, x)

    for part, on_cpu in parts:
        batch = on_cpu.to(model.device)
        row, t = batch.mask.nonzero(as_tuple=True)
        targets = batch.tokens[row, batch.prompt_length[row] + t]
        with forward.watching(), backward.watching(), inside_seen(module, look):
            hidden = response_hidden(module, batch.tokens, batch.prompt_length, batch.mask)
        forward.see_logits(hidden, head, name)
        flat, _ = token_logprobs(hidden, head, targets, heat)
        logp = torch.zeros(batch.mask.shape, device=model.device).index_put((row, t), flat)
        if how.needs_old:
            batch = batch.with_old(logp.detach())
        flat.retain_grad()
        value, _ = algorithms.loss(how, logp, batch, totals)
        value.backward()
        assert flat.grad is not None
        backward.see_logits(hidden, head, targets, heat, flat.grad, name)
        backward.see_parameters()
        for i, values, mask in zip(part, logp.detach().cpu(), on_cpu.mask, strict=True):
            logps[i] = values[mask].clone()
    return Seen(forward.ranges(), backward.histograms(), logps, len(parts))


def confirm(
    model: Model, recipe: Recipe, precision: Precision, rows: Sequence[Row], totals: Totals, wanted: Sequence[Tensor]
) -> Trial:
    """One gradient step and one scoring by the engine as a run with this plan does them, from `wanted` in FP32."""
    own = replace(model, module=copied(model))
    backend = SingleBackend(own, precision, recipe.optim, recipe.rollout.temperature, 1)
    how, scale = recipe.algorithm.build(), precision.loss_scale.initial if precision.loss_scale else 1.0
    logps: list[Tensor] = [torch.zeros(0)] * len(rows)
    for part, batch in batches_of(rows, recipe.optim.token_budget, model.pad_token_id):
        scored = backend.logprobs(batch).cpu()
        for i, values, mask in zip(part, scored, batch.mask, strict=True):
            logps[i] = values[mask].clone()

        def loss(logp: Tensor, b: Batch) -> tuple[Tensor, Stats]:
            return algorithms.loss(how, logp, b, totals)

        backend.accumulate(batch.with_old(scored) if how.needs_old else batch, loss)
    if not all(bool(x.isfinite().all()) for x in logps):
        bad = _first_bad(model, recipe, precision, rows)
        failed = f"log-probabilities are not finite in {precision.compute.value} training" + (f": {bad}" if bad else "")
        return Trial(False, scale, None, None, None, failed)
    step = backend.step()
    if step.skipped:
        failed = f"gradients are not finite in {precision.compute.value} training at a loss scale of {scale:g}"
        return Trial(False, scale, None, kl(logps, wanted), None, failed)
    del backend, own
    try:
        mu = _engine_scores(model, recipe, precision, rows)
    except Overflow as error:
        return Trial(False, scale, step.grad_norm, kl(logps, wanted), None, f"the engine: {error}")
    off, apart = kl(logps, wanted), kl(logps, mu)
    failed = ""
    if not max(off, apart) <= MOST_DRIFT:
        what = "training and FP32" if off > MOST_DRIFT else "training and sampling"
        failed = f"KL {max(off, apart):.2g} per token between {what} is more than rounding"
    return Trial(True, scale, step.grad_norm, off, apart, failed)


@torch.no_grad()
def _first_bad(model: Model, recipe: Recipe, precision: Precision, rows: Sequence[Row]) -> str:
    """Where inf or NaN first shows in the cast model, module by module; empty if it does not."""
    module: Any = copied(model)
    fit_loaded(module, precision)
    for p in module.parameters():
        p.data = p.data.to(precision.compute.dtype)
    for _, batch in batches_of(rows, recipe.optim.token_budget, model.pad_token_id):
        forward, on = Forward(module), batch.to(model.device)
        with forward.watching(), precision.autocast(model.device):
            response_hidden(module, on.tokens, on.prompt_length, on.mask)
        bad = [place for place, seen in forward.ranges().items() if seen.not_finite]
        if bad:
            return f"the first is {bad[0]}"
    return ""


def _engine_scores(model: Model, recipe: Recipe, precision: Precision, rows: Sequence[Row]) -> list[Tensor]:
    sequences = [(r.rollout.completion.prompt_ids, r.rollout.completion.response_ids) for r in rows]
    longest = max(r.length for r in rows)
    with make_engine(recipe.rollout, model, precision, recipe.seed, longest=longest) as engine:
        engine.load_weights(precision.to_engine(model.weights(engine.wants)), version=0)
        return engine.score(sequences, recipe.sampling(model.stop_token_ids))


def kl(pi: Sequence[Tensor], mu: Sequence[Tensor]) -> float:
    """KL k3 per token between the log-probabilities of the same responses; inf where one is not finite."""
    p, q = (pad_sequence([x.cpu() for x in side], batch_first=True) for side in (pi, mu))
    mask = pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in pi], batch_first=True)
    if not bool(p.isfinite().all() and q.isfinite().all()):
        return math.inf
    return measure(p, q, mask).metrics()["kl_k3"]
