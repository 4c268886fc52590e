"""What a run is watched for: the signals, their thresholds with the source of each, and `[watch]` of a recipe.

    SIGNALS["kl"].levels            Levels(note=2.0, warn=3.0, act=5.0)
    WatchSpec(kl={"warn": 4})       one threshold changed, the others as here

A signal reads one number off a row of metrics.jsonl. What is judged is not that number but a median over the last
`window` steps, so that one step alone can never warn; and, where a model's own level is unknown beforehand, its ratio
to the median of the first `warmup` steps whose number is one. All thresholds are in `SIGNALS` and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from tenbit.keys import one_of

Row = Mapping[str, Any]
Level = Literal["note", "warn", "act"]
LEVELS: tuple[Level, ...] = ("note", "warn", "act")


@dataclass(frozen=True)
class Levels:
    """Thresholds; a value at or above one has reached that level."""

    note: float
    warn: float
    act: float

    def reached(self, value: float) -> int:
        """0 below all of them, 1 at note, 2 at warn, 3 at act."""
        return sum(value >= threshold for threshold in (self.note, self.warn, self.act))

    def of(self, level: int) -> float:
        return (self.note, self.warn, self.act)[level - 1]


@dataclass(frozen=True)
class Signal:
    """One thing to watch. `read` gives a step's number: None says nothing is known, infinity that it is not a number.

    `judged` is how a window of numbers becomes the value that is held against the levels:
    "rise", their median divided by that of the first steps; "fall", the other way round; "rebound", their median
    divided by the lowest that it was, over the first steps or any three windows in a row; "level", their median itself;
    "share", the share of steps that are 1. What is divided by is taken as `floor` at least. One step that reaches
    `spike` by itself is worth a note. `most` is the largest value that there can be.
    """

    title: str
    read: Callable[[Row], float | None]
    judged: Literal["rise", "fall", "rebound", "level", "share"]
    levels: Levels
    spike: float
    remedy: str
    floor: float = 0.0
    most: float = math.inf


def _number(key: str) -> Callable[[Row], float | None]:
    """A metric that every trained step has. A row without it says nothing; null there was NaN or infinity."""

    def read(row: Row) -> float | None:
        if key not in row:
            return None
        value = row[key]
        try:
            return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.inf
        except OverflowError:  # a whole number beyond every double
            return math.inf

    return read


def _gap(row: Row) -> float | None:
    """max |pi - mu| over the step's tokens."""
    low, high = (_number(f"mismatch/prob_diff_{end}")(row) for end in ("min", "max"))
    if low is None or high is None:
        return None
    return max(high, -low) if math.isfinite(low) else math.inf


def _grad_norm(row: Row) -> float | None:
    """Of a skipped step it is null, which is the signal `skipped`; 0 is a step whose rewards taught nothing."""
    value = _number("optim/grad_norm")(row)
    return value if value and math.isfinite(value) else None


def _skipped(row: Row) -> float | None:
    """1 where an update of the step was skipped, by the loss scaler or because its gradients were not finite."""
    if "optim/skipped" not in row and "optim/grad_norm" not in row:
        return None
    return float(bool(row.get("optim/skipped")) or _number("optim/grad_norm")(row) == math.inf)


_LOWER = "start a new run with a lower optim.lr"
_FP16 = "train and sample in FP16 (precision = 'fp16')"

SIGNALS: dict[str, Signal] = {
    "kl": Signal(
        "the mismatch (KL k3 between sampler and trainer)",
        _number("mismatch/kl_k3"),
        "rise",
        # Section 4.2: in every run that collapsed the mismatch grew first. It gives no number, and KL's own level
        # depends on model and length, so the ratio to the first steps counts. In pilot runs of the built-in model that
        # learned well (the demo; a learning rate of 5e-5) it falls and its window's median stayed below 1.5; in those
        # that came apart it reached 2.5 to 5.4, in restless ones 2.5 to 3.9: the ranges overlap. Single steps of 5 to
        # 15 times occur in runs that go on. On other seeds: docs/watch.md, "Measured".
        Levels(note=2.0, warn=3.0, act=5.0),
        25.0,
        f"{_FP16} if this run does not; else {_LOWER}, or use a correction that cuts off what is far apart "
        "(algorithm.name = 'grpo-token-tis', 'grpo-seq-mis')",
        # below this sampler and trainer are one policy to rounding (FP32 on both sides: 1e-10 and less)
        floor=1e-8,
    ),
    "gap": Signal(
        "the largest |pi - mu| of a token",
        _gap,
        "level",
        # Section 4.2: max |pi - mu| was near 1 in runs about to collapse. 1 is the most there can be: a token that
        # the sampler was sure of and the trainer excludes. Note and warn are on the way there.
        Levels(note=0.5, warn=0.8, act=0.95),
        0.95,
        f"{_FP16} if this run does not; look for the cause with `tenbit probe MODEL --attribute`, where MODEL is the "
        f"run's model.path, or its folder once that holds a model/; else {_LOWER}",
        most=1.0,
    ),
    "ess": Signal(
        "the effective sample size",
        _number("mismatch/seq_ess"),
        "fall",
        # By its meaning: a step learns from 1/1.2, 1/2, 1/4 as many responses as at the start, of the sequence weights
        # of Equation 3. In the pilot runs it stayed within 1.1 of the start, collapsed or not.
        Levels(note=1.2, warn=2.0, act=4.0),
        10.0,
        f"{_FP16} if this run does not; else shorten rollout.max_tokens or raise rollout.samples in a new run",
    ),
    "entropy": Signal(
        "the policy's entropy",
        _number("policy/entropy"),
        "rebound",
        # A policy that learns becomes surer, and its entropy falls: that is no alarm. That it rises again is the policy
        # coming apart, and what is lost shows against its lowest, not against the start. In pilot runs that learned
        # well it stayed below 1.2 times its lowest, in restless ones below 1.4; where accuracy fell by 40 points it
        # reached 1.75 to 2.5. docs/watch.md has what these levels then did in runs that they were not chosen on.
        Levels(note=1.3, warn=1.6, act=2.0),
        10.0,
        f"the policy becomes more random instead of surer: {_LOWER}",
        floor=1e-3,
    ),
    "grad_norm": Signal(
        "the gradient norm",
        _grad_norm,
        "rise",
        # Clipping hides its size from the update, not its direction's noise. In pilot runs that learned well the
        # window's median stayed below 1.3, in restless ones below 2.8; single steps reached 9.
        Levels(note=2.0, warn=4.0, act=8.0),
        50.0,
        f"{_LOWER}; more responses in a step (rollout.prompts, rollout.samples) make it steadier too",
        floor=1e-6,
    ),
    "skipped": Signal(
        "steps with a skipped update",
        _skipped,
        "share",
        # Section 3.2 and torch's scaler: the scale is tried upwards once in 2,000 updates, so that a healthy run skips
        # one update in 2,000, after a few at the start while it looks for its scale. After 50 skips in a row a run
        # ends by itself.
        Levels(note=0.2, warn=0.5, act=0.8),
        math.inf,  # one skipped step is the scaler at work
        f"gradients overflow at any loss scale: {_LOWER}; if it stays, the model overflows in FP16: precision = 'bf16'",
        most=1.0,
    ),
}


