"""Causes that lie in the record: what was scored, by whom, how it was sampled, under which weights.

Each function compares the recorded log-probabilities with what they would be under another account of how they came
about, on the recorded tokens, and returns the cause together with the case as it stands when that account is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tenbit.models.loading import Model
from tenbit.precision import Format, Precision
from tenbit.studies.attribution_bench import Bootstrap, Control, Gap, gap, transformed
from tenbit.studies.attribution_cause import Case, Cause, part, switched
from tenbit.types import Overflow, Sampling

SEARCHED_TOKENS = 2048  # on which other transforms are tried
SEARCHED_SEQUENCES = 32
HEATS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
TOP_P = (0.99, 0.95, 0.9, 0.8, 0.7)
TOP_K = (20, 50)
MUCH = 0.5  # another transform is believed if it takes off this share of the gap
OUTSIDE = 0.01  # recorded tokens that a truncation may exclude, for rounding at its border
UNTOUCHED = 0.1  # so much smaller a difference counts as none
STALE = 2.0  # a record so many times as far as a fresh one is not this engine's

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


# --- the sampling transform


def transform(case: Case) -> tuple[Cause, Case]:
    """Whether the record fits another temperature or truncation than the recipe's."""
    bench = case.bench
    some = _some(case)
    stated = bench.sampling
    tried = _candidates(case)
    scored = transformed(bench.model, bench.precision, bench.recipe, [case.sequences[i] for i in some], tried)
    bootstrap = Bootstrap.of(len(some), "transform")
    recorded = [case.recorded[i] for i in some]
    distances = [_distance(recorded, logps, bootstrap) for logps in scored]
    best = min(range(len(tried)), key=lambda i: distances[i])
    found = tried[best]
    before = case.against(case.trained)
    what = f"the record compared with pi at {_words(found)} instead of {_words(stated)}"
    if best == 0 or distances[best] > (1 - MUCH) * distances[0]:
        note = f"of {len(tried)} transforms the stated one ({_words(stated)}) fits the record"
        if best:
            note += f" as well as any: at {_words(found)} the KL is {distances[best]:.2g} against {distances[0]:.2g}"
        what = f"the record compared with pi at other temperatures, top-p and top-k than {_words(stated)}"
        return Cause("sampling transform", what, _transform_remedy(stated, stated), note=note), case
    settled = replace(bench, sampling=found)
    trained = settled.trainer(case.sequences)
    after = case.against(trained)
    note = f"the recorded log-probabilities are those of {_words(found)}, the recipe says {_words(stated)}"
    cause = switched(
        "sampling transform",
        what,
        _transform_remedy(stated, found),
        before,
        after,
        part(before, after, case.total),
        note,
        {"temperature": found.temperature, "top_p": found.top_p, "top_k": float(found.top_k)},
    )
    return cause, replace(case, bench=settled, trained=trained)


def _some(case: Case) -> list[int]:
    """Sequences on which transforms are tried: evenly spaced, under a budget of tokens."""
    n = len(case.sequences)
    step = max(1, n // SEARCHED_SEQUENCES)
    chosen: list[int] = []
    tokens = 0
    for i in range(0, n, step):
        length = len(case.sequences[i][1])
        if chosen and tokens + length > SEARCHED_TOKENS:
            break
        chosen.append(i)
        tokens += length
    return chosen


def _candidates(case: Case) -> list[Sampling]:
    """The stated transform first; then temperatures, and truncations at the likely ones."""
    stated, recipe = case.bench.sampling, case.bench.recipe
    plain = replace(stated, top_p=1.0, top_k=0)
    likely = list(dict.fromkeys([stated.temperature, 1.0, *_positive(recipe.eval.temperature)]))
    heats = list(dict.fromkeys([*likely, *HEATS]))
    tried = [stated, *(replace(plain, temperature=t) for t in heats)]
    top_p = dict.fromkeys([*(p for p in (recipe.eval.top_p, stated.top_p) if p < 1), *TOP_P])
    top_k = dict.fromkeys([*([stated.top_k] if stated.top_k else []), *TOP_K])
    for t in likely:
        tried += [replace(plain, temperature=t, top_p=p) for p in top_p]
        tried += [replace(plain, temperature=t, top_k=k) for k in top_k]
    return list(dict.fromkeys(tried))


def _positive(value: float) -> list[float]:
    return [value] if value > 0 else []


def _distance(mu: Sequence[Tensor], pi: Sequence[Tensor], bootstrap: Bootstrap) -> float:
    """KL over the tokens that pi does not exclude; infinite where it excludes more than rounding could."""
    inside = [p.isfinite() for p in pi]
    kept = sum(int(i.sum()) for i in inside) / sum(len(i) for i in inside)
    if kept < 1 - OUTSIDE:
        return math.inf
    return gap(
        [m[i] for m, i in zip(mu, inside, strict=True)], [p[i] for p, i in zip(pi, inside, strict=True)], bootstrap
    ).value


def _words(sampling: Sampling) -> str:
    parts = [f"temperature {sampling.temperature:g}"]
    if sampling.top_p < 1:
        parts.append(f"top-p {sampling.top_p:g}")
    if sampling.top_k:
        parts.append(f"top-k {sampling.top_k}")
    return ", ".join(parts)


def _transform_remedy(stated: Sampling, found: Sampling) -> str:
    if found.truncated and not stated.truncated:
        return "sample without truncation: rollout.top_p = 1, rollout.top_k = 0 (vLLM: top_p=1, top_k=0)"
    if found.temperature == 1.0 != stated.temperature:
        return (
            "record log-probabilities after the temperature (vLLM: logprobs_mode='processed_logprobs'), or sample with "
            "rollout.temperature = 1"
        )
    if found.temperature != stated.temperature:
        return f"set rollout.temperature = {found.temperature:g}, as it was sampled with"
    return "nothing to do"


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


def staleness(case: Case, control: Control) -> tuple[Cause, Gap]:
    """The record against one that the engine makes now, its weights just loaded. Also: the gap of a genuine record."""
    what = "the record replaced by what a fresh engine, with the weights loaded again, draws from the same prompts"
    before, after = case.against(case.trained), control.gap
    ratio = before.value / after.value if after.value else math.inf if before.value else 1.0
    numbers = {"times_a_fresh_record": ratio} if math.isfinite(ratio) else {}
    excess = before - after
    if ratio < STALE or excess.interval[0] <= 0:
        note = (
            f"no sign of it: the record is {ratio:.2g} times as far from the trainer as what a fresh engine draws "
            f"({before.value:.2g}, {after.value:.2g})"
        )
        return Cause(STALE_NAME, what, STALE_REMEDY, before.value, after.value, note=note, numbers=numbers), before
    note = (
        f"the record is {ratio:.3g} times as far from the trainer as what this engine draws with these weights, and no "
        "temperature or truncation explains it: other weights, or another engine or setting than the recipe's"
    )
    share = part(before, after, case.total)
    return switched(STALE_NAME, what, STALE_REMEDY, before, after, share, note, numbers), after


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
