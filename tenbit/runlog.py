"""What a run leaves behind and what it shows while it goes: `metrics.jsonl`, samples, trackers, the console.

    with RunLog(folder, total_steps=120) as log:
        log.show_plan(precision, seen)
        for step in range(1, 121):
            log.log(step, {"train/reward": 0.5, ...})
            log.samples(step, rollouts)
    show_summary(folder)

`metrics.jsonl` is the truth: one strict JSON object a step, on disk before `log` returns, floats written so that
they read back bit for bit. Trackers and the console only mirror it. On `resume_step` both files are cut back to
the rows up to that step, so that a resumed run's files equal those of a run that was never interrupted.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenbit.console import default_console, eval_lines, header, plan_table, progress_bar, step_line
from tenbit.precision import Precision
from tenbit.signals import alarm_summary
from tenbit.trackers import TensorBoard, Tracker
from tenbit.types import Rollout

Metrics = Mapping[str, float | int | None]
Row = dict[str, Any]

SAMPLES_PER_STEP = 4
HEADER_EVERY = 25


# --- files -----------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON-lines file, maybe compressed (.gz), that a run may still be writing, or was killed writing.

    A torn last line is dropped. Raises ValueError, naming file and line, for damage anywhere else.
    """
    return [row for _, row in _lines(path)]


