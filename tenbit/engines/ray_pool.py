"""Seats, each with a worker in an actor of its own, and tasks that any of them may do. Deaths are made good here.

    pool.start(8, all_of_them=False)
    values = pool.do([Task("generate", (prompts, sampling, 0)), ...])        in the order of the tasks

A seat whose actor dies (killed, out of memory, its machine gone), or whose engine stops working, gets a new one, on the
same machine if it has room; this one makes its engine and takes the current weights while the others work on. Its
task is put back in front of all others. A task has one answer, the first; what came of an earlier try is lost with the
actor, so nothing is counted twice. `ray` is the library, given by `ray.py`, which alone imports it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tenbit.engines.ray_worker import Answer, Order
from tenbit.types import EngineFailed

SCHEDULED = 120.0  # seconds until the cluster has found a place for an actor and its process has answered
OPENED = 1800.0  # seconds for an engine to start; large models in vLLM take many minutes
POLL = 1.0  # seconds between looks at whether the pool was closed
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Task:
    """A request to a worker, for one seat or for any. `once`: not to be tried again if an engine stops working."""

    request: str
    args: tuple[Any, ...] = ()
    seat: Seat | None = None
    once: bool = False
    answer: Answer | None = None


@dataclass(eq=False)
class Seat:
    """A place in the pool. `ref` is the future answer to `task`; while `opened` is false, tasks are the pool's own."""

    number: int
    actor: Any = None
    node: str | None = None
    who: str = ""
    opened: bool = False
    holds: Any = None
    ref: Any = None
    task: Task | None = None
    deadline: float | None = None


class Weights(NamedTuple):
    """What every seat is to hold: references to buckets in the object store, and their version.

    `base`: those of frozen weights beside an adapter, which only an engine that has none reads.
    """

    refs: list[Any]
    version: int
    base: Sequence[Any] = ()


