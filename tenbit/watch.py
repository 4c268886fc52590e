"""Early warning: trends in a run's metrics that came before collapse, judged step by step.

    watch = Watch(recipe.watch)
    for row in rows:                    # of metrics.jsonl, live or recorded
        for alarm in watch.see(row): print(alarm.level, alarm.reason, alarm.remedy)
    watch.healthy                       # the last step at which nothing warned

`signals.py` says what is watched and from which value on. An alarm is raised when a signal reaches a level, not at
every step it stays there; that level may ring again only after the signal was below it for `window` steps in a row. A
step far off by itself is a note, never more. One trouble shows in several signals, so that an alarm acts only if no
other signal is at level act already.

A `Watch` knows rows alone, so the same rows give the same alarms: a resumed run replays its own, and
`tenbit watch RUN` judges runs of the past. A `Lookout` is a run's: it also keeps ``alarms.jsonl`` and tells the
console.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.text import Text

from tenbit.runlog import cut_back, read_rows, write_atomic
from tenbit.signals import LEVELS, SIGNALS, Level, Row, WatchSpec

FILE = "alarms.jsonl"
WARN, ACT = 2, 3  # levels as numbers; 0 is quiet, 1 a note
LONG = 3  # windows that a lowest is taken over: the lowest of many short ones would be a lucky one
STYLE = {"note": "dim", "warn": "yellow", "act": "bold red"}


@dataclass(frozen=True)
class Alarm:
    """`value` is what was held against `threshold`; None where it was not a number. `action` is what the run does."""

    step: int
    level: Level
    signal: str
    value: float | None
    threshold: float
    reason: str
    remedy: str
    action: str = ""

    def tree(self) -> dict[str, Any]:
        return asdict(self)


class _Track:
    """One signal's past: the first steps, the last window, and the level it was last raised to."""

    def __init__(self, name: str, spec: WatchSpec) -> None:
        self.name, self.signal, self.levels = name, SIGNALS[name], spec.levels(name)
        self._warmup, self._window = spec.warmup, spec.window
        self._spike = max(self.signal.spike, self.levels.note)
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=spec.window)
        self._usual: float | None = None
        self._long: deque[float] = deque(maxlen=LONG * spec.window)
        self._lowest = math.inf  # of the first steps and all long windows, for "rebound"
        self._calm = self._highest = 0
        self.raised = 0
        self.level = 0  # of the window, at the last step that said something

    def see(self, reading: float) -> tuple[int, float, float, str] | None:
        """The level to raise, with value, threshold and reason; None if there is nothing new."""
        if len(self._first) < self._warmup:
            self._first.append(reading)
            if len(self._first) == self._warmup:
                usual = statistics.median(self._first)
                self._usual = max(usual if math.isfinite(usual) else 0.0, self.signal.floor)
                self._lowest = self._usual
            if self.signal.judged == "share":
                return None  # a loss scaler looks for its scale in the first steps
        self._last.append(reading)
        self._long.append(reading)
        if len(self._last) < self._window or self._usual is None:
            return None
        middle = (statistics.fmean if self.signal.judged == "share" else statistics.median)(self._last)
        value = self._value(middle)
        if len(self._long) == self._long.maxlen:
            self._lowest = max(min(self._lowest, statistics.median(self._long)), self.signal.floor)
        self.level = level = self.levels.reached(value)
        alone = level == 0 and self._value(reading) >= self._spike
        threshold = self._spike if alone else self.levels.of(level)
        if alone:
            value, level = self._value(reading), 1
        if level > self.raised:
            self.raised, self._calm, self._highest = level, 0, 0
            return level, value, threshold, self._reason(reading if alone else middle, value, alone)
        self._settle(level)
        return None

    def _settle(self, level: int) -> None:
        """After a whole window below what was raised, what is raised is the highest level of that window."""
        if level == self.raised:
            self._calm = self._highest = 0
            return
        self._calm, self._highest = self._calm + 1, max(self._highest, level)
        if self._calm == self._window:
            self.raised, self._calm, self._highest = self._highest, 0, 0

    def _value(self, number: float) -> float:
        usual = (self._lowest if self.signal.judged == "rebound" else self._usual) or 0.0
        if self.signal.judged in ("rise", "rebound"):
            return number / usual if usual else (math.inf if number else 1.0)
        if self.signal.judged == "fall":
            return usual / number if number else (math.inf if usual else 1.0)
        return number

    def _reason(self, number: float, value: float, alone: bool) -> str:
        title = self.signal.title
        over = "this step alone" if alone else f"median of {self._window} steps"
        if self.signal.judged == "share":
            return f"{title}: {value:.0%} of the last {self._window}"
        if not math.isfinite(value):
            return f"{title} is not a number ({over})"
        if self.signal.judged == "level":
            return f"{title} is {value:.3g} ({over}); 1 is the most there can be"
        how = {
            "rise": "times what it was in the first steps",
            "rebound": "times its lowest so far",
            "fall": "times smaller than it was in the first steps",
        }[self.signal.judged]
        before = self._lowest if self.signal.judged == "rebound" else self._usual
        return f"{title} is {value:.3g} {how}: {number:.3g}, was {before:.3g} ({over})"


