"""Causes that lie in the record: what was scored, by whom, how it was sampled, under which weights.

Each function compares the recorded log-probabilities with what they would be under another account of how they came
about, on the recorded tokens, and returns the cause together with the case as it stands when that account is taken.
How it was sampled has a file of its own, `attribution_transform`.

**Stale weights** are the gravest charge here, and KL per token is heavy-tailed: over the built-in model's responses its
mean is 14 times its median in bf16, 21 times in fp16, so two genuine samples differ by a factor of two now and then. A
charge therefore needs three things: the record is STALE times as far as the control and the 95% interval of the
difference is above 0; it is STALE times as far as a *second*, larger control to the same prompts; and the record's
responses rank above that control's (KL per token, one-sided Mann-Whitney at 0.1%, which no tail can upset). Fewer than
4 responses cannot pass.

False alarms on genuine records of the built-in model, 3000 resamples each from 2048 responses at temperature 1:

    responses in the record                          16      32      64     128     256
    bf16, the first control alone (95% interval)   4.8%    3.7%    5.3%    5.6%    5.4%
    bf16, all three                               0.03%      0%      0%      0%      0%
    fp16, the first control alone (95% interval)   4.8%    4.0%    5.0%    7.2%    7.9%
    fp16, all three                               0.03%   0.03%      0%   0.10%      0%

Weights off by so little that the record is just 2.4 times as far (fp16) are found in 14% of records of 16 responses
and 47% of 64, with the first control alone in 31% and 61%; a bootstrap bound of 99.9% would find 4% and 26%.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tenbit.engines import Engine
from tenbit.models.loading import Model
from tenbit.precision import Format, Precision
from tenbit.report.words import scientific
from tenbit.studies.attribution_bench import Control, Gap, gap
from tenbit.studies.attribution_cause import Case, Cause, part, switched
from tenbit.types import Overflow

MUCH = 0.5  # another format of the head is believed if it takes off this share of the gap
UNTOUCHED = 0.1  # so much smaller a difference counts as none
STALE = 2.0  # a record so many times as far as a fresh one is not this engine's
SECOND = (64, 256)  # responses of the second control: at least, at most
CERTAIN = 3.09  # standard deviations of the rank sum: one genuine record in a thousand is above

STALE_NAME = "stale weights"
STALE_REMEDY = (
    "make sure that every update reaches the engine and that its prefix cache is reset then; tenbit's loop loads the "
    "weights before each step and proves their delivery"
)
RETOKENISED = "carry token ids from the sampler to the trainer, as tenbit's rollouts do; never decode and encode again"


def retokenisation(case: Case, here: list[Tensor]) -> tuple[Cause, Case]:
    """Sequences whose text gives other ids: were those scored? And what would it do if they were?

    Where the trainer's numbers came with the samples, they are replaced by those of the sampled ids, on the changed
    sequences alone. That is this cause only if the others need no such replacement, or if the numbers that came are
    those of the other ids; else it is another trainer, whose turn comes next.
    """
    bench, n = case.bench, len(case.sequences)
    again = [encode_again(bench.model, response) for _, response in case.sequences]
    changed = [i for i, ((_, response), ids) in enumerate(zip(case.sequences, again, strict=True)) if ids != response]
    what = f"sequences whose text encodes to other ids ({len(changed)} of {n}) scored by the ids that were sampled"
    if not changed:
        note = "every response encodes to the ids that were sampled"
        return Cause("retokenisation", what, RETOKENISED, share=0.0, interval=(0.0, 0.0), note=note), case
    possible = [
        i for i in changed if len(again[i]) > 0 and len(case.sequences[i][0]) + len(again[i]) <= bench.model.context
    ]
    spelled = dict(zip(possible, bench.trainer([(case.sequences[i][0], again[i]) for i in possible]), strict=True))
    # Of two spellings of one text the tokens cannot be paired, so what it would cost is counted on whole sequences.
    lost = [abs(float(here[i].double().sum() - logp.double().sum())) for i, logp in spelled.items()]
    mean = sum(lost) / len(lost) if lost else 0.0
    note = (
        f"{len(changed) / n:.0%} of the responses change when they are encoded again; the trainer's log-probability of "
        f"such a response would move by {mean:.2g} (the sum over its tokens, which cannot be paired)"
    )
    mixed = list(case.trained)
    if _was_retokenised(case.trained, here, changed, spelled):
        for i in changed:
            mixed[i] = here[i]
    before, after = case.against(case.trained), case.against(mixed)
    numbers = {"changed": len(changed) / n, "seq_logp_change": mean}
    share = part(before, after, case.total)
    cause = switched("retokenisation", what, RETOKENISED, before, after, share, note, numbers)
    return cause, replace(case, trained=mixed)


def _was_retokenised(
    given: Sequence[Tensor], here: Sequence[Tensor], changed: Sequence[int], spelled: Mapping[int, Tensor]
) -> bool:
    """Whether the numbers that came differ from ours on the changed sequences, and because those were spelled anew."""
    off = [_apart(g, h) for g, h in zip(given, here, strict=True)]
    among = sum(off[i] for i in changed) / len(changed)
    others = [value for i, value in enumerate(off) if i not in set(changed)]
    if among == 0:
        return False
    if others and sum(others) / len(others) < UNTOUCHED * among:
        return True
    closer = [_apart(given[i], logp) < UNTOUCHED * off[i] for i, logp in spelled.items() if off[i]]
    return sum(closer) > len(closer) / 2


def _apart(a: Tensor, b: Tensor) -> float:
    """Mean square difference of log-probabilities, over the places that both have."""
    k = min(len(a), len(b))
    return float((a[:k].double() - b[:k].double()).square().mean())


def encode_again(model: Model, response: tuple[int, ...]) -> tuple[int, ...]:
    """The ids that a response's text is encoded to."""
    text = model.tokenizer.decode(list(response), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return tuple(model.tokenizer.encode(str(text), add_special_tokens=False))


def other_trainer(case: Case, here: list[Tensor]) -> tuple[Cause | None, Case]:
    """The log-probabilities that came with the samples against the trainer's of this recipe; None if they agree."""
    if all(torch.equal(a, b) for a, b in zip(case.trained, here, strict=True)):
        return None, case
    before, after = case.against(case.trained), case.against(here)
    cause = switched(
        "another trainer",
        "the trainer's log-probabilities that came with the samples replaced by those of this recipe's trainer",
        "train with the settings that tenbit scored with here, or score with those of the training: precision, "
        "model.attention, optim.token_budget",
        before,
        after,
        part(before, after, case.total),
        numbers={"moved": gap(case.trained, here, case.bootstrap).value},
    )
    return cause, replace(case, trained=here)


# --- weights


def older_weights(case: Case, older: Model | None) -> tuple[Cause | None, Case]:
    """Whether an earlier checkpoint explains the record better than the weights that are trained."""
    if older is None:
        return None, case
    bench = replace(case.bench, model=older)
    trained = bench.trainer(case.sequences)
    before, after = case.against(case.trained), case.against(trained)
    share = part(before, after, case.total)
    if share.interval[0] <= 0:
        return None, case
    cause = switched(
        STALE_NAME,
        "pi of the older checkpoint in place of the current one's",
        STALE_REMEDY,
        before,
        after,
        share,
        "the older weights explain the record better: the update did not arrive",
    )
    return cause, replace(case, bench=bench, trained=trained)


def staleness(case: Case, control: Control, engine: Engine, tried: str) -> tuple[Cause, Gap]:
    """The record against one that the engine makes now, its weights just loaded. Also: the gap of a genuine record.

    `tried` says which other accounts of the sampling were tried before, for the charge must not claim more.
    """
    what = "the record replaced by what a fresh engine, with the weights loaded again, draws from the same prompts"
    before, after = case.against(case.trained), control.gap
    innocent = _innocent(before, after, len(control.prompts))
    if not innocent:
        n = min(max(len(case.sequences), SECOND[0]), SECOND[1])
        second = Control.draw(case.bench, engine, case.sequences, n, "second")
        after = second.gap
        z = above(_each(case.recorded, case.trained), _each(second.decoded, second.trained))
        if _times(before, after) < STALE:
            innocent = _no_sign(before, after, n)
        elif z <= CERTAIN:
            innocent = _not_shown(before, after, n, "a few responses make the difference; more samples would tell")
    ratio = _times(before, after)
    numbers = {"times_a_fresh_record": ratio} if math.isfinite(ratio) else {}
    if innocent:
        return Cause(STALE_NAME, what, STALE_REMEDY, before.value, after.value, note=innocent, numbers=numbers), before
    note = (
        f"the record is {ratio:.3g} times as far from the trainer as what this engine draws with these weights. "
        f"{tried}. So it is of other weights, or of another engine or setting than the recipe's"
    )
    share = part(before, after, case.total)
    return switched(STALE_NAME, what, STALE_REMEDY, before, after, share, note, numbers), after


def _times(before: Gap, after: Gap) -> float:
    return before.value / after.value if after.value else math.inf if before.value else 1.0


def _innocent(before: Gap, after: Gap, n: int) -> str:
    """Why a control of n responses does not speak against the record; empty if it does."""
    if _times(before, after) < STALE:
        return _no_sign(before, after, n)
    if (before - after).interval[0] <= 0:
        return _not_shown(before, after, n, "so few differ by as much by chance; more samples would tell")
    return ""


def _no_sign(before: Gap, after: Gap, n: int) -> str:
    return f"no sign of it: the record is {_far(before, after, n)}"


def _not_shown(before: Gap, after: Gap, n: int, why: str) -> str:
    return f"not shown: the record is {_far(before, after, n)}, but {why}"


def _far(before: Gap, after: Gap, n: int) -> str:
    times = _times(before, after)
    sizes = f"{scientific(before.value)} against {scientific(after.value)}"
    return f"{times:.2g} times as far from the trainer as {n} fresh responses ({sizes})"


def _each(mu: Sequence[Tensor], pi: Sequence[Tensor]) -> Tensor:
    """KL per token of each sequence."""
    ratios = [p.double() - m.double() for m, p in zip(mu, pi, strict=True) if len(m)]
    return torch.stack([(r.expm1() - r).mean() for r in ratios])


def above(a: Tensor, b: Tensor) -> float:
    """By how many standard deviations the ranks of a are above those of b (Mann-Whitney)."""
    n, m = len(a), len(b)
    wins = float((a[:, None] > b).sum() + 0.5 * (a[:, None] == b).sum())
    return (wins - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)


# --- settings of the engine that are not the recipe's


def wide_head(case: Case) -> tuple[Cause | None, Case]:
    """Whether the record is that of an engine with an FP32 head, where the plan gives the head its side's format."""
    plan = case.bench.precision
    if plan.head == "fp32" or Format.FP32 == plan.compute == plan.rollout:
        return None, case
    bench = replace(case.bench, precision=plan.model_copy(update={"head": "fp32"}))
    trained = bench.trainer(case.sequences)
    before, after = case.against(case.trained), case.against(trained)
    if after.value > (1 - MUCH) * before.value or (before - after).interval[0] <= 0:
        return None, case
    cause = switched(
        "FP32 head",
        "the trainer's output head multiplied in FP32, as the record's seems to be",
        "[precision] head = 'fp32' (both sides change together), or the engine's head in the format of its weights",
        before,
        after,
        part(before, after, case.total),
        "only the engine's head is in FP32",
    )
    return cause, replace(case, bench=bench, trained=trained)


def other_format(case: Case, control: Control, genuine: Gap) -> Cause | None:
    """For a record that is too far off: whether an engine in another 16-bit format would be as far (pitfall 15).

    It has less to say than another account of the tokens: rounding cannot be repeated, only its size recognised.
    """
    bench = case.bench
    before = case.against(case.trained)
    for form in (Format.BF16, Format.FP16):
        if form == bench.precision.rollout:
            continue
        plan = Precision.parse(f"{bench.precision.compute.value}/{form.value}")
        try:
            with bench.engine(plan) as engine:
                theirs = Control.draw(bench, engine, case.sequences, len(control.prompts))
        except (ValueError, Overflow):
            continue
        if not theirs.gap.value or not 1 / STALE < before.value / theirs.gap.value < STALE:
            continue
        return switched(
            "rollout format",
            f"the record replaced by what an engine in {bench.precision.rollout.value} draws from the same prompts",
            f"run the engine in the plan's format: precision = {bench.precision.name!r} reaches both sides of tenbit; "
            "in another framework set the rollout's dtype as well as the trainer's",
            before,
            genuine,
            part(before, genuine, case.total),
            f"the record is as far from the trainer as what an engine in {form.value} draws ({theirs.gap.value:.2g})",
            {f"gap_of_an_engine_in_{form.value}": theirs.gap.value},
        )
    return None
