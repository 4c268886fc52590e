"""The processes of one run: who am I among how many, and what all of them have to agree on. No-ops when alone.

    torchrun --nproc-per-node 8 -m tenbit train RECIPE         eight processes, ranks 0 to 7

    with world.joined():                 joins the others, if a launcher started several
        folder = world.first(choose)                       rank 0 decides, all get its answer or its error
        drawn = world.divide(prompts, engine.generate)     each does its share, all get everything, in order
        world.together(load)                               all do it; if one fails, all raise its error
        world.reading(backend.weights(), load)             the same with what takes all ranks to make, item by item

An error that only one rank sees would leave the others waiting for it, so whatever can fail on a rank alone goes
through one of these. What no `except` sees (a killed process, a node that is gone) is noticed by `vigil.py`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")

# A rank may wait for others that sample, grade or write for long; that one has died is noticed by other means.
PATIENCE = datetime.timedelta(hours=6)
_LAUNCHER = re.compile(r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+")
_talk: dist.ProcessGroup | None = None  # values, not tensors, travel over gloo, so that no GPU waits for them
_write: dist.ProcessGroup | None = None


def launched() -> bool:
    """Whether a launcher (torchrun) started this process as one of several, or as the only one of a group."""
    return all(key in os.environ for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The process group, for as long as the context lasts. Nothing happens if no launcher started us."""
    global _talk, _write
    if not launched() or dist.is_initialized():
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    _talk, _write = _group(), _group()
    yield
    _talk = _write = None  # after an error the group is left as it is: ending it would wait for the others
    dist.destroy_process_group()


def _group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    return group


def store(prefix: str) -> Any:
    """The launcher's key-value store, through a connection of our own. Keys are of this start, under `prefix`."""
    c10d: Any = dist  # a type checker finds stores nowhere
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    start = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return c10d.PrefixStore(f"{prefix}/{start}", c10d.TCPStore(host, port, is_master=False, wait_for_workers=False))


def launcher_variables(environment: Iterable[str]) -> list[str]:
    """What torchrun sets: in a process that is no rank of the run they would say that it is one."""
    return [key for key in environment if _LAUNCHER.fullmatch(key)]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def writers() -> dist.ProcessGroup | None:
    """A group of all ranks for one background thread, whose collectives may not mix with the main thread's."""
    return _write


def local_rank() -> int:
    """The rank among the processes of this machine: which GPU is ours."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this is rank 0, which alone writes to the run folder and to the screen."""
    return rank() == 0


def gather(value: T) -> list[T]:
    """Everyone's value, by rank, on every rank. Values are pickled."""
    if size() == 1:
        return [value]
    out: list[Any] = [None] * size()
    dist.all_gather_object(out, value, group=_talk)
    return out


def agree(error: Exception | None) -> None:
    """Raises, on every rank, the error of the lowest rank that has one."""
    for number, other in enumerate(gather(None if error is None else _portable(error))):
        if other is not None:
            raise _agreed(error if number == rank() and error is not None else other)


def together(act: Callable[[], R]) -> R:
    """Does it on every rank; if it raises on one, every rank raises that error. `act` may not wait for other ranks."""
    if size() == 1:
        return act()
    result, error = _tried(act)
    agree(error)
    return result  # type: ignore[return-value]


def reading(named: Iterable[T], act: Callable[[Iterator[T]], R]) -> R:
    """`act` reads `named`, whose every item takes all ranks to make: whatever becomes of `act` on this rank, the rest
    is read too. Then, if it raised on one rank, every rank raises that error.
    """
    left = iter(named)
    if size() == 1:
        return act(left)
    result, error = _tried(lambda: act(left))
    for _ in left:
        pass
    agree(error)
    return result  # type: ignore[return-value]


def first(act: Callable[[], R]) -> R:
    """Does it on rank 0 alone; every rank gets the result, or the error."""
    if size() == 1:
        return act()
    result, error = _tried(act) if is_first() else (None, None)
    box = [(result, error and _portable(error))]
    dist.broadcast_object_list(box, src=0, group=_talk)
    result, error = (result, error) if is_first() else box[0]
    if error is not None:
        raise _agreed(error)
    return result  # type: ignore[return-value]


def divide(items: Sequence[T], act: Callable[[Sequence[T]], Sequence[R]], team: int = 1) -> list[R]:
    """Rank r does ``items[r::size]``; every rank gets all results in the order of the items, or the first error.

    `team` consecutive ranks do the same share (an engine that is spread over them), and the first one's result counts.
    """
    if size() == 1:
        return list(act(items))
    teams, mine = size() // team, rank() // team
    result, error = _tried(lambda: list(act(items[mine::teams])))
    parts = gather((result if rank() % team == 0 else None, error and _portable(error)))
    for number, (_, other) in enumerate(parts):
        if other is not None:
            raise _agreed(error if number == rank() and error is not None else other)
    out: list[Any] = [None] * len(items)
    for team_number in range(teams):
        share = parts[team_number * team][0]
        assert share is not None
        out[team_number::teams] = share
    return out


def _tried(act: Callable[[], R]) -> tuple[R | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:
        return None, error


def agreed(error: BaseException) -> bool:
    """Whether all ranks raised this error together, so that nobody's death is behind it."""
    return getattr(error, "_tenbit_agreed", False)


def _agreed(error: Exception) -> Exception:
    error._tenbit_agreed = True  # type: ignore[attr-defined]
    return error


def _portable(error: Exception) -> Exception:
    """The error, or one with its text if it cannot travel to the other ranks."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
