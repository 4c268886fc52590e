"""Where a run's metrics are mirrored to besides `metrics.jsonl`: TensorBoard, or a tracker of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Tracker(Protocol):
    """Somewhere else that metrics are sent to. Made as ``tracker(folder, resume_step)``."""

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Mirrors the metrics to event files in ``tensorboard/``. Events hold float32; the truth is in metrics.jsonl."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second of import, only when a run starts

        purge = resume_step + 1 if resume_step else resume_step  # the first step that will be logged again
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # also raises what went wrong in the writer's thread

    def close(self) -> None:
        self._writer.flush()
        self._writer.close()
