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
`tenbit watch RUN` judges runs of the past. A `Lookout` is a run's: it also keeps ``alarms.jsonl``, tells the console,
and knows from ``acted.jsonl`` which alarms were acted on, so that an action is neither lost nor repeated.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.text import Text

from tenbit.runlog import cut_back, read_rows, write_atomic
from tenbit.signals import GO_BACK, LEVELS, SIGNALS, Level, Row, WatchSpec

FILE = "alarms.jsonl"
ACTED = "acted.jsonl"  # one line an alarm that was acted on: its step, what was done, the step of the kept checkpoint
WARN, ACT = 2, 3  # levels as numbers; 0 is quiet, 1 a note
LONG = 3  # windows that a lowest is taken over: the lowest of many short ones would be a lucky one
DEGREE: dict[str, int] = {"": 0, "nothing": 0, "snapshot": 1, "pause": 2, "stop": 3}  # each does more than the last
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
        self._calm = self._highest = self._silent = 0
        self.raised = 0
        self.since = 0  # the step at which it was raised from 0
        self.level = 0  # of the window, at the last step that said something

    def see(self, reading: float | None) -> tuple[int, float, float, str] | None:
        """The level to raise, with value, threshold and reason; None if there is nothing new."""
        if reading is None:
            self._hush()
            return None
        self._silent = 0
        if self._usual is None and math.isfinite(reading):
            self._first.append(reading)
            if len(self._first) == self._warmup:
                self._usual = max(statistics.median(self._first), self.signal.floor)
                self._lowest = min(self._lowest, self._usual)
            if self.signal.judged == "share":
                return None  # a loss scaler looks for its scale in the first steps
        self._last.append(reading)
        self._long.append(reading)
        if len(self._last) < self._window:
            return None
        return self._judge(reading)

    def _hush(self) -> None:
        """A signal that says nothing for a whole window is over; if it speaks again, it begins anew."""
        self._silent += 1
        if self._silent == self._window:
            self._last.clear()
            self._long.clear()
            self.raised = self.level = self._calm = self._highest = 0

    def _judge(self, reading: float) -> tuple[int, float, float, str] | None:
        middle = self._middle()
        usual = self._lowest if self.signal.judged == "rebound" else self._usual
        value = self._value(middle, usual)
        if len(self._long) == self._long.maxlen:
            self._lowest = max(min(self._lowest, statistics.median(self._long)), self.signal.floor)
        if value is None:
            return None
        self.level = level = self.levels.reached(value)
        alone, single = False, self._value(reading, usual)
        threshold = self.levels.of(level)
        if level == 0 and single is not None and single >= self._spike:
            alone, level, value, threshold = True, 1, single, self._spike
        if level > self.raised:
            self.raised, self._calm, self._highest = level, 0, 0
            return level, value, threshold, self._reason(reading if alone else middle, usual, value, alone)
        self._settle(level)
        return None

    def _middle(self) -> float:
        """Of the last window; infinity where most are no numbers, which are the highest, or the lowest of a "fall"."""
        if self.signal.judged == "share":
            return statistics.fmean(self._last)
        if self.signal.judged == "fall":
            return statistics.median(0.0 if math.isinf(reading) else reading for reading in self._last) or math.inf
        return statistics.median(self._last)

    def _settle(self, level: int) -> None:
        """After a whole window below what was raised, what is raised is the highest level of that window."""
        if level == self.raised:
            self._calm = self._highest = 0
            return
        self._calm, self._highest = self._calm + 1, max(self._highest, level)
        if self._calm == self._window:
            self.raised, self._calm, self._highest = self._highest, 0, 0

    def _value(self, number: float, usual: float | None) -> float | None:
        """What is held against the levels; infinity for what is no number, None if nothing is known to compare with."""
        if not math.isfinite(number):
            return math.inf
        if self.signal.judged in ("level", "share"):
            return number
        if usual is None or not math.isfinite(usual):
            return None
        above, below = (usual, number) if self.signal.judged == "fall" else (number, usual)
        return above / below if below else (math.inf if above else 1.0)

    def _reason(self, number: float, usual: float | None, value: float, alone: bool) -> str:
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
        return f"{title} is {value:.3g} {how}: {number:.3g}, was {usual:.3g} ({over})"


