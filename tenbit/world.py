"""Who am I among how many: rank and size, 0 of 1 when alone.

`torch.distributed` is used where a launcher (torchrun) has set it up; nothing else in tenbit asks for ranks.
"""

from __future__ import annotations

import torch.distributed as dist


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _distributed() else 0


def size() -> int:
    return dist.get_world_size() if _distributed() else 1
