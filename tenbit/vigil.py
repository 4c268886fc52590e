"""Who watches that all ranks of a run are alive, and says of a run that failed what failed first.

    with vigil.kept():                                  in every process that a launcher started
        ...
        if vigil.failed_first("out of memory"): print   one rank prints the cause; the others end quietly

A rank that is killed says nothing, and the others would wait for it in a collective operation, on some networks for
ever. So every process has a thread that gives a sign of life to the launcher's key-value store once a second; rank 0
watches all of them, everyone watches rank 0 and the processes of its own machine. When one is gone, or has failed,
the first to notice says so, and the rest have a few seconds to end by themselves before they are ended.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tenbit import world

BEAT = 1.0  # seconds between signs of life
SILENT = 20.0  # of a rank on another machine, until it counts as gone
GRACE = 10.0  # for a process to end by itself once the run has failed
NETWORK = ("connection", "gloo", "nccl", "socket", "broken pipe", "timed out")  # what errors of lost peers speak of
_watch: Watch | None = None


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keeps watch for as long as the context lasts, and after an error until the process ends."""
    global _watch
    if not world.launched() or _watch is not None:
        yield
        return
    _watch = Watch()
    yield
    _watch.leave()
    _watch = None


def failed_first(cause: str) -> bool:
    """Whether this rank is the first of the run to fail; it says why. True where nobody else is watching."""
    return _watch is None or _watch.claim(cause)


def alone() -> bool:
    """Whether this process has no other ranks to think of."""
    return _watch is None or _watch.size == 1


def wait_for_cause(error: Exception) -> None:
    """Gives the watch time to find out whose death an error of the network comes from; it then ends this process."""
    if (
        isinstance(error, RuntimeError)
        and not world.agreed(error)
        and any(word in str(error).lower() for word in NETWORK)
    ):
        time.sleep(SILENT + GRACE + 10 * BEAT)


class Watch:
    """This process's sign of life, and its eye on the others."""

    def __init__(self) -> None:
        self._rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._store = world.store("tenbit")
        self._host = socket.gethostname()
        self._store.set(f"who/{self._rank}", f"{self._host} {os.getpid()} {_born(os.getpid())}")
        self._store.add(f"beat/{self._rank}", 1)
        self._over = threading.Event()
        self._told = False  # another rank has said what failed
        self._known: dict[int, tuple[str, int, str]] = {}
        self._beats: dict[int, tuple[int, float]] = {}
        threading.Thread(target=self._keep, name="tenbit-vigil", daemon=True).start()

    def leave(self) -> None:
        """This rank has done its part; it is not missed from now on."""
        self._over.set()
        with contextlib.suppress(RuntimeError):  # the store may have ended with rank 0
            self._store.set(f"left/{self._rank}", "1")

    def claim(self, cause: str) -> bool:
        """True if nobody has failed before. This process then ends within GRACE, whatever it hangs in."""
        try:
            mine = f"rank {self._rank}: {cause}"
            first = self._store.compare_set("failed", "", mine).decode() == mine
        except RuntimeError:  # the store is gone, and perhaps with it the rank that said why
            first = not self._told
        threading.Thread(target=_end_after, args=(GRACE,), daemon=True).start()
        return first

    def _keep(self) -> None:
        lost = 0
        while not self._over.wait(BEAT):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                cause = self._missing()
                failed = self._store.check(["failed"])
                lost = 0
            except RuntimeError:
                lost += 1
                if lost * BEAT < SILENT / 2 or self._over.is_set():
                    continue
                cause, failed = "the launcher's store is gone: rank 0's machine or torchrun itself has died", False
            if cause is not None and not self._over.is_set() and self.claim(cause):
                self._say(cause)
                _end_after(3 * BEAT)  # the store may live in this process, and the others have yet to read why
            self._told = self._told or failed
            if failed or cause is not None:
                _end_after(GRACE)

    def _missing(self) -> str | None:
        """What is wrong with a rank that this one watches, if anything."""
        for rank in range(self.size):
            if rank == self._rank or self._left(rank):
                continue
            if rank not in self._known:
                if not self._store.check([f"who/{rank}"]):
                    continue  # it has not begun yet
                host, pid, born = self._store.get(f"who/{rank}").decode().rsplit(" ", 2)
                self._known[rank] = (host, int(pid), born)
            host, pid, born = self._known[rank]
            here = host == self._host
            if here and _born(pid) != born and not self._left(rank):
                return f"rank {rank} (process {pid} on {host}) is gone: it was killed, or it crashed"
            if not here and 0 in (rank, self._rank) and self._silent(rank) and not self._left(rank):
                return f"rank {rank} (process {pid} on {host}) gives no sign of life: it, or its machine, has died"
        return None

    def _left(self, rank: int) -> bool:
        known = self._known.get(rank)
        if known is not None and known[0] == self._host and _born(known[1]) == known[2]:
            return False  # alive, which costs no question to the store
        return self._store.check([f"left/{rank}"])

    def _silent(self, rank: int) -> bool:
        now, count = time.monotonic(), self._store.add(f"beat/{rank}", 0)
        before = self._beats.get(rank)
        if before is None or before[0] != count:
            self._beats[rank] = (count, now)
            return False
        return now - before[1] > SILENT

    def _say(self, cause: str) -> None:
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        print(f"{show_cursor}\ntenbit: {cause}. The run ends here; it goes on from its last checkpoint with --resume",
              file=sys.stderr, flush=True)  # fmt: skip


def _end_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(1)


def _born(pid: int) -> str:
    """When a process of this machine started, so that a number used again is not taken for it; empty if it is gone."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]
