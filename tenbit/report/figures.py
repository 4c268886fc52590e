"""Which figures a run's report has: metrics by name -> `Figure` values, in sections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tenbit.report import axis
from tenbit.report.chart import Figure, Panel, Series
from tenbit.report.reading import Run
from tenbit.report.words import number, percent, power_of_two, precise_percent, scientific, seconds, whole

AHEAD = (
    "Drift is what the policy moved between sampling and training; mismatch, above, is measured under the weights that "
    "sampled. The correction sees both at once, the total."
)
# Order from the bottom of the pile. What a step spends besides is shown as "other".
PHASES = ("rollout", "grade", "proximal", "update", "sync")


@dataclass(frozen=True)
class Section:
    title: str
    note: str
    figures: list[Figure]


class Curves:
    """Makes series of a run's metrics and remembers which were used, so that none is left out of the page."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.used: set[str] = set()
        self.known = set(run.names())

    def has(self, *keys: str) -> bool:
        return any(key in self.known for key in keys)

    def __call__(
        self, key: str, label: str, colour: str, show: Callable[[float], str] = number, **more: object
    ) -> list[Series]:
        """The series as a list of one, or of none if the run has no such metric."""
        self.used.add(key)
        if key not in self.known:
            return []
        return [Series(label, self.run.steps, self.run.values(key), colour, show=show, **more)]  # type: ignore[arg-type]


def sections(run: Run) -> list[Section]:
    """All figures that the run has data for; metrics with no figure of their own come last."""
    curves = Curves(run)
    made = [
        Section("Learning", "", [*_learning(curves), *_lengths(curves), *_policy(curves)]),
        Section(
            "Mismatch",
            "Sampler μ against trainer π on the sampled tokens, at the same weights, before any correction.",
            [*_token_mismatch(curves), *_sequence_mismatch(curves), *_routing(curves)],
        ),
        Section("Sampled ahead of training", AHEAD, _ahead(curves)),
        Section("Optimisation", "", _optimisation(curves)),
        Section("Speed", "", _speed(curves)),
    ]
    curves.used.add("optim/skipped")
    rest = [key for key in run.names() if key not in curves.used]
    held = {key: v for key in rest if (v := _constant(run.values(key))) is not None}
    note = "Always the same: " + ", ".join(f"{key} {number(v)}" for key, v in held.items()) + "." if held else ""
    made.append(Section("Other metrics", note, [_plain(curves, key) for key in rest if key not in held]))
    return [section for section in made if section.figures or (section is made[-1] and held)]


def _constant(values: Sequence[float | None]) -> float | None:
    """The one value of a metric that never changes, up to three digits."""
    known = [v for v in values if v is not None]
    return known[0] if len(known) > 1 and len({number(v) for v in known}) == 1 else None


def _share(series: Sequence[Series], title: str = "", height: float = 128.0) -> Panel:
    return Panel(series, axis.linear([], low=0, high=1, as_percent=True), title, height)


def _over(series: Sequence[Series], scale: Callable[..., axis.Axis] = axis.linear, **limits: float) -> axis.Axis:
    """An axis over everything that is drawn, bands included."""
    values = [v for s in series for side in (s.y, *(s.band or ())) for v in side]
    return scale(values, **limits)


