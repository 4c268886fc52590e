"""Which figures a page over several runs has: cells -> plots, in sections that follow the paper's figures.

Figures 1 and 6 set BF16 beside FP16, one small plot for each algorithm. Figure 3 sets algorithms beside one another, in
BF16 and in FP16. Figure 4 is all algorithms in FP16, Figure 5 other pairs of formats. Runs that are compared in none of
these ways (two learning rates, say) are compared in plain plots. A metric has one vertical axis wherever it is drawn,
so that plots can be compared by eye.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from tenbit.report import axis
from tenbit.report.chart import Figure, Panel, Series
from tenbit.report.many_cells import UNSET, Cell
from tenbit.report.many_curves import Kept, over_seeds, reach_for
from tenbit.report.words import number, percent, scientific, seconds, whole

PALETTE = 8  # series0 to series7 of the style sheet
BY_PRECISION = {
    "fp16": "fp16", "bf16": "bf16", "fp32": "fp32", "bf16/fp16": "sequence", "fp16/bf16": "eval0",
    "bf16/fp32": "eval1", "fp16/fp32": "reward", "fp32/fp16": "eval2", "fp32/bf16": "extreme",
}  # fmt: skip
BOTH = ("bf16", "fp16")
Ink = tuple[str, bool]  # a colour, and whether the line is broken: where there are more curves than colours


@dataclass(frozen=True)
class Metric:
    """What is drawn: one metric of the run log, or two that belong together. `slug` names its files. `of` says for each
    key what its curve keeps of steps and seeds; means, where it is empty."""

    slug: str
    title: str
    keys: tuple[str, ...]
    show: Callable[[float], str] = number
    scale: Callable[..., axis.Axis] = axis.linear
    note: str = ""
    points: bool = False
    unit: str = ""
    of: tuple[Kept, ...] = ()


ENDS = Metric(
    "pi-mu", "Largest and smallest π − μ", ("mismatch/prob_diff_max", "mismatch/prob_diff_min"),
    note="Of the tokens of a step. Near 1 or −1, one program all but excludes a token that the other all but chose.",
    unit="difference of two probabilities", of=("largest", "smallest"),
)  # fmt: skip
KL = Metric("kl", "KL(μ‖π), nats per token", ("mismatch/kl_k3",), scientific, axis.log10, unit="nats per token")
NORM = Metric(
    "gradient-norm", "Gradient norm", ("optim/grad_norm",), note="Before clipping.", scale=axis.log10,
    unit="norm of the gradient",
)  # fmt: skip
ENTROPY = Metric("entropy", "Entropy, nats per token", ("policy/entropy",), unit="nats per token")
LENGTH = Metric("length", "Response length, tokens", ("train/response_length",), whole, unit="tokens")
SECONDS = Metric("seconds", "Seconds of a step", ("time/step",), seconds, unit="seconds")
SHARE = "share of responses that are right"


@dataclass(frozen=True)
class Plot:
    """A figure with the name of its file. `ref` is the paper's figure; `title` and `caption` go with the PNG, which
    has no page around it that says what it shows."""

    name: str
    figure: Figure
    ref: str = ""
    title: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Group:
    """Plots in one grid. `beside` puts them in two columns, row by row; `folded` behind one line."""

    title: str
    plots: list[Plot]
    note: str = ""
    beside: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    ref: str
    note: str
    groups: list[Group]


@dataclass
class Desk:
    """The cells, and what all plots share: smoothing, axes, colours, and the names of files already given."""

    cells: Sequence[Cell]
    reach: int
    axes: dict[str, axis.Axis] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> Desk:
        return cls(cells, reach_for([run for cell in cells for run in cell.runs]))

    @property
    def width(self) -> int:
        """Steps of a running mean."""
        return 2 * self.reach + 1

    def has(self, metric: Metric, cells: Sequence[Cell]) -> bool:
        return any(v is not None for c in cells for run in c.runs for key in metric.keys for v in run.values(key))

    @cached_property
    def rewards(self) -> list[Metric]:
        """Training reward, and accuracy where it is another number."""
        runs = [run for cell in self.cells for run in cell.runs]
        accuracy = Metric("accuracy", "Training accuracy", ("train/accuracy",), percent, unit=SHARE)
        if not any(v is not None for run in runs for v in run.values("train/reward")):
            return [accuracy]
        same = all(run.values("train/reward") == run.values("train/accuracy") for run in runs)
        show, unit = (percent, SHARE) if same else (number, "mean reward of a response")
        reward = Metric("reward", "Training reward", ("train/reward",), show, unit=unit)
        return [reward] if same else [reward, accuracy]

    @cached_property
    def evaluations(self) -> list[Metric]:
        keys = dict.fromkeys(key for cell in self.cells for run in cell.runs for key in run.evals("avg@"))
        names = {key: key.removeprefix("eval/").replace("/", " ") for key in sorted(keys)}
        return [
            Metric(f"evaluation-{slug(name)}", f"Evaluation, {name}", (key,), percent, points=True, unit=SHARE)
            for key, name in names.items()
        ]

    def series(self, cell: Cell, metric: Metric, label: str, ink: Ink) -> list[Series]:
        """One curve for each key; those after the first lie in its colour and need no name of their own."""
        out = []
        for i, key in enumerate(metric.keys):
            of = metric.of[i] if metric.of else "mean"
            curve = over_seeds(cell.runs, key, 0 if metric.points else self.reach, of)
            curve = curve.known() if metric.points else curve
            if any(curve.count):
                band = (curve.low, curve.high) if max(curve.count) > 1 and of == "mean" else None
                colour, broken = ink
                style = ("dashed" if broken else "points") if metric.points else "broken" if broken else "line"
                out.append(Series(label, curve.steps, curve.mean, colour, style, metric.show, band, i > 0, of))
        return out

    def axis(self, metric: Metric) -> axis.Axis:
        """The metric's one axis, over all cells and their bands."""
        if metric.slug not in self.axes:
            drawn = [s for cell in self.cells for s in self.series(cell, metric, "", ("plain", False))]
            values = [v for s in drawn for side in (s.y, *(s.band or ())) for v in side if v is not None]
            self.axes[metric.slug] = _scaled(metric, values)
        return self.axes[metric.slug]

    def by_precision(self, cell: Cell) -> Ink:
        others = sorted({c.precision for c in self.cells} - set(BY_PRECISION))
        if cell.precision not in others:
            return BY_PRECISION[cell.precision], False
        at = others.index(cell.precision)
        return f"series{2 + at % (PALETTE - 2)}", at >= PALETTE - 2  # the first two are near FP16's and BF16's

    def by_kin(self, cell: Cell) -> Ink:
        """By what it is besides its precision: an algorithm has one colour on the whole page."""
        kin = list(dict.fromkeys(c.kin for c in self.cells))
        return ink(kin.index(cell.kin))