class Watch:
    """Sees a run's rows one by one, in order."""

    def __init__(self, spec: WatchSpec) -> None:
        self._action = spec.act
        self._tracks = [_Track(name, spec) for name in SIGNALS if name in spec.signals] if spec.enabled else []
        self.healthy = 0

    def see(self, row: Row) -> list[Alarm]:
        """The alarms that this step raises."""
        step, alarms = int(row["step"]), []
        for track in self._tracks:
            reading = track.signal.read(row)
            first = all(other.raised < ACT for other in self._tracks)
            found = None if reading is None else track.see(reading)
            if found is not None:
                level, value, threshold, reason = found
                known = value if math.isfinite(value) else None
                action = self._action if level == ACT and first else ""
                remedy = track.signal.remedy
                alarms.append(Alarm(step, LEVELS[level - 1], track.name, known, threshold, reason, remedy, action))
        if all(track.level < WARN for track in self._tracks):
            self.healthy = step
        return alarms


def replay(rows: Iterable[Row], spec: WatchSpec) -> list[Alarm]:
    """The alarms of a recorded run."""
    watch = Watch(spec)
    return [alarm for row in rows for alarm in watch.see(row)]


def first_steps(alarms: Sequence[Alarm | Mapping[str, Any]]) -> dict[str, int]:
    """The step of the first alarm of each level, or of a higher one."""
    trees = [alarm.tree() if isinstance(alarm, Alarm) else alarm for alarm in alarms]
    out = {}
    for i, level in enumerate(LEVELS):
        steps = [int(tree["step"]) for tree in trees if tree["level"] in LEVELS[i:]]
        if steps:
            out[str(level)] = min(steps)
    return out


def alarm_lines(alarm: Alarm) -> list[Text]:
    """An alarm in words: what, and from warn on what to do."""
    head = Text.assemble(f"{'':6}  ", (f"{alarm.level:<5}", STYLE[alarm.level]), f"step {alarm.step}: {alarm.reason}")
    if alarm.level == "note":
        return [head]
    return [head, Text(f"{'':13}remedy: {alarm.remedy}", style="dim")]


@dataclass
class Lookout:
    """A run's watch on rank 0, with its file and the console."""

    watch: Watch
    folder: Path
    console: Console

    @classmethod
    def open(cls, spec: WatchSpec, folder: Path, resume_step: int | None, console: Console) -> Self:
        """A new run's, or that of a run resumed after `resume_step`, whose metrics are cut back already."""
        watch = Watch(spec)
        if resume_step is not None:
            cut_back(folder / FILE, resume_step or -1)
            metrics = folder / "metrics.jsonl"
            for row in read_rows(metrics) if metrics.exists() else []:
                watch.see(row)  # what this raises was raised before
        return cls(watch, folder, console)

    def see(self, row: Row) -> list[Alarm]:
        """Judges a row that is written; what it raises is on disk and on the screen before this returns."""
        alarms = self.watch.see(row)
        if alarms:
            file = self.folder / FILE
            kept = file.read_bytes() if file.exists() else b""
            more = (json.dumps(alarm.tree(), allow_nan=False).encode() + b"\n" for alarm in alarms)
            write_atomic(file, kept + b"".join(more))
        for alarm in alarms:
            for line in alarm_lines(alarm):
                self.console.print(line, soft_wrap=True)
        return alarms


def read_alarms(folder: Path) -> list[dict[str, Any]]:
    """A run folder's alarms, oldest first."""
    file = folder / FILE
    return read_rows(file) if file.exists() else []
