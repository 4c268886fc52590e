"""The two runs of an audit: one in FP32 that is watched, and one by the plan that must come out finite.

    seen = watch(model, recipe, precision, rows, totals)        true values of activations and gradients, none overflows
    trial = confirm(model, recipe, precision, rows, totals, seen)       the same tokens by tenbit's backend and engine

`rows` are sampled answers with advantages of +a and -a in turn, a being the largest that the algorithm makes of rewards
of 0 and 1; the loss is the recipe's algorithm's, cut into the recipe's micro-batches and divided by `Totals`, as
training does it. `precision` may hold remedies: of these the
residual scale changes values, so the watched copy is rescaled; modules in FP32 change none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tenbit import algorithms
from tenbit.advantages import Advantage
from tenbit.backends import StepStats
from tenbit.backends.single import SingleBackend
from tenbit.batching import Row
from tenbit.engines.choose import make_engine
from tenbit.models.experts import is_mixture
from tenbit.models.fit import fit_loaded
from tenbit.models.loading import Model
from tenbit.models.logprobs import Head, response_hidden, token_logprobs
from tenbit.precision import Format, Precision
from tenbit.recipe import Recipe
from tenbit.studies.audit_anatomy import head_name
from tenbit.studies.audit_backward import Backward, Histogram
from tenbit.studies.audit_forward import Forward, Place, Range
from tenbit.studies.audit_inside import inside_seen
from tenbit.studies.audit_passes import batches_of, copied, flat_targets, kl, loss_of
from tenbit.studies.audit_where import first_bad
from tenbit.types import Batch, Completion, Overflow, Problem, Rollout, Stats, Totals

MOST_DRIFT = 1e-2  # KL per token, and the share of the gradient's norm, that no format may be off by
MOST_BENT = 0.1
SPACINGS = 16  # epsilons that a format's rounding may take; see `most_drift`


def most_drift(epsilon: float, mixture: bool) -> float:
    """KL per token that rounding with this epsilon explains.

    Logits of a sound model are below 32, where numbers lie 16 epsilon apart. Log-probabilities that are off by as much
    have a KL of (16 epsilon)^2 / 2: 1.2e-4 in FP16, 7.8e-3 in BF16. In a mixture near-ties are decided otherwise, for
    about epsilon of the tokens, and each of these is off by whatever another expert makes of it: 1e-3 in FP16.
    """
    epsilon = max(epsilon, Format.FP16.epsilon)  # FP32 is what is compared with: nothing is asked of it
    square = (SPACINGS * epsilon) ** 2 / 2
    return min(MOST_DRIFT, max(square, epsilon) if mixture else square)


def most_bent(epsilon: float) -> float:
    """The same of the gradient's norm: 16 epsilon, 1.6% in FP16; 10% in BF16."""
    return min(MOST_BENT, SPACINGS * max(epsilon, Format.FP16.epsilon))


@dataclass(frozen=True)
class Seen:
    """True values: `forward` and `backward` by place, and log pi of every row's response, ``[T]`` each."""

    forward: dict[Place, Range]
    backward: dict[Place, Histogram]
    logps: list[Tensor]
    micro_batches: int
    grad_norm: float  # of the whole step


@dataclass(frozen=True)
class Trial:
    """What came of the plan. `trainer` and `engine` are KL k3 per token: from FP32, and between the two sides;
    `bent` is how far the gradient's norm is from FP32's, relative to that; `doubt` how far FP32's own norm moves when
    it is summed in another order, asked only where `bent` is large; `where` the module that failed. A trial that is
    `rough` passes: it is further off than the format's rounding explains, and not so far that training could not go."""

    finite: bool
    scale: float
    grad_norm: float | None
    trainer: float | None
    engine: float | None
    failed: str = ""  # what was not finite, or too far off
    bent: float | None = None
    doubt: float = 0.0
    where: str = ""
    rough: str = ""

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def steady(self) -> bool:
        return not self.failed and not self.rough

    @property
    def drift(self) -> float:
        """The larger of the two KLs; inf where one is not known."""
        return math.inf if self.trainer is None or self.engine is None else max(self.trainer, self.engine)

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"passed": self.passed}