def ink(number: int) -> Ink:
    """Of the curve with this number: all colours first, then all again with broken lines."""
    return f"series{number % PALETTE}", number // PALETTE % 2 == 1


def _scaled(metric: Metric, values: Sequence[float]) -> axis.Axis:
    if metric.show is percent and values and min(values) >= 0 and max(values) <= 1:
        return axis.linear([], low=0, high=1, as_percent=True)
    if metric.scale is axis.log10:
        positive = [v for v in values if v > 0]
        if metric is KL or (positive and max(positive) > 30 * min(positive)):
            return axis.log10(values)
    return axis.linear(values, low=0)


def slug(text: str) -> str:
    """A part of a file name."""
    return re.sub(r"[^a-z0-9.@=]+", "-", text.lower()).strip("-.")[:60] or "x"


def names(cells: Sequence[Cell]) -> list[str]:
    """What each is called where only these are drawn: the parts in which they differ."""
    labels = []
    for cell in cells:
        parts = []
        if len({c.algorithm for c in cells}) > 1:
            parts.append(cell.algorithm)
        if len({c.precision for c in cells}) > 1:
            parts.append(cell.precision)
        for key, value in cell.extras:
            if value != UNSET and {dict(c.extras).get(key) for c in cells} != {value}:
                parts.append(f"{cell.brief(key)}={value}")
        labels.append(" ".join(filter(None, parts)) or cell.label)
    return labels


