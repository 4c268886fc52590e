"""What a probe's numbers mean, in sentences: how far apart, against what the formats predict, and whether weights help.

Rounding errors are proportional to a format's epsilon. So |log pi - log mu| and the spread of sequence log-ratios
should grow like epsilon, and KL, which is quadratic in small differences, like its square: 8 and 64 times from FP16
(2^-10) to BF16 (2^-7). The paper measured about 24 times for sequences (Figure 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tenbit.precision import Format
from tenbit.report.words import factor, percent, precise_percent, scientific, superscript, whole
from tenbit.studies.probe import RECORDED, Pair, Study
from tenbit.studies.probe_measures import Measure

LABELS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("kl_k3", "KL(μ‖π) per token, k3", scientific),
    ("kl_k1", "KL(μ‖π) per token, k1", scientific),
    ("logp_abs_mean", "|log π − log μ|, mean", scientific),
    ("logp_abs_max", "|log π − log μ|, largest", scientific),
    ("prob_diff_abs_mean", "|π − μ|, mean", scientific),
    ("prob_diff_min", "π − μ, smallest", scientific),
    ("prob_diff_max", "π − μ, largest", scientific),
    ("outside_tenth", "tokens with π/μ outside [0.9, 1.1]", precise_percent),
    ("outside_half", "tokens with π/μ outside [0.5, 2]", precise_percent),
    ("pearson", "1 − correlation of π and μ", scientific),
    ("seq_logratio_mean", "Σ log(π/μ), mean", scientific),
    ("seq_logratio_std", "Σ log(π/μ), standard deviation", scientific),
    ("seq_logratio_min", "Σ log(π/μ), smallest", scientific),
    ("seq_logratio_max", "Σ log(π/μ), largest", scientific),
    ("seq_ess", "effective sample size of e^Σ", precise_percent),
    ("seq_above_cap", "sequences with e^Σ above C", precise_percent),
    ("seq_chi2", "χ² = E[e^2Σ] − 1", scientific),
)
ROUTING: tuple[tuple[str, str], ...] = (
    ("tokens_differ", "tokens routed differently"),
    ("layers_differ", "tokens × layers routed differently"),
    ("experts_differ", "experts that differ"),
)  # of a mixture only
PAPER = 24.0  # FP16 against BF16, sequence level, Figure 2
BEYOND_ROUNDING = 1e-2  # KL per token; BF16's rounding gives 1e-5 to 1e-3
GOOD, USABLE, POOR = 0.9, 0.5, 0.1  # effective sample sizes
FEWEST = 8  # responses below which an effective sample size says nothing


def read(pair: Pair, key: str) -> Measure:
    """A measure as it is shown: a correlation by what it lacks to 1."""
    m = pair.measures[key]
    if key != "pearson":
        return m
    return Measure(1 - m.value, None if m.high is None else 1 - m.high, None if m.low is None else 1 - m.low)


def shown(measure: Measure, show: Callable[[float], str]) -> tuple[str, str]:
    """(value, interval), the interval empty where there is none."""
    low, high = measure.low, measure.high
    return show(measure.value), "" if low is None or high is None else f"{show(low)} to {show(high)}"


def compact(measure: Measure, show: Callable[[float], str]) -> tuple[str, str]:
    """The same on little room: ``5.7 (3.9 to 7.7)·10⁻⁶``, in two parts."""
    value, low, high = measure.value, measure.low, measure.high
    if show is not scientific or low is None or high is None or value == 0:
        text, within = shown(measure, show)
        return text, f" ({within})" if within else ""
    widest = max(abs(value), abs(low), abs(high))
    power = math.floor(math.log10(abs(value) if widest < 100 * abs(value) else widest / 10))
    a, b, c = (_short(v / 10.0**power) for v in (value, low, high))
    return a, f" ({b} to {c})·10{superscript(power)}"


def _short(value: float) -> str:
    return f"{value:.{1 if abs(value) < 9.95 else 0}f}".replace("-", "−")


def verdict(study: Study) -> list[str]:
    """A few sentences: distance, what the formats predict, importance weights, what looks wrong."""
    if not study.pairs:
        return []
    parts = [_distance(study), *_prediction(study), *(_weights(p) for p in study.pairs)]
    parts += [_identical(p) for p in study.pairs if study.settings.get("source") and _is_identical(p)]
    if any(p.measures["seq_chi2"].value < 0 for p in study.pairs):
        parts.append("A χ² below 0 is noise: it is the mean of few e^2Σ, less 1.")
    strange = [p for p in study.pairs if p.measures["kl_k3"].value > BEYOND_ROUNDING]
    if strange:
        names = ", ".join(p.name for p in strange)
        parts.append(
            f"More than rounding: a KL above {BEYOND_ROUNDING:g} per token ({names}) has another cause as a rule. Look "
            "for another temperature or top-p, another prompt template, padding among the tokens, or stale weights; "
            "--attribute tests them one by one."
        )
    few = min(len(p.table) for p in study.pairs)
    if few < 30:
        parts.append(f"With only {few} responses the intervals are too narrow; sample more before deciding anything.")
    return parts


def _distance(study: Study) -> str:
    said = "; ".join(f"{p.name} {scientific(p.measures['kl_k3'].value)}" for p in study.pairs)
    tokens = sum(p.tokens for p in study.pairs) // len(study.pairs)
    return f"KL between sampler and trainer, nats per token (k3, {whole(tokens)} tokens): {said}."


def _prediction(study: Study) -> list[str]:
    for a, b, found in study.ratios():
        if (a.name, b.name) == ("bf16", "fp16") and {"kl_k3", "seq_logratio_std"} <= found.keys():
            steps = Format.BF16.epsilon / Format.FP16.epsilon
            kl, std = found["kl_k3"], found["seq_logratio_std"]
            return [
                f"BF16’s mismatch is {_times(kl)} FP16’s in KL and {_times(std)} in the spread of sequences. The "
                f"formats’ steps are {steps:g} apart, which predicts about {steps * steps:g} and {steps:g}; the paper "
                f"reports about {PAPER:g} for sequences."
            ]
    return []


def _times(m: Measure) -> str:
    if m.low is None or m.high is None:
        return f"{factor(m.value)} times"
    return f"{factor(m.value)} times (95%: {factor(m.low)} to {factor(m.high)})"


def _is_identical(pair: Pair) -> bool:
    return pair.precision is None and pair.measures["logp_abs_max"].value == 0


def _identical(pair: Pair) -> str:
    return (
        f"{pair.name}: logp_train and logp_rollout are identical, token by token, which two programs never are. Is "
        "logp_train (verl: old_log_prob) the sampler’s own? Leave it out, and have the rows scored with --model."
    )


def _weights(pair: Pair) -> str:
    if len(pair.table) < FEWEST:
        few = f"{len(pair.table)} response{'s' * (len(pair.table) != 1)}"
        return f"{pair.name}: {few} cannot show whether sequence-level importance weights are of use."
    ess = pair.measures["seq_ess"].value
    half = pair.table.half_ess_tokens()
    length = pair.tokens / len(pair.table)
    if ess >= GOOD:
        said = "sequence-level importance weights are usable"
    elif ess >= USABLE:
        said = "sequence-level importance weights cost samples but are usable"
    elif ess >= POOR:
        said = "sequence-level importance weights are mostly noise; truncate or mask them, or change the format"
    else:
        said = "sequence-level importance weights are useless; a few responses hold all the weight"
    text = f"{pair.name}: {said} (effective sample size {percent(ess)} of {len(pair.table):,}"
    if half is not None and half > length:
        far = f"{whole(float(f'{half:.2g}'))} tokens" if half < 1e7 else "ten million tokens and more"
        text += f"; at this rate it would fall to a half at {far}"
    return text + ")."


def described(pair: Pair) -> str:
    """``trained in bf16, sampled in fp16``"""
    if pair.train == pair.rollout == RECORDED:
        return "as recorded"
    train = "trainer as recorded" if pair.train == RECORDED else f"trainer in {pair.train}"
    rollout = "sampler as recorded" if pair.rollout == RECORDED else f"sampler in {pair.rollout}"
    return f"{train}, {rollout}"


def harmless(text: str, keep: str = "") -> str:
    """A model's text on one line: whatever cannot be seen (line ends, escapes, bidirectional marks) is spelt out."""
    return "".join(c if c in keep or c.isprintable() else repr(c)[1:-1] for c in text)