def largest_advantage(advantage: Advantage, group: int) -> float:
    """Of rewards of 0 and 1, the largest |advantage| that a group of so many answers can have: divided by the standard
    deviation, one right answer of 16 has 3.75."""
    if advantage.baseline == "none" or group < 2:
        return 1.0
    rewards = (torch.arange(group) < right for right in range(1, group))
    return max(float(advantage(r).abs().max()) for r in rewards)


def rows_of(completions: Sequence[Completion], advantage: float = 1.0) -> list[Row]:
    """Advantages of this size, + and - in turn."""
    return [
        Row(Rollout(Problem("", "", ""), c, "", 0.0, False, i), advantage if i % 2 == 0 else -advantage)
        for i, c in enumerate(completions)
    ]


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
    sums: dict[str, Tensor] = {}
    parts = batches_of(rows, recipe.optim.token_budget, model.pad_token_id)

    def look(place: Place, x: Tensor) -> None:
        forward.see(place, x)
        backward.await_gradient(place, x)

    for part, on_cpu in parts:
        batch = on_cpu.to(model.device)
        at, targets = flat_targets(batch)
        with forward.watching(), backward.watching(), inside_seen(module, look):
            hidden = response_hidden(module, batch.tokens, batch.prompt_length, batch.mask)
        forward.see_logits(hidden, head, name)
        flat, _ = token_logprobs(hidden, head, targets, heat)
        flat.retain_grad()
        value, logp = loss_of(how, flat, at, batch, totals)
        value.backward()
        assert flat.grad is not None
        backward.see_logits(hidden, head, targets, heat, flat.grad, name)
        backward.see_parameters(sums)
        for i, values, mask in zip(part, logp.detach().cpu(), on_cpu.mask, strict=True):
            logps[i] = values[mask].clone()
    forward.see_table()
    norm = float(torch.nn.utils.get_total_norm(sums.values()))
    return Seen(forward.ranges(), backward.histograms(), logps, len(parts), norm)


def confirm(
    model: Model, recipe: Recipe, precision: Precision, rows: Sequence[Row], totals: Totals, wanted: Seen
) -> Trial:
    """One gradient step and one scoring by the engine as a run with this plan does them, beside `wanted` of FP32."""
    logps, step = _gradient_step(model, recipe, precision, rows, totals)
    training, finite = f"{precision.compute.value} training", all(bool(x.isfinite().all()) for x in logps)
    if step.skipped or not finite:
        what = f"gradients are not finite in {training} at a loss scale of {step.loss_scale:g}"
        what = what if finite else f"log-probabilities are not finite in {training}"
        bad = first_bad(model, recipe, precision, rows, totals)
        said = "" if bad is None else f": the first is {'the gradient of ' if finite else ''}{bad}"
        off = kl(logps, wanted.logps) if finite else None
        return Trial(False, step.loss_scale, None, off, None, what + said, where=bad.module if bad else "")
    assert step.grad_norm is not None
    off = kl(logps, wanted.logps)
    try:
        mu = _engine_scores(model, recipe, precision, rows)
    except Overflow as error:
        return Trial(False, step.loss_scale, step.grad_norm, off, None, f"the engine: {error}")
    apart, bent, doubt = kl(logps, mu), _off(step.grad_norm, wanted.grad_norm), 0.0
    mixture, fine = is_mixture(model.module.config), most_bent(precision.compute.epsilon)
    sides = (
        ("training and FP32", off, most_drift(precision.compute.epsilon, mixture)),
        ("training and sampling", apart, most_drift(precision.spacing, mixture)),
    )
    said = [
        f"KL {x:.2g} per token between {what} is more than rounding explains, {most:.2g}"
        for what, x, most in sides
        if not x <= most
    ]
    failed = not max(off, apart) <= MOST_DRIFT
    if not bent <= fine and not failed:
        doubt = _doubt(model, recipe, rows, totals, wanted)
        failed = doubt <= MOST_BENT and not bent <= MOST_BENT
        if failed or doubt <= fine:
            said.append(
                f"the gradient's norm is {step.grad_norm:.3g} in {training} and {wanted.grad_norm:.3g} in FP32, "
                f"{bent:.1%} off; rounding takes less than {fine:.1%}"
            )
    words = "; ".join(said)
    told = {"failed": words} if failed else {"rough": words}
    return Trial(True, step.loss_scale, step.grad_norm, off, apart, bent=bent, doubt=doubt, **told)


