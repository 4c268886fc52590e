"""When a step's responses are sampled, and under which weights: strictly on-policy, or ahead of training.

    OnPolicy     step n samples under the weights of n - 1 updates, then trains on it
    Ahead(k)     step n trains on responses that were sampled under the weights of n - 1 - k updates, while the steps
                 before it were trained (`rollout.ahead = k`, on a Ray pool)

The lag is exact, not "at most k, as it happens to be": which weights sample which responses does not depend on how fast
anything is, so a run with the same seed, or a resumed one, is the same run. The first k + 1 steps share the initial
weights. A checkpoint waits for what may be sampled without newer weights, and keeps it. Only where sampling failed is
there less to keep; then the resumed run samples what is missing under the weights that it begins with, the lag being
shorter for up to k steps.

Ahead of training, log pi - log mu holds two things: numerical mismatch and the policy's drift since. They are told
apart on a small sample: while the weights that sampled are still at hand (a copy of this rank's shards in the compute
format, on the CPU), the trainer scores it under them. log pi_then - log mu is the mismatch, log pi_now - log pi_then
the drift.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tenbit import mismatch, world
from tenbit.backends import Backend
from tenbit.batching import collate, micro_batches, ungraded
from tenbit.canary import Canary, Expected
from tenbit.checkpoint import Progress
from tenbit.clock import Clock
from tenbit.engines import Engine
from tenbit.mismatch import Mismatch
from tenbit.models.experts import routed, routers
from tenbit.models.loading import Model
from tenbit.recipe import Recipe
from tenbit.rollout import Collected, Policy, ProblemStream, collect
from tenbit.types import Completion, Problem, Rollout

ENDED = 30.0  # seconds for the thread to end: a pool that is closed, or answers that are being graded


@dataclass(frozen=True)
class Supply:
    """What one step trains on.

    Of responses sampled ahead of training, `then` is log pi ``[T]`` of a small sample (`sample_of`) under the weights
    that sampled it, `now` under the weights at the start of the step. None where those are the same weights.
    """

    collected: Collected
    position: int  # problems taken from the stream, after it
    failures: Counter[str] = field(default_factory=Counter)  # of the grader, by kind
    seconds: dict[str, float] = field(default_factory=dict)  # that the thread took, ahead of training
    then: list[Tensor] | None = None
    now: list[Tensor] | None = None


class Sampler(Protocol):
    """Where the loop gets a step's responses from. Called on all ranks alike."""

    def supply(self, step: int, clock: Clock) -> Supply:
        """The responses of a step, from weights that were proven to have arrived."""
        ...

    def settle(self) -> None:
        """Waits until nothing is being sampled, so that the engine may be used for something else."""
        ...

    def held(self) -> tuple[Any, int | None]:
        """What was sampled and not trained on yet, in plain values and tensors, and the stream's position after it."""
        ...


class OnPolicy:
    """Samples when asked, under the newest weights."""

    def __init__(self, policy: Policy, stream: ProblemStream, recipe: Recipe, backend: Backend, canary: Canary) -> None:
        self._policy, self._stream, self._recipe = policy, stream, recipe
        self._backend, self._canary = backend, canary

    def supply(self, step: int, clock: Clock) -> Supply:
        with clock("sync"):
            deliver(self._policy.engine, self._backend, self._recipe, self._canary, step - 1)
        collected = collect(self._policy, self._stream, self._recipe, step, clock)
        self._policy.engine.rest()
        failures = sum(world.gather(collected.failures), Counter())
        return Supply(collected, self._stream.position, failures)

    def settle(self) -> None:
        """Nothing ever is."""

    def held(self) -> tuple[Any, int | None]:
        return None, None


def deliver(engine: Engine, backend: Backend, recipe: Recipe, canary: Canary, version: int) -> None:
    """The masters, cast once by the plan, into the engine, and proof of it; their version is the steps done."""
    plan = recipe.precision
    named = plan.to_engine(backend.weights(plan.asked(plan.sync), engine.wants))
    engine.load_weights(named, version)
    canary.prove(engine, backend)


@dataclass(frozen=True)
class _Offer:
    """Weights of one version on their way to the pool, and what the trainer computes with them on the canary."""

    staged: Any
    expected: Expected


