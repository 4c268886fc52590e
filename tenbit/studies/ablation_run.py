"""Runs, several side by side, each a process of its own: started, watched, stopped and said what became of them.

    failed = run_jobs([Job("grpo-fp16-seed0", recipe, folder, steps=100)], logs, jobs=2, console)

How many at a time: on GPUs one on each (or on each `ranks` of them, under torchrun), otherwise as many as there are
cores and memory for, the cores divided among them. (A small model gains more from a second run beside it than from a
second thread.) Ctrl-C is passed on: every run finishes its step and saves. A run also does so when this process is
killed, by the kernel's parent-death signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tenbit.watch import read_alarms

GIB_A_RUN = 3.5  # of the built-in model: 1.2 with the built-in engine, 3.3 with vLLM
LOOK = 0.5  # seconds between looks at the processes
PR_SET_PDEATHSIG = 1
PAUSED = 130  # the exit status of `tenbit train` when it can go on


@dataclass(frozen=True)
class Job:
    """`recipe` is run in `folder`, for `steps`, by so many ranks."""

    name: str
    recipe: Path
    folder: Path
    steps: int
    ranks: int = 1

    @property
    def command(self) -> list[str]:
        """Without torchrun for one rank: nothing has to be agreed on then."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        train = ["-m", "tenbit", "train", str(self.recipe), "--out", str(self.folder), "--resume"]
        return [sys.executable, *(launcher if self.ranks > 1 else []), *train]

    @property
    def finished(self) -> bool:
        """Whether its steps are done, or an alarm has ended it (`watch.act = "stop"`) and nothing was changed."""
        summary = self._summary()
        if "stopped" in summary:
            return (self.folder / "recipe.toml").read_bytes() == self.recipe.read_bytes()
        return summary.get("steps") == self.steps

    @property
    def steps_done(self) -> int:
        """Of a run that has ended; 0 of one that has not."""
        return int(self._summary().get("steps", 0))

    @property
    def busy(self) -> bool:
        """Whether another process still runs in the folder: one whose ablation was killed finishes its step."""
        try:
            with (self.folder / ".lock").open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _summary(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def last_row(self) -> dict[str, Any]:
        """The newest whole row of ``metrics.jsonl``, without reading the file."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
                lines = file.read().splitlines()
        except OSError:
            return {}
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if "train/accuracy" in row:
                    return row
        return {}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(wanted: int | None, jobs: int, ranks: int = 1) -> int:
    """How many runs at a time. Raises ValueError for numbers that are none, or more ranks than there are GPUs."""
    if wanted is not None and wanted < 1:
        raise ValueError(f"--jobs {wanted}: write a positive number of runs at a time")
    if ranks < 1:
        raise ValueError(f"--ranks {ranks}: write a positive number of processes for each run")
    gpus = len(_gpus())
    if ranks > (gpus or cores()):
        raise ValueError(f"--ranks {ranks}: each takes a {'GPU' if gpus else 'core'}, and there are {gpus or cores()}")
    if gpus and wanted is not None and ranks > 1 and wanted * ranks > gpus:
        raise ValueError(f"--jobs {wanted} of --ranks {ranks}: there are {gpus} GPUs. Lower one of them")
    if wanted is None:
        room = gpus // ranks if gpus else min(cores() // ranks, int(_free_gib() / GIB_A_RUN / ranks))
        wanted = max(1, room)
    return max(1, min(wanted, jobs))


def _gpus() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    return visible or [str(i) for i in range(torch.cuda.device_count())]


def _free_gib() -> float:
    """Memory that may be had: what is free, and on Linux also what only caches files."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) / 2**20
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    slot: int
    log: Path


def run_jobs(jobs: Sequence[Job], logs: Path, at_once: int | None, console: Console) -> dict[str, str]:
    """Runs the jobs that are not finished, in order, and returns why those that failed did, by name.

    Raises KeyboardInterrupt after Ctrl-C, when the runs have saved; a second Ctrl-C kills them.
    """
    waiting = [job for job in jobs if not job.finished]
    width = side_by_side(at_once, len(waiting) or 1, jobs[0].ranks if jobs else 1)
    slots = list(range(width))
    done = len(jobs) - len(waiting)
    how = f"{len(jobs)} {'run' if len(jobs) == 1 else 'runs'}, {done} finished; {width} at a time"
    console.print(Text(how), soft_wrap=True)
    if held := [job.name for job in waiting if job.busy]:
        console.print(f"waiting for a process that still saves: {', '.join(held)}", soft_wrap=True)
    logs.mkdir(parents=True, exist_ok=True)
    running: list[_Running] = []
    failed: dict[str, str] = {}
    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            while waiting or running:
                while slots and (free := next((job for job in waiting if not job.busy), None)):
                    waiting.remove(free)
                    running.append(_start(free, slots.pop(0), logs, width))
                    if not console.is_terminal:
                        console.print(f"started   {free.name}", soft_wrap=True)
                time.sleep(LOOK)
                for run in [r for r in running if r.process.poll() is not None]:
                    running.remove(run)
                    slots.append(run.slot)
                    _tell(run, failed, console)
                if console.is_terminal:
                    live.update(_table(jobs, running, failed), refresh=True)
        except KeyboardInterrupt:
            console.print("stopping: every run finishes its step and saves; Ctrl-C again kills them", soft_wrap=True)
            _stop(running)
            raise
    return failed


def _start(job: Job, slot: int, logs: Path, at_once: int) -> _Running:
    log = logs / f"{job.name}.txt"
    environment = _environment(slot, at_once, job.ranks)
    with log.open("ab") as file:
        process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
    return _Running(job, process, slot, log)


def _environment(slot: int, at_once: int, ranks: int) -> Mapping[str, str]:
    """GPUs of its own, or a share of the cores."""
    own = dict(os.environ)
    gpus = _gpus()
    if gpus:
        first = slot * ranks % len(gpus)
        own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + ranks])
    own.setdefault("OMP_NUM_THREADS", str(max(1, cores() // (at_once * ranks))))
    return own


def _die_with_parent() -> None:
    """In the child, before it becomes the run: Ctrl-C for it when its parent is gone."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def _stop(running: Sequence[_Running]) -> None:
    for run in running:
        with contextlib.suppress(ProcessLookupError):
            run.process.send_signal(signal.SIGINT)
    try:
        for run in running:
            run.process.wait()
    except KeyboardInterrupt:
        for run in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


def _tell(run: _Running, failed: dict[str, str], console: Console) -> None:
    """What became of a run, in a line."""
    job, status = run.job, run.process.returncode
    if status != 0 and not job.finished:
        failed[job.name] = _why(run)
        console.print(Text.assemble((f"failed    {job.name}", "bold red"), f"  {failed[job.name]}"), soft_wrap=True)
        return
    row = job.last_row()
    accuracy = f"{row['train/accuracy']:.1%} at step {row['step']}" if row else "no step"
    console.print(Text(f"finished  {job.name}  {accuracy}"), soft_wrap=True)


def _why(run: _Running) -> str:
    status = run.process.returncode
    if status == PAUSED and (alarms := read_alarms(run.job.folder)):
        return f"paused by an alarm at step {alarms[-1]['step']}: {alarms[-1]['reason']}. The same command goes on"
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    lines = [line for line in run.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{how}; {run.log} ends with: {lines[-1].strip()}" if lines else f"{how}; it printed nothing"


def _table(jobs: Sequence[Job], running: Sequence[_Running], failed: Mapping[str, str]) -> Table:
    """The runs that go on, and how many there are of the others."""
    finished = sum(job.finished for job in jobs)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    table.title = f"{finished} of {len(jobs)} finished" + (f", {len(failed)} failed" if failed else "")
    table.title_justify = "left"
    for head in ("running", "step", "of", "accuracy", "KL k3", "s/step"):
        table.add_column(head, justify="left" if head == "running" else "right")
    for run in running:
        row = run.job.last_row()
        shown = [f"{row.get('train/accuracy', 0):.1%}", f"{row.get('mismatch/kl_k3') or 0:.1e}"] if row else ["–", "–"]
        seconds = f"{row['time/step']:.1f}" if row.get("time/step") else "–"
        table.add_row(run.job.name, str(row.get("step", 0)), str(run.job.steps), *shown, seconds)
    return table
