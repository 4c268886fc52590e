"""Engines of a run with several ranks, as one engine that every rank calls alike.

    Each     every rank has an engine of its own and does its share of the prompts; with tensor parallelism over
             ranks, each team of ranks has one
    Pool     rank 0 alone has one (a pool on a Ray cluster); the others get what it drew

Both give every rank all completions in the order of the prompts, so that all ranks make the same batches. What fails
on one rank fails on all, and a rank whose engine refuses weights still takes part in gathering them to the end.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from tenbit import world
from tenbit.closing import Closing
from tenbit.engines import Engine
from tenbit.engines.vllm_ranks import team_size
from tenbit.recipe import RolloutSpec
from tenbit.types import Completion, EngineFailed, Prompt, Sampling, Share

Sequence2 = tuple[Sequence[int], Sequence[int]]
_MOST_FIRST: tuple[Share, ...] = ("model", "parts", "trained")


def spread(make: Callable[[], Engine], pool: bool, team: int = 1) -> Engine:
    """The run's engine, from what makes one on a rank. Raises on every rank what one of them raises."""
    if world.size() == 1:
        return make()
    own = world.together(lambda: make() if world.is_first() or not pool else None)
    return Pool(own) if pool else Each(own, team)


def team_of(rollout: RolloutSpec) -> int:
    """How many consecutive ranks are one engine together: vLLM's tensor parallelism, over the ranks of a node."""
    return team_size(rollout.vllm) if rollout.engine == "vllm" else 1


def pool_of(engine: Engine) -> Engine | None:
    """The pool that rank 0 holds; None on the other ranks."""
    return engine.own if isinstance(engine, Pool) else engine


class _Collective(Closing):
    """What both kinds share: `own` is this rank's engine, if it has one."""

    own: Engine | None

    @property
    def wants(self) -> Share:
        """The same on every rank, which ask together: what the engine needs that holds least, wherever it is."""
        wanted = world.gather(None if self.own is None else self.own.wants)
        return next(kind for kind in _MOST_FIRST if kind in wanted)

    @property
    def _own(self) -> Engine:
        assert self.own is not None
        return self.own

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Every rank reads all weights, for gathering them takes all ranks, and then they agree on the outcome."""
        own = self.own
        world.reading(named_tensors, lambda named: None if own is None else own.load_weights(named, version))

    def members(self) -> Sequence[Engine]:
        return self.own.members() if self.own is not None else []

    def rest(self) -> None:
        if self.own is not None:
            self.own.rest()

    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        if self.own is not None:
            yield from self.own.live()

    def close(self) -> None:
        if self.own is not None:
            self.own.close()


class Each(_Collective):
    """An engine on every rank; `team` consecutive ranks are one engine together and do the same share."""

    def __init__(self, own: Engine | None, team: int) -> None:
        self.own, self._team = own, team

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        own: list[Completion] = []

        def draw(share: Sequence[Prompt]) -> list[Completion]:
            own.extend(self._own.generate(share, sampling))
            return own

        drawn = world.divide(prompts, draw, self._team)
        if self._team > 1:
            self._refuse_other_draws([c.response_ids for c in own])
        return drawn

    def score(self, sequences: Sequence[Sequence2], sampling: Sampling) -> list[Tensor]:
        return world.divide(sequences, lambda share: self._own.score(share, sampling), self._team)

    def _refuse_other_draws(self, own: list[tuple[int, ...]]) -> None:
        """A team's ranks each draw from logits that all of them computed: they must come to the same tokens."""
        drew = world.gather(zlib.crc32(repr(own).encode()))
        for rank, other in enumerate(drew):
            first = rank // self._team * self._team
            if other != drew[first]:
                raise EngineFailed(
                    f"ranks {first} and {rank} are one vLLM and drew different tokens from the same prompts: they do "
                    "not compute the same logits. Set rollout.vllm.options.tensor_parallel_size = 1"
                )


class Pool(_Collective):
    """An engine that rank 0 has for all."""

    def __init__(self, own: Engine | None) -> None:
        self.own = own

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return world.first(lambda: self._own.generate(prompts, sampling))

    def score(self, sequences: Sequence[Sequence2], sampling: Sampling) -> list[Tensor]:
        return world.first(lambda: self._own.score(sequences, sampling))