class Ahead:
    """Samples `rollout.ahead` steps ahead, in a thread of rank 0, on a pool that only rank 0 holds.

    `policy` is rank 0's own (None elsewhere). `held` is what a checkpoint of `start` kept, on rank 0.
    """

    def __init__(
        self,
        policy: Policy | None,
        stream: ProblemStream,
        recipe: Recipe,
        backend: Backend,
        canary: Canary,
        model: Model,
        start: Progress,
        held: Any = None,
    ) -> None:
        self._policy, self._stream, self._recipe = policy, stream, recipe
        self._backend, self._canary, self._pad = backend, canary, model.pad_token_id
        self._routers = routers(model.module)
        self._lag = recipe.rollout.ahead
        self._start = start.step
        self._ready = {step: _supply(plain) for step, plain in enumerate(held or (), start.step + 1)}
        self._fresh = start.step + 1 + world.first(lambda: len(self._ready))  # the first step that is not held
        self._next = self._fresh  # what the thread samples next
        self._offers: dict[int, _Offer] = {}
        self._snapshots: dict[int, list[Tensor]] = {}
        self._offered = -1  # the newest version that was handed to the thread
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tenbit-ahead", daemon=True)
        if world.is_first():
            self._thread.start()

    @property
    def _pool(self) -> Any:
        assert self._policy is not None, "rank 0 alone has it"
        return self._policy.engine

    def version_of(self, step: int) -> int:
        """The number of updates under which a step's responses are sampled; those before `start` are gone."""
        return max(self._start, step - 1 - self._lag)

    def _last(self, version: int) -> int:
        """The last step that may be sampled once a version is there; 0 without any."""
        return 0 if version < 0 else min(version + 1 + self._lag, self._recipe.steps)

    # --- on every rank, in the main thread

    def supply(self, step: int, clock: Clock) -> Supply:
        with clock("sync"):
            self._offer(step - 1)
        with clock("wait"):
            supply = world.first(lambda: self._take(step))
        with clock("rescore"):
            supply = self._with_then(step, supply)
        self._snapshots = {v: s for v, s in self._snapshots.items() if v >= self.version_of(step + 1)}
        assert supply.then is not None
        with clock("rescore"):
            now = self._score(sample_of(supply.collected, len(supply.then)))
        return replace(supply, now=now)

    def settle(self) -> None:
        """Waits for all that may be sampled without the weights of a step that is not trained yet."""
        world.first(self._settled)

    def held(self) -> tuple[Any, int | None]:
        """Scored under their own weights first, for the copies of those are not kept."""
        for step in world.first(lambda: sorted(self._ready)):
            supply = self._with_then(step, world.first(lambda step=step: self._ready[step]))
            if world.is_first():
                self._ready[step] = supply
        held = sorted(self._ready.items())
        return [_plain(supply) for _, supply in held], held[-1][1].position if held else None

    def close(self) -> None:
        """Ends the thread, and with it, if it is sampling, the pool."""
        with self._changed:
            busy = self._thread.is_alive() and self._next <= self._last(self._offered)
            self._closed = True
            self._changed.notify_all()
        if busy:
            self._pool.close()
        if self._thread.is_alive():
            self._thread.join(ENDED)

    def _offer(self, version: int) -> None:
        """Hands the current weights to the thread, if there is a step to be sampled under them."""
        steps = range(max(self._fresh, version + 1), self._last(version) + 1)
        if version <= self._offered or not any(self.version_of(step) == version for step in steps):
            return
        plan = self._recipe.precision
        share = world.first(lambda: self._pool.wants)
        named = plan.to_engine(self._backend.weights(plan.asked(plan.sync), share))
        staged = world.reading(named, lambda left: self._pool.stage(left) if world.is_first() else None)
        expected = self._canary.expect(self._backend)
        self._snapshots[version] = self._backend.snapshot()
        with self._changed:
            self._offered = version
            if world.is_first():
                self._offers[version] = _Offer(staged, expected)
            self._changed.notify_all()

    def _take(self, step: int) -> Supply:
        with self._changed:
            self._changed.wait_for(lambda: step in self._ready or self._error is not None)
            if step not in self._ready:
                assert self._error is not None
                raise self._error
            return self._ready.pop(step)

    def _settled(self) -> None:
        with self._changed:
            last = self._last(self._offered)
            self._changed.wait_for(lambda: self._next > last or self._error is not None)
            if self._next <= last:
                assert self._error is not None
                raise self._error

    def _with_then(self, step: int, supply: Supply) -> Supply:
        if supply.then is not None:
            return supply
        with self._backend.at(self._snapshots[self.version_of(step)]):
            return replace(supply, then=self._score(self._sample(supply)))

    def _sample(self, supply: Supply) -> list[Completion]:
        return sample_of(supply.collected, self._recipe.rollout.rescored)

    def _score(self, completions: Sequence[Completion]) -> list[Tensor]:
        """log pi of each, ``[T]`` on the CPU; every rank scores a share and gets all."""
        rows = [ungraded(c) for c in completions]
        mine: dict[int, Tensor] = {}
        plan = micro_batches([r.length for r in rows], self._recipe.optim.token_budget, world.size())
        for part in plan[world.rank()]:
            batch = collate([rows[i] for i in part], self._pad)
            with routed(self._routers, batch.experts if self._recipe.rollout.replay else None):
                logp = self._backend.logprobs(batch).cpu()
            mine |= {i: logp[place][batch.mask[place]].clone() for place, i in enumerate(part)}
        every = {i: logp for share in world.gather(mine) for i, logp in share.items()}
        return [every[i] for i in range(len(completions))]

    # --- on rank 0, in the thread

    def _run(self) -> None:
        try:
            while self._next <= self._recipe.steps:
                version = self.version_of(self._next)
                with self._changed:
                    self._changed.wait_for(lambda version=version: version in self._offers or self._closed)
                    if self._closed:
                        return
                supply = self._sampled(self._next, version, self._offers[version])
                with self._changed:
                    self._ready[self._next] = supply
                    self._next += 1
                    left = self.version_of(self._next) if self._next <= self._recipe.steps else self._recipe.steps
                    self._offers = {v: offer for v, offer in self._offers.items() if v >= left}
                    self._changed.notify_all()
        except BaseException as error:  # raised in the main thread, by `supply` or `settle`
            with self._changed:  # one that is no Exception would end this rank and leave the others waiting
                known = isinstance(error, Exception)
                self._error = error if known else RuntimeError(f"sampling ended with {type(error).__name__}: {error}")
                self._offers.clear()
                self._changed.notify_all()

    def _sampled(self, step: int, version: int, offer: _Offer) -> Supply:
        clock = Clock()
        pool, policy = self._pool, self._policy
        assert policy is not None
        if pool.version != version:  # an evaluation may have brought them already
            with clock("deliver"):
                pool.install(offer.staged, version)
                self._canary.judge(self._canary.ask(pool), offer.expected)
        collected = collect(policy, self._stream, self._recipe, step, clock)
        return Supply(collected, self._stream.position, collected.failures, clock.seconds)


