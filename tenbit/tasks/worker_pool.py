"""A few processes that answer requests and may be killed at any moment: the machinery under `tenbit.tasks.grading`.

`Pool.run` takes requests and returns as many outcomes, in order. An item that outlasts its wall-clock limit costs
its worker's life and no more; a worker that dies takes only its own item along; both are replaced and the rest goes
on. There are no signals in the parent and no threads, so any thread may call it, one at a time.

Workers are plain subprocesses with pipes. They start when there is work, stay for the next call, see Ctrl-C as
little as their parent's death: in a process group of their own, and gone when their standard input ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

WORKER = Path(__file__).with_name("grade_worker.py")
START_LIMIT = 300.0  # seconds; a user's module may import a lot, on a busy machine
_LAST_WORDS = 600  # characters of a dead worker's standard error that are quoted


@dataclass(frozen=True)
class Outcome:
    """What became of a request: the worker's reply, or the way it failed ("timeout", "crash") and a message."""

    reply: dict[str, Any] | None
    failure: str = ""
    message: str = ""


@dataclass(eq=False)
class _Worker:
    """One process. `item` is the index of the request it is at; `ready` is false while it is starting."""

    process: subprocess.Popen[bytes]
    replies: int
    errors: IO[bytes]
    deadline: float
    ready: bool = False
    item: int | None = None
    outbox: bytes = b""
    inbox: bytearray = field(default_factory=bytearray)

    @classmethod
    def start(cls, job: bytes) -> _Worker:
        errors = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - lives as long as the worker; append, so it can be cut
        replies, theirs = os.pipe()
        try:
            # -P: the script's own folder stays off sys.path, where its neighbours would hide other packages.
            process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER), str(theirs)],
                stdin=subprocess.PIPE, stdout=2, stderr=errors, bufsize=0, pass_fds=(theirs,), process_group=0,
            )  # fmt: skip
        except BaseException:
            os.close(replies)
            errors.close()
            raise
        finally:
            os.close(theirs)
        worker = cls(process, replies, errors, time.monotonic() + START_LIMIT)
        os.set_blocking(replies, False)
        os.set_blocking(worker.stdin, False)
        worker.outbox = job
        return worker

    @property
    def stdin(self) -> int:
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    def flush(self) -> None:
        """Writes what the pipe takes. A broken pipe is left for the reading side to notice."""
        try:
            while self.outbox:
                self.outbox = self.outbox[os.write(self.stdin, self.outbox) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.outbox = b""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The complete replies that have come, and whether the worker can still speak."""
        open_ = True
        try:
            while chunk := os.read(self.replies, 1 << 16):
                self.inbox += chunk
            open_ = False
        except BlockingIOError:
            pass
        *lines, rest = bytes(self.inbox).split(b"\n")
        self.inbox = bytearray(rest)
        return [json.loads(line) for line in lines], open_

    def end(self, grace: float) -> str:
        """Kills the process with its children, and says how it ended: its status and its last words.

        `grace` is how long a process that has closed its pipes may take to be seen dead, so that its own status
        is told and not that of the kill.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=grace)
        died = self.process.returncode is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        status = self.process.returncode if died else None
        self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, self.errors.tell() - _LAST_WORDS))
        words = " ".join(self.errors.read().decode(errors="replace").split())
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        os.close(self.replies)
        self.errors.close()
        return how_it_ended(status) + (f"; its last words: {words}" if words else "")


def how_it_ended(status: int | None) -> str:
    if status is None:
        return "it was killed"
    if status >= 0:
        return f"it left with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"it was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


