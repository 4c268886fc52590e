"""Causes that lie in the arithmetic: each changes what is rounded, where, or in what order, and nothing else.

The engine's side is switched on the control by drawing it again; the trainer's by scoring the tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tenbit.engines import Engine
from tenbit.engines.torch import Path, TorchEngine
from tenbit.precision import Format, Precision
from tenbit.studies.attribution_bench import Bench, Control, Gap, Ids, gap, variant
from tenbit.studies.attribution_cause import Case, Cause, attempt, part, scaled, switched
from tenbit.types import Overflow

ALONE = 16  # responses that are drawn one at a time


@dataclass(frozen=True)
class Numerics:
    """A case whose record is settled, its control, and `genuine`: the gap that numerics alone have made."""

    case: Case
    control: Control
    genuine: Gap
    trusted: bool  # whether the record is a genuine one of this engine

    @property
    def bench(self) -> Bench:
        return self.case.bench

    def on_control(self, before: Gap, after: Gap) -> Gap:
        return scaled(before, after, self.genuine, self.case.total)

    def scored(self, pi: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[Gap, Gap, Gap]:
        """Before, after and share of a switch from one pi to another: on the record if it is genuine, else on the
        control."""
        if self.trusted:
            before, after = self.case.against(pi), self.case.against(other)
            return before, after, part(before, after, self.case.total)
        control = self.control
        before = gap(control.decoded, pi, control.bootstrap)
        after = gap(control.decoded, other, control.bootstrap)
        return before, after, self.on_control(before, after)

    @property
    def tokens(self) -> Sequence[Ids]:
        """The sequences that `scored` is about."""
        return self.case.sequences if self.trusted else self.control.sequences


def decoding(at: Numerics, engine: Engine) -> Cause:
    name, what = "decode against prefill", "log mu of the same tokens by the engine's prefill, not as it decoded them"
    remedy = (
        "no setting makes an engine decode as it prefills; a finer format makes both round less: precision = 'fp16'. "
        "What is left is for a correction: algorithm.name = 'pg-is'"
    )

    def measure() -> Cause:
        if at.trusted:
            prefilled = at.bench.prefill(engine, at.case.sequences)
            before = at.case.against(at.case.trained)
            after = gap(prefilled, at.case.trained, at.case.bootstrap)
            moved = gap(at.case.recorded, prefilled, at.case.bootstrap)
            share = part(before, after, at.case.total)
        else:
            prefilled = at.bench.prefill(engine, at.control.sequences)
            before, after = at.control.gap, gap(prefilled, at.control.trained, at.control.bootstrap)
            moved = gap(at.control.decoded, prefilled, at.control.bootstrap)
            share = at.on_control(before, after)
        return switched(name, what, remedy, before, after, share, numbers={"moved": moved.value})

    return attempt(name, what, remedy, measure)


def batching(at: Numerics, engine: Engine) -> Cause:
    name = "batch composition"
    what = "each response drawn alone and each row scored alone, not in batches"
    remedy = (
        "rollout.max_batch and optim.token_budget set who is computed together; where the share is large, kernels that "
        "do not depend on the batch help (vLLM: VLLM_BATCH_INVARIANT=1), or precision = 'fp16'"
    )

    def measure() -> Cause:
        control = at.control.part(ALONE)
        drawn, kept = control.replay(at.bench, engine, alone=True)
        trained = at.bench.trainer(control.sequences, alone=True)
        before = gap(control.decoded, control.trained, control.bootstrap, kept)
        after = gap(drawn, trained, control.bootstrap, kept)
        numbers = {
            "moved_engine": gap(control.decoded, drawn, control.bootstrap, kept).value,
            "moved_trainer": gap(control.trained, trained, control.bootstrap).value,
            "prefill_together_and_alone": gap(
                at.bench.prefill(engine, control.sequences),
                at.bench.prefill(engine, control.sequences, alone=True),
                control.bootstrap,
            ).value,
        }
        share = at.on_control(before, after)
        return switched(name, what, remedy, before, after, share, numbers=numbers)

    return attempt(name, what, remedy, measure)


def head(at: Numerics) -> Cause:
    name, what = "FP32 head", "the output head multiplied in FP32 on both sides"
    remedy = "[precision] head = 'fp32' (both sides change together)"
    if at.bench.precision.head == "fp32" or at.bench.precision.name == Format.FP32:
        return Cause(name, what, remedy, note="the head is in FP32 already")

    def measure() -> Cause:
        plan = at.bench.precision.model_copy(update={"head": "fp32"})
        control = at.control
        with at.bench.engine(plan) as engine:
            drawn, kept = control.replay(at.bench, engine)
        trained = at.bench.trainer(control.sequences, precision=plan)
        before = gap(control.decoded, control.trained, control.bootstrap, kept)
        after = gap(drawn, trained, control.bootstrap, kept)
        share = at.on_control(before, after)
        numbers = {
            "moved_trainer": gap(control.trained, trained, control.bootstrap).value,
        }
        return switched(name, what, remedy, before, after, share, numbers=numbers)

    return attempt(name, what, remedy, measure)


def attention(at: Numerics) -> Cause:
    name, now = "attention kernel", at.bench.recipe.model.attention
    other = "eager" if now != "eager" else "sdpa"
    what = f"the trainer's attention computed by {other!r} instead of {now!r}, both in the library's own modules"
    remedy = f"model.attention = {other!r}"

    def measure() -> Cause:
        bench = at.bench
        plain = bench.trainer(at.tokens, model=variant(bench.model, now, plain=True))
        switch = bench.trainer(at.tokens, model=variant(bench.model, other, plain=True))
        before, after, share = at.scored(plain, switch)
        bootstrap = at.case.bootstrap if at.trusted else at.control.bootstrap
        numbers = {"moved": gap(plain, switch, bootstrap).value}
        fix = remedy if share.value > 0 else f"keep model.attention = {now!r}"
        return switched(name, what, fix, before, after, share, numbers=numbers)

    return attempt(name, what, remedy, measure)


def kernels(at: Numerics) -> Cause | None:
    """Both sides in plain torch, where tenbit's own compiled kernels are what computes; else None."""
    name, what = "compiled kernels", "both sides in plain torch instead of tenbit's compiled kernels"
    remedy = "TENBIT_NATIVE=0 in the environment turns them off, at a cost in speed"
    bench = at.bench
    if bench.recipe.rollout.engine != "torch":
        return None
    with _built_in(bench, "auto") as usual:
        if usual.path != "native":
            return None

    def measure() -> Cause:
        control = at.control
        with bench.engine(engine=_built_in(bench, "plain")) as engine:
            drawn, kept = control.replay(bench, engine)
        trained = bench.trainer(control.sequences, model=variant(bench.model, plain=True))
        before = gap(control.decoded, control.trained, control.bootstrap, kept)
        after = gap(drawn, trained, control.bootstrap, kept)
        share = at.on_control(before, after)
        numbers = {
            "moved_engine": gap(control.decoded, drawn, control.bootstrap, kept).value,
            "moved_trainer": gap(control.trained, trained, control.bootstrap).value,
        }
        fix = remedy if share.value > 0 else "keep them"
        return switched(name, what, fix, before, after, share, numbers=numbers)

    return attempt(name, what, remedy, measure)


