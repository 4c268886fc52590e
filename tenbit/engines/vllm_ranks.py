"""vLLM on several ranks: one engine on each, in its process, or one for each team of consecutive ranks.

    rollout.engine=vllm                                             every rank has an engine of its own, on its own GPU
    rollout.engine=vllm rollout.vllm.options.tensor_parallel_size=2    ranks 0 and 1 are one engine, 2 and 3 the next

vLLM's worker lives in the trainer's process and talks through groups of its own within the process group that was
there before. In a team every rank is handed the same prompts, in the same order and with the same seeds, schedules them
alike, and holds its part of every weight. So all of a team's calls are made together, and two things need care: what
one rank has installed proves nothing before its team's reports are put together, and a call that fails on one rank
alone leaves the others waiting in an operation that it will never join.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from tenbit import vigil, world
from tenbit.engines.delivery import Report
from tenbit.recipe import VllmSpec

PATIENCE = 20.0  # seconds by which ranks that fail of the same cause may be apart
_failures: dict[tuple[int, int], int] = {}


def team_size(spec: VllmSpec) -> int:
    """How many consecutive ranks are one engine. Raises ValueError, naming the key, for what ranks cannot be."""
    if world.size() == 1:
        return 1
    tensor = spec.parallel("tensor")
    where, local = "rollout.vllm.options", int(os.environ.get("LOCAL_WORLD_SIZE", world.size()))
    if spec.parallel("pipeline") != 1 or spec.parallel("data") != 1:
        raise ValueError(
            f"{where}: on {world.size()} ranks neither pipeline_parallel_size nor data_parallel_size can be set: every "
            "rank has an engine already. Remove it; a model too large for one GPU takes tensor_parallel_size"
        )
    if "distributed_executor_backend" in spec.options:
        raise ValueError(f"{where}.distributed_executor_backend: on several ranks tenbit sets this. Remove it")
    if tensor < 1 or local % tensor:
        raise ValueError(
            f"{where}.tensor_parallel_size = {tensor} does not divide the {local} ranks of a node. Start a multiple of "
            "it (torchrun --nproc-per-node), or lower it"
        )
    if tensor > 1 and spec.own_process:
        raise ValueError(
            f"{where}.tensor_parallel_size = {tensor} on {world.size()} ranks: these are the engine's workers, so it "
            "cannot have a process of its own. Set rollout.vllm.own_process = false"
        )
    return tensor


@dataclass(frozen=True)
class Team:
    """The consecutive ranks whose workers are one engine; a team of one has nobody to talk to."""

    size: int = 1

    @property
    def first(self) -> int:
        return world.rank() // self.size * self.size

    def reports(self, install: Callable[[], list[Report]], named: Iterable[Any]) -> list[Report]:
        """What all workers of the team installed; on every rank, or the first error on every rank.

        `named` is read to its end, for reading it takes all ranks.
        """
        if self.size == 1:
            return install()
        everyone = world.gather(world.reading(named, lambda _: install()))
        return [report for one in everyone[self.first : self.first + self.size] for report in one]

    @contextlib.contextmanager
    def shared_fate(self) -> Iterator[None]:
        """An error that all ranks of the team run into is raised; one of this rank alone ends the process.

        The others wait for this rank within vLLM, where no message of ours reaches them; the launcher ends them.
        """
        try:
            yield
        except Exception as error:
            if self.size == 1 or self._all_failed():
                raise
            if vigil.failed_first(str(error)):
                print(f"tenbit: rank {world.rank()}: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from error

    def _all_failed(self) -> bool:
        """Whether the other ranks of the team fail here, too, or do so soon."""
        key = self.first, self.size
        turn = _failures[key] = _failures.get(key, 0) + 1
        name, end = f"{key[0]}+{key[1]}/{turn}", time.monotonic() + PATIENCE
        store = world.store("tenbit/vllm")
        store.add(name, 1)
        while store.add(name, 0) < self.size and time.monotonic() < end:
            time.sleep(0.1)
        return store.add(name, 0) >= self.size


def is_guest() -> bool:
    """Whether vLLM would work within a process group that is not its own, and that must outlive it."""
    return world.launched() and dist.is_initialized()


def executor(uniproc: Any, team: Team) -> type:
    """vLLM's executor of one process, on this rank's GPU and as this rank. `uniproc` is vLLM's module of that name.

    vLLM's own "external_launcher" does nearly that, but all its CPU runs on one machine share the name of their shared
    memory, and starting one engine takes every rank of the run, not of its team.
    """
    name = world.gather(uuid.uuid4().hex)[team.first] if team.size > 1 else uuid.uuid4().hex

    class OnRank(uniproc.UniProcExecutor):
        def _distributed_args(self) -> tuple[str, int, int]:
            return f"env://:{name}", world.rank() if team.size > 1 else 0, world.local_rank()

        def determine_available_memory(self) -> list[int]:
            """The least of the team's, so that all schedulers decide alike."""
            own = super().determine_available_memory()
            if team.size == 1:
                return own
            return [min(one[0] for one in world.gather(own)[team.first : team.first + team.size])]

    return OnRank


@contextlib.contextmanager
def as_if_alone(gpu: bool) -> Iterator[None]:
    """Processes that are started meanwhile do not take themselves for a rank of this run, and see its GPU only."""
    if world.size() == 1:
        yield
        return
    before = dict(os.environ)
    hidden = world.launcher_variables(before)
    for key in hidden:
        del os.environ[key]
    if gpu:
        visible = before.get("CUDA_VISIBLE_DEVICES")
        local = int(before.get("LOCAL_RANK", "0"))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)
    try:
        yield
    finally:
        os.environ.update({key: before[key] for key in hidden})
        if gpu:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            os.environ.update({k: v for k, v in before.items() if k == "CUDA_VISIBLE_DEVICES"})