def plot(
    desk: Desk, metric: Metric, cells: Sequence[Cell], title: str, file: str, ref: str = "",
    colour: Callable[[Cell], Ink] | None = None, marks: bool = True,
) -> list[Plot]:  # fmt: skip
    """One plot of these cells, as a list; empty if none of them has the metric."""
    if not desk.has(metric, cells):
        return []
    inks = map(colour or desk.by_precision, cells)
    labels = zip(cells, names(cells), inks, strict=True)
    series = [s for cell, label, one in labels for s in desk.series(cell, metric, label, one)]
    fallen = [m.outcome.collapsed_at for c in cells for m in c.members if m.outcome.collapsed_at is not None]
    named = sum(not s.quiet for s in series)
    crossed = sorted(set(fallen)) if marks else []
    panel = Panel(series, desk.axis(metric), height=max(132.0, 13.0 * named), marks=crossed, unit=metric.unit)
    caption = [f"As {ref} of the paper." if ref else "", metric.note, *_how(desk, metric, cells)]
    if panel.marks:
        caption.append("Crosses: a run collapsed.")
    while file in desk.taken:  # two names may differ only in what a file name cannot hold
        file += "-2"
    desk.taken.add(file)
    alone = title if title == metric.title else f"{metric.title}: {title}"
    return [Plot(file, Figure(title, [panel]), ref, alone, " ".join(filter(None, caption)))]


def _how(desk: Desk, metric: Metric, cells: Sequence[Cell]) -> list[str]:
    """What a curve is of its seeds, and of neighbouring steps."""
    seeds = {len(c.members) for c in cells}
    count = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    if metric.of:
        over = [f"{count} seeds"] if seeds != {1} else []
        over += [f"{desk.width} steps"] if desk.reach else []
        return [f"Each point is the extreme of {' and '.join(over)}, not a mean."] if over else []
    said = [f"Mean of {count} seeds, band from the smallest to the largest."] if seeds != {1} else []
    return [*said, f"Running mean over {desk.width} steps."] if desk.reach and not metric.points else said


def sections(desk: Desk) -> list[Section]:
    """All sections that there are runs for."""
    made = [_beside(desk), _stability(desk), _in_fp16(desk), _pairs(desk), _compared(desk)]
    cleaned = [replace(s, groups=[g for g in s.groups if g.plots]) for s in made]
    return [s for s in cleaned if s.groups]


def families(desk: Desk, wanted: Callable[[set[str]], bool]) -> list[list[Cell]]:
    """Cells that differ in precision alone, where the set of their precisions is a `wanted` one."""
    kin: dict[tuple[str, ...], list[Cell]] = {}
    for cell in desk.cells:
        kin.setdefault(cell.kin, []).append(cell)
    return [cells for cells in kin.values() if wanted({c.precision for c in cells})]


def duos(desk: Desk) -> list[list[Cell]]:
    """BF16 and FP16 of the same algorithm."""
    found = families(desk, lambda p: p >= set(BOTH))
    return [[c for c in cells if c.precision in BOTH] for cells in found]


def _odd(desk: Desk) -> list[list[Cell]]:
    """Several precisions of one algorithm, of which not all are plain BF16 or FP16."""
    return families(desk, lambda p: len(p) > 1 and bool(p - set(BOTH)))


def columns(desk: Desk) -> dict[str, list[Cell]]:
    """All cells in BF16 and all in FP16, for figures that set algorithms beside one another."""
    found = {p: [c for c in desk.cells if c.precision == p] for p in BOTH} if duos(desk) else {}
    return {p: cells for p, cells in found.items() if len({c.kin for c in cells}) > 1}