def _built_in(bench: Bench, path: Path) -> TorchEngine:
    return TorchEngine(
        bench.model.module.config,
        bench.precision,
        device=bench.model.device,
        max_batch=bench.recipe.rollout.max_batch,
        pad_token_id=bench.model.pad_token_id,
        path=path,
    )


def left_over(at: Numerics, engine: Engine) -> float | None:
    """What is left at the same dtype without decoding and without batches, as KL per token of the samples.

    In FP32 nothing would be left whatever the causes are, and the number would say nothing.
    """
    control = at.control
    try:
        prefilled = at.bench.prefill(engine, control.sequences, alone=True)
    except (ValueError, NotImplementedError):
        return None
    left = gap(prefilled, at.bench.trainer(control.sequences, alone=True), control.bootstrap)
    return (left.over(control.gap) * at.genuine).value


def dtype(at: Numerics) -> Cause:
    """What both sides in FP32 take off: not one cause among others but a bound, for all of them round."""
    plan = at.bench.precision
    name, what = "dtype", f"both sides in FP32 instead of {plan.name}"
    remedy = _dtype_remedy(plan)
    full = Precision.parse(Format.FP32.value)
    if plan.name == full.name:
        return Cause(name, what, remedy, note="both sides are in FP32 already")

    def measure() -> Cause:
        bench, control = at.bench, at.control
        with bench.engine(full) as engine:
            drawn, kept = control.replay(bench, engine)
        trained = bench.trainer(control.sequences, precision=full)
        before = gap(control.decoded, control.trained, control.bootstrap, kept)
        after = gap(drawn, trained, control.bootstrap, kept)
        own = gap(control.trained, trained, control.bootstrap)
        numbers = {
            "rounding_of_the_trainer": own.value,
            "rounding_of_the_engine": gap(control.decoded, drawn, control.bootstrap, kept).value,
        }
        note = ""
        if Format.BF16 in (plan.compute, plan.rollout):
            note = _in_fp16(at, trained, own, numbers)
        return switched(name, what, remedy, before, after, at.on_control(before, after), note, numbers)

    return attempt(name, what, remedy, measure)


def _in_fp16(at: Numerics, exact: Sequence[Tensor], own: Gap, numbers: dict[str, float]) -> str:
    """What FP16 would do, measured on the trainer's side; the numbers are added to."""
    try:
        short = at.bench.trainer(at.control.sequences, precision=Precision.parse(Format.FP16.value))
    except Overflow as error:
        return f"FP16 is not an option as it is: {error}"
    rounding = gap(short, exact, at.control.bootstrap)
    numbers["rounding_of_the_trainer_in_fp16"] = rounding.value
    times = own.value / rounding.value if rounding.value else float("inf")
    return (
        f"in FP16 the trainer's own rounding is {times:.3g} times smaller (its KL to FP32 {rounding.value:.2g}, "
        f"now {own.value:.2g})"
    )


def _dtype_remedy(plan: Precision) -> str:
    if plan.name == Format.FP16.value:
        return "none among the 16-bit formats, of which this rounds least; precision = 'fp32' costs about twice as much"
    return "precision = 'fp16' (or 'fp32')"