def scored(
    model: Model, recipe: Recipe, precision: Precision, rows: Sequence[Row], wanted: Seen
) -> tuple[float, float]:
    """The two KLs of a trial, without its gradient step: from FP32, and between the two sides."""
    backend = SingleBackend(
        replace(model, module=copied(model)), precision, recipe.optim, recipe.rollout.temperature, 1
    )
    logps: list[Tensor] = [torch.zeros(0)] * len(rows)
    for part, batch in batches_of(rows, recipe.optim.token_budget, model.pad_token_id):
        for i, values, mask in zip(part, backend.logprobs(batch).cpu(), batch.mask, strict=True):
            logps[i] = values[mask].clone()
    return kl(logps, wanted.logps), kl(logps, _engine_scores(model, recipe, precision, rows))


def _gradient_step(
    model: Model, recipe: Recipe, precision: Precision, rows: Sequence[Row], totals: Totals
) -> tuple[list[Tensor], StepStats]:
    """Log pi of every row's response, and what came of the step; on a copy of the model."""
    own = replace(model, module=copied(model))
    backend = SingleBackend(own, precision, recipe.optim, recipe.rollout.temperature, 1)
    how = recipe.algorithm.build()
    logps: list[Tensor] = [torch.zeros(0)] * len(rows)
    for part, batch in batches_of(rows, recipe.optim.token_budget, model.pad_token_id):
        scored = backend.logprobs(batch).cpu()
        for i, values, mask in zip(part, scored, batch.mask, strict=True):
            logps[i] = values[mask].clone()

        def loss(logp: Tensor, b: Batch) -> tuple[Tensor, Stats]:
            return algorithms.loss(how, logp, b, totals)

        backend.accumulate(batch.with_old(scored) if how.needs_old else batch, loss)
    return logps, backend.step()


def _off(norm: float, wanted: float) -> float:
    return abs(norm / wanted - 1) if wanted else 0.0


def _doubt(model: Model, recipe: Recipe, rows: Sequence[Row], totals: Totals, wanted: Seen) -> float:
    """How far FP32 is from itself, summed in another order: where terms of 1e5 cancel, no format has the gradient."""
    other = recipe.optim.model_copy(update={"token_budget": max(1, recipe.optim.token_budget // 2)})
    wide = Precision.parse(Format.FP32.value)
    _, step = _gradient_step(model, recipe.model_copy(update={"optim": other}), wide, rows, totals)
    return math.inf if step.grad_norm is None else _off(step.grad_norm, wanted.grad_norm)


def _engine_scores(model: Model, recipe: Recipe, precision: Precision, rows: Sequence[Row]) -> list[Tensor]:
    sequences = [(r.rollout.completion.prompt_ids, r.rollout.completion.response_ids) for r in rows]
    longest = max(r.length for r in rows)
    with make_engine(recipe.rollout, model, precision, recipe.seed, longest=longest) as engine:
        engine.load_weights(precision.to_engine(model.weights(engine.wants)), version=0)
        return engine.score(sequences, recipe.sampling(model.stop_token_ids))
