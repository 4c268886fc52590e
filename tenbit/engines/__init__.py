"""Engines sample: they are the rollout policy mu. One small protocol; `torch.py` is built in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor

from tenbit.types import Completion, Prompt, Sampling, Share


class Engine(Protocol):
    """Draws responses and scores tokens under the weights it last received. A context manager."""

    @property
    def wants(self) -> Share:
        """What its next `load_weights` is to be given: with an adapter, frozen weights are sent once."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts."""
        ...

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling) -> list[Tensor]:
        """log mu of each response token, ``[T]`` float32 on the CPU per (prompt ids, response ids) pair."""
        ...

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes all of what it `wants`. ValueError on a missing or unknown name, Overflow on weights that are not
        finite, Undelivered where the engine can tell that it holds something else than was sent.
        """
        ...

    def members(self) -> Sequence[Engine]:
        """The engines that it consists of, as far as this process can ask each by itself; itself, if it is one."""
        ...

    def rest(self) -> None:
        """Nothing is asked of it until the next `load_weights`: memory shared with training may be given back."""
        ...

    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        """``("rollout", name, tensor)`` for every weight it computes with, for `Precision.verify`."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