def sample_of(collected: Collected, count: int) -> list[Completion]:
    """`count` of a step's responses, evenly over all that were sampled."""
    every = [r.completion for group in collected.sampled for r in group]
    count = min(count, len(every))
    return [every[i * len(every) // count] for i in range(count)]


def apart_and_drift(supply: Supply) -> tuple[Mismatch, Mismatch] | None:
    """(mismatch: pi then against mu; drift: pi now against pi then) of the small sample, if there is one."""
    if supply.then is None or supply.now is None:
        return None
    mu = [c.logp for c in sample_of(supply.collected, len(supply.then))]
    return _measure(supply.then, mu), _measure(supply.now, supply.then)


def _measure(pi: list[Tensor], mu: list[Tensor]) -> Mismatch:
    padded = [pad_sequence(list(values), batch_first=True) for values in (pi, mu, [torch.ones(len(p)) for p in pi])]
    return mismatch.measure(padded[0], padded[1], padded[2].bool())


def _plain(supply: Supply) -> dict[str, Any]:
    """A supply in values that `torch.load` reads without running code."""
    collected = supply.collected
    places = {id(group): i for i, group in enumerate(collected.sampled)}
    return {
        "sampled": [[asdict(r) for r in group] for group in collected.sampled],
        "kept": [places[id(group)] for group in collected.groups],
        "rounds": collected.rounds,
        "metrics": collected.metrics,
        "failures": dict(supply.failures),
        "position": supply.position,
        "seconds": supply.seconds,
        "then": supply.then,
    }


def _supply(plain: dict[str, Any]) -> Supply:
    sampled = [[_rollout(r) for r in group] for group in plain["sampled"]]
    groups = [sampled[i] for i in plain["kept"]]
    collected = Collected(groups, sampled, plain["rounds"], plain["metrics"])
    return Supply(collected, plain["position"], Counter(plain["failures"]), plain["seconds"], plain["then"])


def _rollout(plain: dict[str, Any]) -> Rollout:
    parts = {"problem": Problem(**plain["problem"]), "completion": Completion(**plain["completion"])}
    return Rollout(**{**plain, **parts})