def rows_file(folder: Path, name: str) -> Path | None:
    """The file of a run folder that holds these rows, compressed or not; the plain one is the newer where both are."""
    files = (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz")
    return next((file for file in files if file.is_file()), None)


def cut_back(path: Path, step: int) -> None:
    """Removes, atomically, the rows after `step` and a torn last line. The rows that stay keep their bytes."""
    if not path.exists():
        return
    kept = b"".join(raw + b"\n" for raw, row in _lines(path) if row["step"] <= step)
    if kept != path.read_bytes():
        write_atomic(path, kept)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces a file so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def _lines(path: Path) -> list[tuple[bytes, Row]]:
    raws = _bytes(path).split(b"\n")
    while raws and not raws[-1].strip():
        raws.pop()
    out: list[tuple[bytes, Row]] = []
    for number, raw in enumerate(raws, 1):
        try:
            row = json.loads(raw, parse_constant=lambda _: None)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("a row is an object with a whole number 'step'")
        except ValueError as error:
            if number == len(raws):  # torn by a kill, or being written at this moment
                break
            raise ValueError(
                f"{path}:{number}: not a row of a run ({error}). Remove the line, or restore the file."
            ) from None
        out.append((raw, row))
    return out


def _bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be unpacked ({error}). Restore the file.") from None


def _append(file: IO[bytes], rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows and waits until the disk has them."""
    # ASCII with escapes: a lone surrogate in somebody's data set must not stop a run.
    file.write(b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows))
    file.flush()
    os.fsync(file.fileno())


def _plain(value: Any) -> float | int | None:
    """A number as strict JSON can hold it."""
    if value is None:
        return None
    if isinstance(value, int):
        return int(value)  # also of a bool
    number = float(value)
    # JSON has no NaN or infinity, and most readers refuse Python's spelling of them. null is a gap in a curve, which
    # is what an undefined quantity is: the gradient norm of a skipped step, a mean over no sequences.
    return number if math.isfinite(number) else None


# --- the run log -----------------------------------------------------------------------------------------------


class Log(Protocol):
    """What the loop tells of a run. A context manager."""

    console: Console

    def show_plan(self, precision: Precision, seen: Mapping[str, int]) -> None: ...

    def phase(self, name: str) -> None: ...

    def log(self, step: int, metrics: Metrics) -> None: ...

    def samples(self, step: int, rollouts: Sequence[Rollout], count: int = SAMPLES_PER_STEP) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NoLog:
    """The log of ranks other than the first, which keep none."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def show_plan(self, precision: Precision, seen: Mapping[str, int]) -> None: ...

    def phase(self, name: str) -> None: ...

    def log(self, step: int, metrics: Metrics) -> None: ...

    def samples(self, step: int, rollouts: Sequence[Rollout], count: int = SAMPLES_PER_STEP) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class RunLog:
    """Keeps a run folder's metrics, samples and trackers, and tells the console. A context manager.

    `resume_step` is the step of the checkpoint that the run goes on from; 0 says that none was saved, so the run
    starts over and no row is kept. None starts a new run and raises ValueError if the folder already holds one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        resume_step: int | None = None,
        console: Console | None = None,
        trackers: Sequence[Callable[[Path, int | None], Tracker]] = (TensorBoard,),
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.console = console or default_console()
        self.total_steps = total_steps
        self.resume_step = resume_step
        self._last = -1
        self._printed = 0
        metrics, samples = self.folder / "metrics.jsonl", self.folder / "samples.jsonl"
        if resume_step is None:
            if metrics.exists() and metrics.stat().st_size:
                raise ValueError(f"{self.folder} already holds a run. Add --resume to go on, or choose another --out.")
        else:
            keep = resume_step or -1
            cut_back(metrics, keep)
            cut_back(samples, keep)
            rows = read_rows(metrics) if metrics.exists() else []
            self._last = rows[-1]["step"] if rows else -1
            if resume_step > 0 and self._last < resume_step:
                raise ValueError(
                    f"{metrics} ends at step {max(self._last, 0)}, but the checkpoint is of step {resume_step}: "
                    "rows were lost. Restore the file, or remove the later checkpoints."
                )
        self._trackers = {t.__name__: t(self.folder, resume_step) for t in trackers}
        self._metrics = metrics.open("ab")
        self._samples = samples.open("ab")
        self._progress = progress_bar(self.console)
        self._task = self._progress.add_task("starting", total=total_steps, completed=resume_step or 0)

    def __enter__(self) -> Self:
        how = f"resumes after step {self.resume_step} of {self.total_steps}" if self.resume_step else ""
        head = Text.assemble(("tenbit", "bold"), "  ", str(self.folder), "  ", how or f"{self.total_steps} steps")
        self.console.print(head, soft_wrap=True)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        for name in list(self._trackers):
            self._tracked(name, lambda tracker: tracker.close())
        self._metrics.close()
        self._samples.close()

    def show_plan(self, precision: Precision, seen: Mapping[str, int]) -> None:
        """Prints the precision plan, with the number of live tensors that were held against each part, and
        stores it as precision.json."""
        rows = [list(row) for row in precision.rows()]
        write_atomic(self.folder / "precision.json", json.dumps(rows, indent=1).encode() + b"\n")
        self.console.print(Text(f"precision plan {precision.name}", style="bold"))
        self.console.print(plan_table(precision, seen))
        self.console.print()

    def phase(self, name: str) -> None:
        """What the run is doing now, for the progress bar: ``sampling``, ``update``."""
        self._progress.update(self._task, description=name)

    def log(self, step: int, metrics: Metrics) -> None:
        """Appends one row and mirrors it. A tracker that fails is dropped with a message; a disk that fails raises."""
        assert step > self._last, f"one row a step, in order: {step} after {self._last}"
        self._last = step
        row: Row = {"step": step} | {name: _plain(value) for name, value in metrics.items()}
        _append(self._metrics, [row])
        known = {name: value for name, value in row.items() if name != "step" and value is not None}
        for name in list(self._trackers):
            if self._tracked(name, lambda tracker: tracker.log(step, known)):
                continue
            del self._trackers[name]
        self._show(row)
        self._progress.update(self._task, completed=step)

    def samples(self, step: int, rollouts: Sequence[Rollout], count: int = SAMPLES_PER_STEP) -> None:
        """Appends a few of a step's rollouts, right and wrong ones."""
        _append(self._samples, [_sample(step, rollout) for rollout in pick(rollouts, count)])

    def _show(self, row: Row) -> None:
        lines = eval_lines(row)
        line = step_line(row)
        if line is not None:
            if self._printed % HEADER_EVERY == 0:
                self.console.print(header(), soft_wrap=True)
            self._printed += 1
            lines.insert(0, line)
        for text in lines:
            self.console.print(text, soft_wrap=True)

    def _tracked(self, name: str, act: Callable[[Tracker], None]) -> bool:
        """Does something with a tracker; says so when it fails. A mirror is not worth a run's loss."""
        try:
            act(self._trackers[name])
        except Exception as error:
            why = f"{name} failed after step {self._last}: {error}. The run goes on; metrics.jsonl is complete."
            self.console.print(Text(why, style="bold red"), soft_wrap=True)
            return False
        return True


def pick(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """The first right and the first wrong ones, half of each where there are, in their order.

    No chance in it: a resumed run must write the same samples.
    """
    right = [i for i, r in enumerate(rollouts) if r.correct]
    wrong = [i for i, r in enumerate(rollouts) if not r.correct]
    from_right = min(len(right), max(count // 2, count - len(wrong)))
    chosen = right[:from_right] + wrong[: count - from_right]
    return [rollouts[i] for i in sorted(chosen)]


def _sample(step: int, rollout: Rollout) -> Row:
    return {
        "step": step,
        "problem": rollout.problem.id,
        "prompt": rollout.problem.prompt,
        "response": rollout.text,
        "reward": _plain(rollout.reward),
        "correct": rollout.correct,
        "length": rollout.completion.length,
        "finish": rollout.completion.finish,
        "version": rollout.completion.version,
    }


# --- the end of a run ------------------------------------------------------------------------------------------


def span(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Row, Row] | None:
    """The first and the last row that have a value for `key`."""
    having = [dict(row) for row in rows if row.get(key) is not None]
    return (having[0], having[-1]) if having else None


def read_mismatch(folder: Path) -> list[Row]:
    """The comparison of formats on the same weights, if the run has made one."""
    path = folder / "mismatch.json"
    if not path.exists():
        return []
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}). Remove the file, or restore it.") from None
    return [row for row in table if isinstance(row, dict) and "precision" in row]


def mismatch_ratio(table: Sequence[Mapping[str, Any]], key: str = "kl_k3") -> float | None:
    """How many times larger BF16's mismatch is than FP16's; None where it cannot be said."""
    by_format = {row["precision"]: row.get(key) for row in table}
    low, high = by_format.get("fp16"), by_format.get("bf16")
    return high / low if low and high else None


def show_summary(folder: Path, console: Console | None = None) -> None:
    """Accuracy at both ends, the mismatch of FP16 beside BF16, and last the run folder and the report."""
    shown = console or default_console()
    rows = read_rows(folder / "metrics.jsonl")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    evals = sorted({key for row in rows for key in row if key.startswith("eval/") and "/avg@" in key})
    for key in ["train/accuracy", *evals]:
        ends = span(rows, key)
        if ends is not None:
            name = "training" if key == "train/accuracy" else key.removeprefix("eval/").replace("/", " ")
            first, last = ends
            change = Text.assemble(f"{first[key]:.1%} → ", (f"{last[key]:.1%}", "bold"), f"  {name}, steps ")
            change.append(f"{first['step']} → {last['step']}", style="dim")
            table.add_row("accuracy" if key == "train/accuracy" else "", change)
    skipped = sum(1 for row in rows if row.get("optim/skipped"))
    if skipped:
        table.add_row("skipped", f"an update in {skipped} of {rows[-1]['step']} steps, by the loss scaler")
    alarms = folder / "alarms.jsonl"
    if alarms.exists():
        table.add_row("alarms", alarm_summary(read_rows(alarms)))
    formats = read_mismatch(folder)
    if formats:
        ratio = mismatch_ratio(formats)
        found = "  ".join(f"{row['precision']} {row['kl_k3']:.2e}" for row in formats)
        more = f"  ({ratio:.3g} times)" if ratio else ""
        table.add_row("mismatch", Text.assemble(found, (more, "bold"), ("  KL k3, same weights", "dim")))
    shown.print()
    shown.print(table)
    shown.print(Text.assemble(("run folder  ", "dim"), str(folder)), soft_wrap=True)
    report = folder / "report.html"
    if report.exists():
        shown.print(Text.assemble(("report      ", "dim"), str(report)), soft_wrap=True)