def trend(values: Sequence[float | None], reach: int | None = None) -> list[float | None]:
    """A running mean over `reach` values to each side, or a twentieth of the run; gaps stay gaps."""
    reach = max(2, len(values) // 40) if reach is None else reach
    total = list(accumulate((v or 0.0 for v in values), initial=0.0))
    count = list(accumulate((v is not None for v in values), initial=0))
    out: list[float | None] = []
    for i, value in enumerate(values):
        a, b = max(0, i - reach), min(len(values), i + reach + 1)
        out.append(None if value is None else (total[b] - total[a]) / (count[b] - count[a]))
    return out


def _smoothed(series: list[Series]) -> list[Series]:
    """Long noisy curves get their running mean in front; the read-out keeps to the measured values."""
    out: list[Series] = []
    for s in series:
        if sum(v is not None for v in s.y) < 40:
            out.append(s)
            continue
        out.append(Series(s.label, s.x, s.y, s.colour, "faint", s.show))
        out.append(Series(s.label, s.x, trend(s.y), s.colour, show=s.show, quiet=True))
    return out


def _learning(curves: Curves) -> list[Figure]:
    run = curves.run
    evals = []
    for number_of, key in enumerate(run.evals("avg@")):
        name = key.removeprefix("eval/").rpartition("/")[0]
        evals += curves(key, name, f"eval{number_of % 3}", percent, style="points")
        for other in run.evals("pass@"):
            if other.rpartition("/")[0] == key.rpartition("/")[0]:
                label = other.rpartition("/")[2]
                one = curves(other, label, f"eval{number_of % 3}", percent, style="dashed")
                evals += [s for s in one if s.y != run.values(key)]  # at k = 1 they are the same
    accuracy = curves("train/accuracy", "training", "accuracy", percent)
    reward = curves("train/reward", "reward", "reward")
    same = bool(reward and accuracy) and reward[0].y == accuracy[0].y
    figures = []
    if accuracy or evals:
        note = "The reward is 1 for a right answer and 0 for a wrong one: the same curve." if same else ""
        groups = curves("train/informative_groups", "informative groups", "plain", percent)
        panels = [_share([*_smoothed(accuracy), *evals], height=104 if groups else 146)]
        if groups:
            axis_ = axis.linear([], low=0, high=1, target=2, as_percent=True)
            panels.append(Panel(groups, axis_, "prompts whose responses differ in reward", 42))
        figures.append(Figure("Accuracy", panels, note))
    if reward and not same:
        figures.append(Figure("Reward", [Panel(_smoothed(reward), _over(reward))]))
    return figures


def _lengths(curves: Curves) -> list[Figure]:
    length = curves("train/response_length", "mean length", "length", whole)
    cut = curves("train/truncated", "truncated", "bad", percent)
    panels = [Panel(length, _over(length), "tokens", 84)] if length else []
    if cut:
        panels.append(Panel(cut, _over(cut, low=0, target=2, as_percent=True), "share cut off at the limit", 46))
    return [Figure("Response length", panels)] if panels else []


def _policy(curves: Curves) -> list[Figure]:
    entropy = curves("policy/entropy", "entropy", "accuracy")
    clipped = curves("policy/clip_fraction", "clipped", "plain", percent)
    panels = [Panel(entropy, _over(entropy, low=0), "entropy, nats per token", 84)] if entropy else []
    if clipped:
        panels.append(Panel(clipped, _over(clipped, low=0, target=2, as_percent=True), "share of tokens clipped", 46))
    return [Figure("Entropy and clipping", panels)] if panels else []


def _token_mismatch(curves: Curves) -> list[Figure]:
    figures = []
    k3 = curves("mismatch/kl_k3", "k3", "mismatch", scientific)
    k1 = curves("mismatch/kl_k1", "k1", "extreme", scientific)
    panels = [Panel(k3, _over(k3, axis.log10), "estimator k3", 84)] if k3 else []
    panels += [Panel(k1, _over(k1, low=0, target=2), "estimator k1, which may be negative", 46)] if k1 else []
    if panels:
        figures.append(Figure("KL(μ‖π), nats per token", panels))
    ratio = [
        *curves("mismatch/logp_abs_mean", "mean", "mismatch", scientific),
        *curves("mismatch/logp_abs_max", "max", "extreme", scientific),
    ]
    far = [
        *curves("mismatch/outside_tenth", "over 10%", "extreme", scientific),
        *curves("mismatch/outside_half", "over 2×", "bad", scientific),
    ]
    panels = [Panel(ratio, _over(ratio, axis.log10), height=84 if far else 146)] if ratio else []
    panels += [Panel(far, _over(far, axis.log10, target=2), "share of tokens off by", 46)] if far else []
    if panels:
        figures.append(Figure("|log π − log μ| of a token", panels))
    high = curves("mismatch/prob_diff_max", "largest", "mismatch", scientific)
    low = curves("mismatch/prob_diff_min", "smallest", "extreme", scientific)
    mean = curves("mismatch/prob_diff_abs_mean", "mean", "plain", scientific)
    both = [*high, *low]
    panels = [Panel(both, _over(both, low=0), "", 84)] if both else []
    panels += [Panel(mean, _over(mean, axis.log10, target=2), "mean |π − μ|", 46)] if mean else []
    if panels:
        note = "An end near 1 or −1: one program all but excludes a token that the other all but chose."
        figures.append(Figure("π − μ of a token", panels, note))
    return figures


def _sequence_mismatch(curves: Curves) -> list[Figure]:
    figures = []
    deviation = curves("mismatch/seq_logratio_std", "std", "sequence", scientific)
    ends = [
        *curves("mismatch/seq_logratio_max", "largest", "mismatch", scientific),
        *curves("mismatch/seq_logratio_mean", "mean", "plain", scientific),
        *curves("mismatch/seq_logratio_min", "smallest", "extreme", scientific),
    ]
    panels = [Panel(deviation, _over(deviation, axis.log10), "standard deviation", 70)] if deviation else []
    panels += [Panel(ends, _over(ends, low=0, target=3), "mean, largest, smallest", 60)] if ends else []
    if panels:
        figures.append(Figure("Σ log(π/μ) of a sequence", panels))
    shares = [
        *curves("mismatch/seq_ess", "effective", "sequence", precise_percent),
        *curves("mismatch/seq_above_cap", "above cap", "bad", precise_percent),
    ]
    if shares:
        note = "Effective sample size of ρ = π(y)/μ(y), unclamped; and sequences with ρ above the cap."
        figures.append(Figure("Sequences that count", [_share(shares, height=146)], note))
    weight = curves("correction/weight_mean", "mean weight", "sequence")
    outside = curves("correction/outside", "outside", "bad", percent)
    panels = [Panel(weight, _over(weight, low=0), "mean weight", 84)] if weight else []
    if outside:
        panels.append(Panel(outside, _over(outside, low=0, target=2, as_percent=True), "share cut or masked", 46))
    if panels:
        figures.append(Figure("Correction", panels, "What the algorithm made of these ratios."))
    return figures


def _routing(curves: Curves) -> list[Figure]:
    """Of a mixture of experts."""
    parts = (("tokens", "mismatch"), ("layers", "sequence"), ("experts", "plain"))
    shares = [s for what, colour in parts for s in curves(f"routing/{what}_differ", what, colour, scientific)]
    note = "Shares of tokens with any other expert, of their layers, of single experts; as chosen, before any replay."
    panels = [Panel(shares, _over(shares, axis.log10), height=146)] if shares else []
    return [Figure("Routed differently", panels, note)] if panels else []


def _ahead(curves: Curves) -> list[Figure]:
    """Nothing for a run whose responses are sampled under the weights that they train."""
    figures = []
    curves.used.add("staleness/mean")  # every response of a step was sampled under the same weights
    if not curves.has("drift/kl_k3"):
        return []
    parts = (("total", "plain"), ("drift", "sequence"), ("mismatch", "mismatch"))
    kl = [s for part, colour in parts for s in curves(f"{part}/kl_k3", part, colour, scientific)]
    panels = [Panel(kl, _over(kl, axis.log10), "estimator k3", 84)]
    stale = curves("staleness/max", "steps", "scale", whole)
    if stale:
        panels.append(Panel(stale, _over(stale, low=0, target=2), "steps between sampling and training", 46))
    figures.append(Figure("KL by cause, nats per token", panels))
    spread = [s for part, colour in parts for s in curves(f"{part}/seq_logratio_std", part, colour, scientific)]
    panel = Panel(spread, _over(spread, axis.log10), "standard deviation", 130)
    figures.append(Figure("Σ of log-ratios of a sequence, by cause", [panel]))
    shares = [s for part, colour in parts[:2] for s in curves(f"{part}/seq_ess", part, colour, precise_percent)]
    if shares:
        figures.append(Figure("Effective sample size, by cause", [_share(shares, height=146)]))
    # the rest of their numbers is in metrics.jsonl; a figure for each would bury these
    curves.used |= {key for key in curves.known if key.startswith(("drift/", "total/"))}
    return figures


def _optimisation(curves: Curves) -> list[Figure]:
    figures = []
    flags = curves.run.values("optim/skipped")
    skips = [s for s, v in zip(curves.run.steps, flags, strict=True) if v]
    scale = curves("optim/loss_scale", "loss scale", "scale", power_of_two, style="stairs")
    if scale:
        known = sum(v is not None for v in flags)
        note = f"Crossed out: {len(skips):,} of {known:,} steps, with an overflow and a skipped update."
        panel = Panel(scale, _over(scale, axis.log2), height=146, marks=skips)
        figures.append(Figure("Loss scale", [panel], note if skips else "No update was skipped."))
    norm = curves("optim/grad_norm", "norm", "plain")
    if norm:
        known = [v for v in norm[0].y if v is not None and v > 0]
        wide = bool(known) and max(known) > 30 * min(known)
        note = "Before clipping; undefined on a skipped update." if skips else "Before clipping."
        scaled = _over(norm, axis.log10 if wide else axis.linear)
        panel = Panel(norm, scaled, height=146, marks=() if scale else skips)
        figures.append(Figure("Gradient norm", [panel], note))
    loss = curves("optim/loss", "loss", "plain")
    rate = curves("optim/lr", "learning rate", "scale", scientific)
    panels = [Panel(loss, _over(loss), "loss", 84)] if loss else []
    panels += [Panel(rate, _over(rate, low=0, target=2), "learning rate", 46)] if rate else []
    if panels:
        figures.append(Figure("Loss and learning rate", panels))
    return figures


def _speed(curves: Curves) -> list[Figure]:
    figures = []
    run = curves.run
    names = [k for k in run.names() if k.startswith("time/") and k != "time/step"]
    order = [f"time/{p}" for p in PHASES]
    names.sort(key=lambda k: (order.index(k) if k in order else len(order), k))
    curves.used |= set(names)
    names = [k for k in names if any(run.values(k))]  # a phase that never took time is not a phase of this run
    phases = []
    for i, key in enumerate(names):
        one = curves(key, key.removeprefix("time/"), f"phase{min(i, 6)}", seconds)
        phases += one
    total = run.values("time/step")
    curves.used.add("time/step")
    if any(v is not None for v in total):
        sums = [sum(p.y[i] or 0.0 for p in phases) for i in range(len(total))]
        rest = [None if t is None else max(0.0, t - s) for t, s in zip(total, sums, strict=True)]
        if any(rest):
            phases.append(Series("other", run.steps, rest, "rest", show=seconds))
    if phases:
        piles = [sum(p.y[i] or 0.0 for p in phases) for i in range(len(run.steps))]
        panel = Panel(phases, axis.linear(piles, low=0), height=146, stacked=True)
        figures.append(Figure("Seconds of a step", [panel]))
    meanwhile = [k for k in run.names() if k.startswith("ahead/")]
    if meanwhile:
        piled = [curves(k, k.removeprefix("ahead/"), f"phase{i % 7}", seconds)[0] for i, k in enumerate(meanwhile)]
        piles = [sum(s.y[i] or 0.0 for s in piled) for i in range(len(run.steps))]
        panel = Panel(piled, axis.linear(piles, low=0), height=146, stacked=True)
        figures.append(Figure("Seconds of sampling, ahead", [panel], "While steps before it were trained."))
    speed = curves("perf/tokens_per_second", "tokens/s", "plain", whole)
    if speed:
        figures.append(Figure("Tokens per second", [Panel(speed, _over(speed, low=0), height=146)]))
    return figures


def _plain(curves: Curves, key: str) -> Figure:
    one = curves(key, key.rpartition("/")[2], "plain", style="points" if key.startswith("eval/") else "line")
    return Figure(key, [Panel(one, _over(one), height=84)])