class Pool:
    """At most `workers` processes at one `job` (see `grade_worker`), each item limited to `timeout` seconds."""

    def __init__(self, job: dict[str, Any], workers: int, timeout: float) -> None:
        self._job = json.dumps({**job, "timeout": timeout}).encode() + b"\n"
        self._size, self._timeout = workers, timeout
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._stillborn = 0

    def check(self) -> None:
        """Starts the first worker and waits until it can work. Raises ValueError with its reason if it cannot."""
        with self._lock:
            try:
                while not any(w.ready for w in self._workers):
                    self._staff(1)
                    self._step([])
            except BaseException:
                self._dismiss(self._workers)
                raise

    def run(self, requests: Sequence[dict[str, Any]]) -> list[Outcome]:
        """One outcome per request, in order. Raises ValueError when workers cannot start at all."""
        lines = [json.dumps(request).encode() + b"\n" for request in requests]
        outcomes: list[Outcome | None] = [None] * len(lines)
        waiting = deque(range(len(lines)))
        with self._lock:
            try:
                while waiting or any(w.item is not None for w in self._workers):
                    self._staff(len(waiting))
                    for worker in self._workers:
                        if worker.ready and worker.item is None and waiting:
                            self._give(worker, waiting.popleft(), lines)
                    self._step(outcomes)
            except BaseException:
                # Ctrl-C, say: answers still under way must not be taken for those of the next call.
                self._dismiss([w for w in self._workers if w.item is not None or not w.ready])
                raise
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        with self._lock:
            self._dismiss(self._workers)
            self._selector.close()

    def pids(self) -> list[int]:
        """The processes there are now."""
        return [w.process.pid for w in self._workers]

    def _staff(self, waiting: int) -> None:
        """Lets go of workers that died while idle, and starts as many as the waiting requests can use."""
        self._dismiss([w for w in self._workers if w.ready and w.item is None and w.process.poll() is not None])
        free = sum(w.item is None for w in self._workers)
        for _ in range(min(self._size - len(self._workers), waiting - free)):
            worker = _Worker.start(self._job)
            self._workers.append(worker)
            self._selector.register(worker.replies, selectors.EVENT_READ, worker)
            self._send(worker)

    def _give(self, worker: _Worker, item: int, lines: list[bytes]) -> None:
        if os.fstat(worker.errors.fileno()).st_size > 1 << 20:
            os.ftruncate(worker.errors.fileno(), 0)
        worker.item, worker.outbox = item, lines[item]
        worker.deadline = time.monotonic() + self._timeout
        self._send(worker)

    def _send(self, worker: _Worker) -> None:
        """Writes now what the pipe takes, and the rest when the selector says that it takes more."""
        worker.flush()
        watched = worker.stdin in self._selector.get_map()
        if worker.outbox and not watched:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
        elif watched and not worker.outbox:
            self._selector.unregister(worker.stdin)

    def _step(self, outcomes: list[Outcome | None]) -> None:
        """Waits for something to happen, at most until the next limit, and deals with it."""
        now = time.monotonic()
        limits = [w.deadline for w in self._workers if w.item is not None or not w.ready]
        # Half a second at most: a worker's child may hold its pipes open beyond its death.
        for key, events in self._selector.select(max(0.0, min([*limits, now + 0.5]) - now)):
            worker: _Worker = key.data
            if worker not in self._workers:
                continue  # let go earlier in this round
            if events & selectors.EVENT_WRITE:
                self._send(worker)
            elif not self._hear(worker, outcomes):
                self._bury(worker, "crash", outcomes)
        now = time.monotonic()
        for worker in [w for w in self._workers if w.item is not None or not w.ready]:
            if worker.process.poll() is not None:
                self._hear(worker, outcomes)
                self._bury(worker, "crash", outcomes)
            elif now >= worker.deadline:
                self._bury(worker, "timeout", outcomes)

    def _hear(self, worker: _Worker, outcomes: list[Outcome | None]) -> bool:
        """Takes in the replies that have come; false when there can be no more."""
        replies, open_ = worker.read()
        for reply in replies:
            if "refused" in reply:
                raise ValueError(reply["refused"])
            if "ready" in reply:
                worker.ready, self._stillborn = True, 0
            elif worker.item is not None:
                outcomes[worker.item], worker.item = Outcome(reply), None
        return open_

    def _bury(self, worker: _Worker, failure: str, outcomes: list[Outcome | None]) -> None:
        item, started = worker.item, worker.ready
        how = self._dismiss([worker], grace=1.0 if failure == "crash" else 0.0)
        if not started:
            self._stillborn += 1
            if self._stillborn >= 3:
                raise ValueError(f"grading: three workers in a row could not start; the last: {how}")
        elif item is not None:
            said = how if failure == "crash" else f"no answer within {self._timeout:g} s"
            outcomes[item] = Outcome(None, failure, said)

    def _dismiss(self, workers: list[_Worker], grace: float = 0.0) -> str:
        how = ""
        for worker in list(workers):
            for descriptor in (worker.replies, worker.stdin):
                if descriptor in self._selector.get_map():
                    self._selector.unregister(descriptor)
            self._workers.remove(worker)
            how = worker.end(grace)
        return how
