"""The far side of `ray.py`: an engine in a process of its own, and how weights travel to it. Knows nothing of Ray.

    for bucket in pack(named):                    in the trainer: bytes, with dtype, shape and checksum of each tensor
        ...                                       a copy of the bucket, read in place by every process of a machine
    worker.ask("install", buckets, version, base) in the engine's process: each checksum held against the bytes

Tensors travel as bytes because numpy, whose arrays are read in place, has no word for every dtype. A worker never lets
an error out: it answers with it, so that the caller gets the engine's own error and not that of the way back.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenbit import world
from tenbit.engines import Engine
from tenbit.engines.choose import make_engine
from tenbit.engines.delivery import checksum, undelivered
from tenbit.models.loading import Outline
from tenbit.precision import Precision
from tenbit.recipe import RolloutSpec
from tenbit.types import Completion, EngineFailed, Overflow, Prompt, Sampling, Undelivered

BUCKET = 256 << 20  # bytes that travel together, unless one tensor is larger


@dataclass(frozen=True)
class Bucket:
    """Some tensors. `rows` are (name, dtype, shape, checksum), `data` the bytes of each, ``[n]`` uint8."""

    rows: list[tuple[str, torch.dtype, tuple[int, ...], int]]
    data: list[np.ndarray]

    @property
    def bytes(self) -> int:
        return sum(d.nbytes for d in self.data)


def pack(named: Iterable[tuple[str, Tensor]], limit: int = BUCKET) -> Iterator[Bucket]:
    """Takes tensors until they fill a bucket. A tensor that lies in the CPU's memory already is not copied."""
    bucket = Bucket([], [])
    for name, tensor in named:
        held = tensor.detach().cpu().contiguous()
        data = held.reshape(-1).view(torch.uint8).numpy()
        if bucket.rows and bucket.bytes + data.nbytes > limit:
            yield bucket
            bucket = Bucket([], [])
        bucket.rows.append((name, tensor.dtype, tuple(tensor.shape), checksum(tensor)))
        bucket.data.append(data)
    if bucket.rows:
        yield bucket


def unpack(bucket: Bucket, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """The tensors on `device`; on a CPU they lie in the memory of the bucket, which must not be written to.

    Raises Undelivered. A GPU's checksums cost next to nothing, so a tensor goes there first.
    """
    for (name, dtype, shape, sent), data in zip(bucket.rows, bucket.data, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is read-only: it is only ever copied from
            flat = torch.from_numpy(data).view(dtype) if data.size else torch.empty(0, dtype=dtype)
        tensor = flat.view(shape).to(device)
        if checksum(tensor) != sent:
            raise undelivered(f"{name!r}: other bytes than were sent came out of the cluster's object store")
        yield name, tensor


@dataclass(frozen=True)
class Order:
    """The engine that a worker is to make. `cpus` is its share of the machine."""

    outline: Outline
    precision: Precision
    rollout: RolloutSpec
    seed: int
    longest: int | None
    cpus: float
    gpu: bool


@dataclass(frozen=True)
class Answer:
    """What came of a request: `value`, or an `error` of a kind that travels.

    `broken` says that the engine itself stopped working, so that another one should be asked.
    """

    value: Any = None
    error: Exception | None = None
    broken: bool = False


class Worker:
    """One engine in a process of its own. `ask` is the only way in."""

    def __init__(self) -> None:
        for key in world.launcher_variables(list(os.environ)):
            del os.environ[key]
        self._engine: Engine | None = None
        self._device = "cpu"

    def ask(self, request: str, *args: Any) -> Answer:
        """Answers with an error of a known kind and its text alone; its trace belongs to this process."""
        try:
            return Answer(getattr(self, f"_{request}")(*args))
        except Exception as error:
            for kind in (Undelivered, Overflow, EngineFailed, ValueError):
                if isinstance(error, kind):
                    text = str(error).replace("rollout.engine", "rollout.ray.engine")  # it thinks that it is the run's
                    return Answer(error=kind(text), broken=kind is EngineFailed)
            return Answer(error=EngineFailed(f"an engine of the pool raised {type(error).__name__}: {error}"))

    def _hello(self) -> tuple[str, int]:
        return socket.gethostname(), os.getpid()

    def _open(self, order: Order) -> None:
        torch.set_num_threads(max(1, int(order.cpus)))
        if order.gpu and not torch.cuda.is_available():
            raise ValueError(
                f"rollout.ray.gpus: Ray gave a GPU of {socket.gethostname()} to an engine, but torch finds none there. "
                "Install a torch with CUDA on that machine, or set rollout.ray.gpus = 0"
            )
        self._device = "cuda" if order.gpu else "cpu"
        model = order.outline.model(torch.device(self._device))
        self._engine = make_engine(order.rollout, model, order.precision, order.seed, order.longest)

    @property
    def _own(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def _install(self, buckets: Iterable[Bucket], version: int, base: Iterable[Bucket] = ()) -> None:
        """`base`, frozen weights beside an adapter, is read if the engine has none: it is new, or its load failed.

        What is wrong with a bucket ends the weights early, for an error in the middle of its loader would leave an
        engine in pieces; it then misses weights, and refuses to sample.
        """
        wrong: list[Exception] = []
        needed = buckets if self._own.wants == "trained" else itertools.chain(base, buckets)

        def read() -> Iterator[tuple[str, Tensor]]:
            try:
                for bucket in needed:
                    yield from unpack(bucket, self._device)
            except Exception as error:
                wrong.append(error)

        try:
            self._own.load_weights(read(), version)
        except Exception as error:
            raise (wrong or [error])[0] from None
        if wrong:
            raise wrong[0]

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling, start: int) -> list[Completion]:
        return _counted_from(start, lambda: self._own.generate(prompts, sampling))

    def _score(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling, start: int
    ) -> list[Tensor]:
        return _counted_from(start, lambda: self._own.score(sequences, sampling))

    def _rest(self) -> None:
        self._own.rest()

    def _live(self) -> list[tuple[str, str, torch.dtype, tuple[int, ...]]]:
        return [(part, name, t.dtype, tuple(t.shape)) for part, name, t in self._own.live()]


def _counted_from(start: int, act: Callable[[], Any]) -> Any:
    """An engine that was given a part of the prompts counts them from 0; its error is to name the caller's."""
    try:
        return act()
    except (ValueError, Overflow) as error:
        text = re.sub(r"^(prompt|sequence) (\d+)\b", lambda m: f"{m[1]} {int(m[2]) + start}", str(error))
        raise type(error)(text) from error