def _kin(cell: Cell) -> str:
    return " ".join(filter(None, cell.kin)) or cell.label


def _beside(desk: Desk) -> Section:
    groups = []
    for metric in [*desk.rewards, *desk.evaluations]:
        figure = 6 if metric.points else 1
        plots = [
            p for duo in duos(desk)
            for p in plot(desk, metric, duo, _kin(duo[0]), f"figure-{figure}-{metric.slug}-{slug(_kin(duo[0]))}",
                          f"Figure {figure}")
        ]  # fmt: skip
        groups.append(Group(metric.title, plots))
    return Section("BF16 beside FP16", "Figures 1 and 6", "Crosses: steps at which a run collapsed.", groups)


def _stability(desk: Desk) -> Section:
    groups = []
    for metric in [desk.rewards[0], ENDS, KL, NORM, ENTROPY]:
        sides = [
            p for precision, cells in columns(desk).items()
            for p in plot(desk, metric, cells, precision.upper(), f"figure-3-{metric.slug}-{precision}", "Figure 3",
                          desk.by_kin, marks=False)
        ]  # fmt: skip
        groups.append(Group(metric.title, sides, metric.note, beside=True))
        if metric is desk.rewards[0]:
            continue  # drawn for each algorithm in the section before
        single = [
            p for duo in duos(desk)
            for p in plot(desk, metric, duo, _kin(duo[0]), f"figure-3-{metric.slug}-{slug(_kin(duo[0]))}", "Figure 3")
        ]  # fmt: skip
        title = f"{metric.title}: BF16 and FP16 in one plot for each algorithm" if sides else metric.title
        groups.append(Group(title, single, "" if sides else metric.note, folded=bool(sides)))
    note = "Mismatch: sampler μ against trainer π on the sampled tokens, at the same weights, before any correction."
    return Section("Stability and mismatch", "Figure 3", note, groups)


def _in_fp16(desk: Desk) -> Section:
    cells = [c for c in desk.cells if c.precision == "fp16"]
    plots = []
    if len({c.algorithm for c in cells}) > 1:
        for metric in [*desk.rewards, *desk.evaluations]:
            file = f"figure-4-{metric.slug}"
            plots += plot(desk, metric, cells, metric.title, file, "Figure 4", desk.by_kin, marks=False)
    return Section("All algorithms in FP16", "Figure 4", "", [Group("", plots)])


def _pairs(desk: Desk) -> Section:
    groups = []
    for cells in _odd(desk):
        plots = []
        for metric in [desk.rewards[0], *desk.evaluations, ENDS, KL, SECONDS]:
            file = f"figure-5-{metric.slug}-{slug(_kin(cells[0]))}"
            plots += plot(desk, metric, cells, metric.title, file, "Figure 5")
        groups.append(Group(_kin(cells[0]), plots))
    note = "Training precision/rollout precision where they differ. Crosses: steps at which a run collapsed."
    return Section("Pairs of formats", "Figure 5", note, groups)


def _compared(desk: Desk) -> Section:
    """Everything about the cells whose mismatch is drawn in no other section."""
    drawn = [*duos(desk), *columns(desk).values(), *_odd(desk)]
    shown = {c for cells in drawn for c in cells}
    rest = [c for c in desk.cells if c not in shown]
    plots = []
    for metric in [*desk.rewards, *desk.evaluations, KL, ENDS, NORM, ENTROPY, LENGTH] if rest else []:
        # with one precision for each cell, colour tells the cells apart by whatever else they differ in
        alone = len({c.kin for c in rest}) == 1
        plots += plot(
            desk, metric, rest, metric.title, f"compared-{metric.slug}",
            colour=None if alone else lambda c: ink(rest.index(c)), marks=len(rest) <= 3,
        )  # fmt: skip
    return Section("Other runs" if shown else "Compared", "", "", [Group("", plots)])
