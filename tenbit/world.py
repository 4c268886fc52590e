"""Who am I among how many: rank, size and the few reductions a run needs. Alone, all of them do nothing.

`torch.distributed` is used where a launcher (torchrun) has set it up; nothing else in tenbit asks for ranks.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

from tenbit.types import Stats, merge

T = TypeVar("T")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _distributed() else 0


def size() -> int:
    return dist.get_world_size() if _distributed() else 1


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if size() == 1:
        return [value]
    values: list[T | None] = [None] * size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def merge_stats(stats: Stats) -> Stats:
    """Statistics added up over all ranks."""
    return merge(gather(stats))