class Watch:
    """Sees a run's rows one by one, in order."""

    def __init__(self, spec: WatchSpec) -> None:
        self._action, self._window = spec.act, spec.window
        self._tracks = [_Track(name, spec) for name in SIGNALS if name in spec.signals] if spec.enabled else []
        self.healthy = self._step = 0
        self.trouble: int | None = None  # the step since which some signal is raised to act, if one is

    def see(self, row: Row) -> list[Alarm]:
        """The alarms that this step raises."""
        step, alarms = int(row["step"]), []
        self._step = step
        for track in self._tracks:
            first, before = all(other.raised < ACT for other in self._tracks), track.raised
            found = track.see(track.signal.read(row))
            if track.raised and not before:
                track.since = step
            if found is not None:
                level, value, threshold, reason = found
                known = value if math.isfinite(value) else None
                action = self._action if level == ACT and first else ""
                remedy = track.signal.remedy + (GO_BACK if level == ACT and self._action != "nothing" else "")
                alarms.append(Alarm(step, LEVELS[level - 1], track.name, known, threshold, reason, remedy, action))
        if all(track.level < WARN for track in self._tracks):
            self.healthy = step
        acting = any(track.raised == ACT for track in self._tracks)
        self.trouble = (self.trouble or step) if acting else None
        return alarms

    def recall(self, told: Sequence[Row], acted: Sequence[Row]) -> Alarm | None:
        """After a replay: takes as raised only what the run was `told` of, by alarms.jsonl, so that the rest is raised
        at the next step if it is still so. The same for an action that goes further than what was done.

        Returns an alarm that was told, but whose action was never carried out: by a run that was killed first. Rules
        may have changed, and then see the same trouble some steps earlier or later: an alarm of up to a window before
        it began is taken for one of it, and so is one of the last window where it has not begun yet.
        """
        trouble = self.trouble
        for track in self._tracks:
            own = [(row["step"], LEVELS.index(row["level"]) + 1) for row in told if row.get("signal") == track.name]
            known = max((level for step, level in own if step >= track.since - self._window), default=0)
            fresh = [(step, level) for step, level in own if step > self._step - self._window]
            track.raised = max(min(track.raised, known), *(level for _, level in fresh), 0)
            if trouble is None:
                trouble = min((step for step, level in fresh if level == ACT), default=None)
        if trouble is None or not DEGREE[self._action]:
            return None
        done = [row for row in acted if row["step"] >= trouble - self._window]
        last = max((row["step"] for row in done), default=trouble - self._window - 1)
        due = [row for row in told if row["step"] > last and DEGREE.get(row.get("action", ""), 0)]
        if due:
            return replace(Alarm(**{name: due[-1].get(name, "") for name in Alarm.__match_args__}), action=self._action)
        if DEGREE[self._action] > max((DEGREE.get(row["action"], 0) for row in done), default=0):
            for track in self._tracks:
                track.raised = min(track.raised, WARN)
        return None


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


def cut_alarms(folder: Path, step: int) -> None:
    """Takes a run's alarms back to those up to a step, with what was done about them."""
    for name in (FILE, ACTED):
        cut_back(folder / name, step or -1)


@dataclass
class Lookout:
    """A run's watch on rank 0, with its files and the console. `owed` is an alarm that is still to be acted on."""

    watch: Watch
    folder: Path
    console: Console
    owed: Alarm | None = None

    @classmethod
    def open(cls, spec: WatchSpec, folder: Path, resumed: bool, console: Console) -> Self:
        """A new run's, or that of a resumed one, whose metrics and alarms are cut back already."""
        watch, owed = Watch(spec), None
        if resumed:
            metrics, acted = folder / "metrics.jsonl", folder / ACTED
            for row in read_rows(metrics) if metrics.exists() else []:
                watch.see(row)
            owed = watch.recall(read_alarms(folder), read_rows(acted) if acted.exists() else [])
        if not (folder / FILE).exists():
            write_atomic(folder / FILE, b"")  # empty: watched, and nothing found
        return cls(watch, folder, console, owed)

    def see(self, row: Row) -> list[Alarm]:
        """Judges a row that is written; what it raises is on disk and on the screen before this returns."""
        alarms = self.watch.see(row)
        if alarms:
            _append(self.folder / FILE, [alarm.tree() for alarm in alarms])
        for alarm in alarms:
            for line in alarm_lines(alarm):
                self.console.print(line, soft_wrap=True)
        return alarms

    def acted(self, alarm: Alarm, action: str, kept: int) -> None:
        """Puts down that an alarm is acted on; `kept` is the step of the checkpoint."""
        _append(self.folder / ACTED, [{"step": alarm.step, "signal": alarm.signal, "action": action, "kept": kept}])


def _append(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    before = file.read_bytes() if file.exists() else b""
    write_atomic(file, before + b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows))


def read_alarms(folder: Path) -> list[dict[str, Any]]:
    """A run folder's alarms, oldest first."""
    file = folder / FILE
    return read_rows(file) if file.exists() else []