# what may be done besides, once a checkpoint is kept
GO_BACK = "; a new run may begin with the weights of the kept checkpoint (docs/watch.md says how)"


class LevelsSpec(BaseModel):
    """Thresholds of one signal that a recipe changes; None: as in `SIGNALS`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    note: float | None = Field(None, gt=0)
    warn: float | None = Field(None, gt=0)
    act: float | None = Field(None, gt=0)


_USUAL: Any = Field(default_factory=lambda: LevelsSpec.model_validate({}))


class WatchSpec(BaseModel):
    """Early warning: what is watched, and what happens at an alarm of level act. See docs/watch.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    enabled: bool = True
    act: Literal["snapshot", "pause", "stop", "nothing"] = Field(
        "snapshot", description="at level act: keep the last healthy checkpoint; and end, to go on; and end for good"
    )
    warmup: int = Field(5, ge=1, description="the first steps, which say what is usual")
    window: int = Field(10, ge=3, description="steps whose median is judged, and that must be quiet before it may ring")
    signals: tuple[str, ...] = Field(tuple(SIGNALS), description="those that are watched")
    kl: LevelsSpec = _USUAL
    gap: LevelsSpec = _USUAL
    ess: LevelsSpec = _USUAL
    entropy: LevelsSpec = _USUAL
    grad_norm: LevelsSpec = _USUAL
    skipped: LevelsSpec = _USUAL

    @model_validator(mode="before")
    @classmethod
    def _tables(cls, given: Any) -> Any:
        """The shape of what is written, before its values: a table, with tables and a list in it."""
        if isinstance(given, WatchSpec):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(f"watch = {given!r}: this is a table. To switch early warning on or off set watch.enabled")
        for name in SIGNALS:
            if not isinstance(given.get(name, {}), Mapping | LevelsSpec):
                raise ValueError(
                    f"watch.{name} = {given[name]!r}: this is a table of note, warn and act. Set one of them, such as "
                    f"watch.{name}.warn = {SIGNALS[name].levels.warn:g}"
                )
        names = given.get("signals", ())
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise ValueError(f'watch.signals = {names!r}: this is a list of names, such as ["kl", "gap"]')
        return given

    @field_validator("signals")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one_of("watch.signals", name, SIGNALS) for name in names)

    @model_validator(mode="after")
    def _sees_something(self) -> WatchSpec:
        if self.enabled and not self.signals:
            raise ValueError(
                "watch.signals = [] leaves nothing to watch. Name some, or leave the key out for all of them, or set "
                "watch.enabled = false"
            )
        return self

    @model_validator(mode="after")
    def _ordered(self) -> WatchSpec:
        for name, signal in SIGNALS.items():
            found = self.levels(name)
            if found.act > signal.most:
                raise ValueError(
                    f"watch.{name}: note {found.note:g}, warn {found.warn:g}, act {found.act:g}, but this signal is "
                    f"never above {signal.most:g}. Lower what is; to watch it no more, leave it out of watch.signals"
                )
            if not found.note <= found.warn <= found.act:
                raise ValueError(
                    f"watch.{name}: note {found.note:g}, warn {found.warn:g}, act {found.act:g} must not fall. Change "
                    "the neighbouring thresholds too"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_empty_tables(self, plain: Callable[[WatchSpec], dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in plain(self).items() if value != {}}

    def levels(self, name: str) -> Levels:
        """A signal's thresholds, as changed by the recipe."""
        changed = getattr(self, name).model_dump(exclude_none=True)
        usual = SIGNALS[name].levels
        return Levels(**{level: changed.get(level, getattr(usual, level)) for level in LEVELS})


def alarm_summary(alarms: Sequence[Mapping[str, Any]]) -> str:
    """``2 warn (kl at step 71, gap at 80), 1 note (...)``: the end of a run in one line."""
    parts = []
    for level in reversed(LEVELS):
        those = [a for a in alarms if a["level"] == level]
        if those:
            named = ", ".join(f"{a['signal']} at step {a['step']}" for a in those[:4])
            more = f", and {len(those) - 4} more" if len(those) > 4 else ""
            parts.append(f"{len(those)} {level} ({named}{more})")
    return "; ".join(parts) or "none"