class Pool:
    """`make` creates an actor, on a node if it is named one. One call at a time; other threads wait for their turn."""

    def __init__(self, ray: Any, make: Callable[[str | None], Any], order: Order, restarts: int) -> None:
        self._ray, self._make, self._order = ray, make, order
        self.restarts_left, self._restarts = restarts, restarts
        self.seats: list[Seat] = []
        self._weights: Weights | None = None
        self._received = False
        self._lock = threading.RLock()
        self._starting, self._closed = False, False
        self._dead: str | None = None

    # --- what is asked of it

    def start(self, engines: int, all_of_them: bool) -> None:
        """Raises ValueError if no engine starts, or, with `all_of_them`, if one of them does not."""
        self._starting = True
        self.seats = [Seat(i) for i in range(engines)]
        for seat in self.seats:
            self._revive(seat)
        while any(not seat.opened for seat in self.seats):
            self._step(deque())
            if all_of_them and len(self.seats) < engines:
                break
        if not self.seats or (all_of_them and len(self.seats) < engines):
            raise ValueError(
                f"rollout.ray.engines: the cluster found room for {len(self.seats)} of {engines} engines within "
                f"{SCHEDULED:.0f} s; others may be using it. Lower rollout.ray.engines, .cpus or .gpus, or add machines"
            )
        self._starting = False

    def install(self, weights: Weights) -> None:
        """On every seat, also on those that are being replaced. After an error no seat has weights to be used."""
        with self._lock:
            self._weights = weights
            try:
                # by an engine that never took any, a failure says that it cannot
                once = not self._received
                self.do([Task("install", weights, seat, once) for seat in self.seats])
            except BaseException:
                self._weights = None
                raise
            self._received = True

    def forget(self) -> None:
        """Lets go of the current weights; others are about to come."""
        with self._lock:
            self._weights = None

    def each(self, request: str) -> None:
        with self._lock:
            self.do([Task(request, (), seat) for seat in self.seats])

    def do(self, tasks: Sequence[Task]) -> list[Any]:
        """The tasks' values. Raises the error of the first task that has one, when no seat works on another any more;
        EngineFailed if more died than may be replaced.
        """
        with self._lock:
            self._refuse_dead()
            todo = deque(tasks)
            try:
                while todo or any(seat.task in tasks for seat in self.seats):
                    for seat in self.seats:
                        self._give(seat, todo)
                    if any(seat.ref is not None for seat in self.seats):
                        self._step(todo)
                    if any(t.answer is not None and t.answer.error is not None for t in tasks):
                        todo.clear()
            except BaseException:
                for task in tasks:  # a seat may still be at it; nobody waits for that any more
                    task.answer = task.answer or Answer()
                raise
        for task in tasks:
            if task.answer is not None and task.answer.error is not None:
                raise task.answer.error
        return [task.answer.value if task.answer else None for task in tasks]

    def close(self) -> None:
        """Ends all actors. A call that waits for them in another thread ends with EngineFailed."""
        self._closed = True
        self._kill_all()
        if self._lock.acquire(timeout=10 * POLL):
            self._kill_all()  # one may have been made in between
            self.seats, self._weights = [], None
            self._lock.release()

    def _kill_all(self) -> None:
        for seat in list(self.seats):
            self._kill(seat)

    # --- one step

    def _refuse_dead(self) -> None:
        if self._closed:
            raise EngineFailed("the pool of engines is closed")
        if self._dead is not None:
            raise EngineFailed(self._dead)

    def _give(self, seat: Seat, todo: deque[Task]) -> None:
        """The next task that this seat may do, if it is free."""
        if seat.ref is not None or not seat.opened:
            return
        for task in todo:
            if task.seat in (None, seat):
                todo.remove(task)
                if task.request == "install" and seat.holds is task.args:
                    task.answer = Answer()  # it died over them, and its replacement has them by now
                    return self._give(seat, todo)
                return self._submit(seat, task)

    def _submit(self, seat: Seat, task: Task, within: float | None = None) -> None:
        seat.task, seat.ref = task, seat.actor.ask.remote(task.request, *task.args)
        seat.deadline = None if within is None else time.monotonic() + within

    def _step(self, todo: deque[Task]) -> None:
        """Waits for an answer, or a while, and does what follows from it."""
        self._refuse_dead()
        busy = {seat.ref: seat for seat in self.seats if seat.ref is not None}
        done, _ = self._ray.wait(list(busy), num_returns=1, timeout=POLL)
        for ref in done:
            self._answered(busy[ref], todo)
        for seat in [s for s in self.seats if s.deadline is not None and time.monotonic() > s.deadline]:
            self._drop(seat, todo, "the cluster found no place for it, or its engine did not start, in time")

    def _answered(self, seat: Seat, todo: deque[Task]) -> None:
        task, answer, cause = seat.task, None, ""
        assert task is not None
        try:
            answer = self._ray.get(seat.ref)
        except self._ray.exceptions.RayTaskError as error:  # raised outside of what the worker guards
            answer = Answer(error=EngineFailed(f"an engine of the pool failed: {_last_line(error)}"))
        except self._ray.exceptions.RayError as error:
            self._refuse_dead()
            cause = died(error)
        if answer is not None and answer.broken and not task.once:
            cause = str(answer.error)
        seat.task = seat.ref = seat.deadline = None
        if cause:
            if seat.opened and task.answer is None:
                todo.appendleft(task)
            self._replace(seat, todo, cause)
        elif answer is not None and not seat.opened:
            self._advance(seat, todo, task, answer)
        else:
            task.answer = task.answer or answer
            if task.request == "install":
                seat.holds = task.args

    # --- the life of a seat

    def _revive(self, seat: Seat) -> None:
        seat.opened, seat.holds, seat.who = False, None, ""
        seat.actor = self._make(seat.node)
        self._submit(seat, Task("hello"), SCHEDULED)

    def _advance(self, seat: Seat, todo: deque[Task], task: Task, answer: Answer) -> None:
        """From a new actor to one with an engine, and with the weights that are current by then."""
        if answer.error is not None:
            if self._starting:
                raise answer.error if isinstance(answer.error, ValueError) else ValueError(str(answer.error))
            return self._drop(seat, todo, str(answer.error))
        if task.request == "hello":
            seat.node, host, process = answer.value
            seat.who = f"process {process} on {host}"
            return self._submit(seat, Task("open", (self._order,)), OPENED)
        if task.request == "install":
            seat.holds = task.args
        if self._weights is not None and seat.holds is not self._weights:
            return self._submit(seat, Task("install", self._weights), OPENED)
        seat.opened = True

    def _replace(self, seat: Seat, todo: deque[Task], cause: str) -> None:
        self._kill(seat)
        who = seat.who or f"engine {seat.number}"
        if self._starting:
            raise ValueError(f"rollout.engine = 'ray': an engine died while it started ({who}): {cause}")
        if self.restarts_left == 0:
            self._dead = (
                f"the pool's engines died {self._restarts + 1} times, and rollout.ray.restarts = {self._restarts}; "
                f"the last one ({who}): {cause}"
            )
            raise EngineFailed(self._dead)
        self.restarts_left -= 1
        log.warning("an engine of the pool died (%s) and is replaced: %s", who, cause)
        self._revive(seat)

    def _drop(self, seat: Seat, todo: deque[Task], cause: str) -> None:
        """Goes on without it. What only it was to do is done, for weights, or has no answer."""
        self._kill(seat)
        self.seats.remove(seat)
        if self._starting:
            return
        who = f"engine {seat.number} of the pool"
        for task in [t for t in todo if t.seat is seat]:
            todo.remove(task)
            gone = None if task.request in ("install", "rest") else EngineFailed(f"{who} is gone: {cause}")
            task.answer = Answer(error=gone)
        if not self.seats:
            self._dead = f"the last engine of the pool could not be replaced: {cause}"
            raise EngineFailed(self._dead)
        log.warning("%s could not be replaced (%s); %d are left", who, cause, len(self.seats))

    def _kill(self, seat: Seat) -> None:
        with contextlib.suppress(Exception):  # it may be dead, or never have been
            self._ray.kill(seat.actor, no_restart=True)


def died(error: BaseException) -> str:
    """What Ray says of a death, in one line, without its addresses and its list of what may have been."""
    text = " ".join(str(error).split())
    made = str(error).strip().splitlines()
    if "creation task" in text or "__init__" in text:
        return made[-1].strip()
    _, found, rest = text.partition("The actor is dead because ")
    text = (rest if found else text).partition(" Some common causes")[0].partition(" There are some potential")[0]
    if "End of file" in text or "connection error code 2" in text:
        text += " This is what a killed process looks like (SIGKILL), most often for want of memory"
    return text.rstrip(".")


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
