"""A pool of engines on a Ray cluster, as one `Engine`: `rollout.engine = "ray"`.

    with RayEngine(model, precision, recipe.rollout) as engine:       joins RAY_ADDRESS, or starts a local cluster
        engine.load_weights(precision.to_engine(backend.weights()), version=0)
        completions = engine.generate(prompts, sampling)

Every actor holds an engine of `rollout.ray.engine`'s kind and makes it from the model's outline. Prompts are handed out
in chunks as engines become free; a response depends on its seed, and, in its last bits, on what is computed together
with it, which is its chunk; never on who draws it, or when. Weights are put into Ray's object
store once, bucket by bucket, so each machine holds one copy that its engines read in place. `stage` and `install` are
the two halves of an update: several versions may be staged while an older one still samples. Of engines that compute
with an adapter apart (docs/lora.md) the frozen weights are staged once and stay in the store as the `Base` of every
later version, which is the adapter alone: an engine reads both when it is new, and then what is new. What happens when
an actor dies is in `ray_pool.py`, the cluster in `ray_cluster.py`, the actor's side in `ray_worker.py`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenbit.closing import Closing
from tenbit.engines import Engine, ray_cluster
from tenbit.engines import sampling as sampler
from tenbit.engines.ray_pool import Pool, Seat, Task, Weights
from tenbit.engines.ray_worker import BUCKET, Bucket, Order, Worker, pack
from tenbit.models.loading import Model, Outline
from tenbit.models.lora import is_adapter
from tenbit.precision import Precision
from tenbit.recipe import RolloutSpec
from tenbit.types import Completion, EngineFailed, Prompt, Sampling, Share

Tokens = tuple[Sequence[int], Sequence[int]]


class Actor(Worker):
    """The worker as Ray runs it: it knows its machine, and fetches buckets from the object store one by one."""

    def _hello(self) -> Any:
        return (importlib.import_module("ray").get_runtime_context().get_node_id(), *super()._hello())

    def _install(self, buckets: Iterable[Any], version: int, base: Iterable[Any] = ()) -> None:
        get = importlib.import_module("ray").get
        super()._install((get(ref) for ref in buckets), version, (get(ref) for ref in base))


@dataclass(frozen=True)
class Base:
    """Frozen weights in the object store, for as long as this value is held."""

    refs: list[Any]


@dataclass(frozen=True)
class Staged:
    """Weights in the object store, for as long as this value is held. `bytes` is what went in for them, once.

    Beside an adapter apart, `base` is what lies there since it was first sent; None: nothing does.
    """

    refs: list[Any]
    bytes: int
    base: Base | None = None


class RayEngine(Closing):
    """An `Engine` over a pool. Only one process of a run makes it. Raises ValueError where it cannot be had."""

    def __init__(
        self, model: Model, precision: Precision, rollout: RolloutSpec, seed: int = 0, longest: int | None = None
    ) -> None:
        self.version: int | None = None
        self.staged_bytes = 0  # of the last update
        self._spec = spec = rollout.ray
        self._closed = False
        try:
            ray_cluster.take_token()
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise ValueError(
                f"rollout.engine = 'ray': Ray cannot be imported here ({error}): pip install 'tenbit[ray]', or use "
                f"rollout.engine = {spec.engine!r}"
            ) from error
        if spec.engines is None and spec.cpus == 0 and not spec.gpus:
            raise ValueError("rollout.ray.engines: engines that need no CPU have room without end. Say how many")
        self._apart = model.adapter is not None and model.adapter.apart
        self._base: Base | None = None  # that further adapters go with
        once, each = (precision.sync.bytes * size for size in self._sizes(model))
        store = once + (2 + rollout.ahead) * each + 2 * BUCKET
        ray_cluster.join(self._ray, (spec.engines or 1) * spec.cpus, store)
        try:
            self._pool = self._filled(model, precision, rollout, seed, longest)
        except BaseException:
            ray_cluster.leave(self._ray)
            raise
        self._began_with = len(self._pool.seats)

    def _filled(self, model: Model, precision: Precision, rollout: RolloutSpec, seed: int, longest: int | None) -> Pool:
        spec, ray = self._spec, self._ray
        gpus = spec.gpus if spec.gpus is not None else _needed_gpus(rollout) * ray_cluster.has_gpus(ray)
        whole, free = ray_cluster.room(ray, spec.cpus, gpus) if spec.cpus or gpus else (spec.engines or 1, 1)
        if whole < (spec.engines or 1):
            raise ValueError(
                f"rollout.ray: the cluster ({_shown(ray.cluster_resources())}) has room for {whole} engines of "
                f"{spec.cpus:g} CPUs and {gpus:g} GPUs each, and {spec.engines or 'at least 1'} are wanted. Lower "
                "rollout.ray.engines, .cpus or .gpus, or add machines to the cluster"
            )
        ray_cluster.refuse_second(ray, spec.cpus, gpus)
        inner = rollout.model_copy(update={"engine": spec.engine, "ahead": 0})
        order = Order(Outline.of(model), precision, inner, seed, longest, spec.cpus, gpus > 0)
        cls = ray.remote(Actor)
        threads = {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(spec.cpus)))}}
        near = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy

        def make(node: str | None) -> Any:
            place = {} if node is None else {"scheduling_strategy": near(node, soft=True)}
            return cls.options(
                num_cpus=spec.cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, runtime_env=threads, **place
            ).remote()

        pool = Pool(ray, make, order, spec.restarts)
        try:
            pool.start(spec.engines or max(1, free), all_of_them=spec.engines is not None)
        except BaseException:
            pool.close()
            raise
        return pool

    # --- weights

    def _sizes(self, model: Model) -> tuple[int, int]:
        """Parameters that are staged once, and with every version; tied ones travel under each of their names."""
        named = [(name, p.numel()) for name, p in model.module.named_parameters(remove_duplicate=False)]
        once = sum(size for name, size in named if self._apart and not is_adapter(name))
        return once, sum(size for _, size in named) - once

    @property
    def wants(self) -> Share:
        """What `stage` takes next. After a failure that is everything again, whatever had failed."""
        if not self._apart:
            return "model"
        return "parts" if self._base is None else "trained"

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """`stage`, then `install`. The weights before are let go of first, so that two never fill the store."""
        self.version = None
        self._pool.forget()
        self.install(self.stage(named_tensors), version)

    def stage(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Staged:
        """Puts what it `wants` into the object store; any thread may, while the engines are at work."""
        try:
            if not self._apart:
                refs, self.staged_bytes = self._put_all(named_tensors)
                return Staged(refs, self.staged_bytes)
            adapter: list[tuple[str, Tensor]] = []
            frozen, once = self._put_all(_without_adapter(named_tensors, adapter))
            if frozen and self._base is not None:
                raise ValueError("frozen weights were sent once more: the pool has them, and takes the adapter alone")
            refs, each = self._put_all(adapter)
            if frozen:
                self._base = Base(frozen)
            self.staged_bytes = once + each
            return Staged(refs, self.staged_bytes, self._base)
        except BaseException:
            self._base = None
            raise

    def _put_all(self, named_tensors: Iterable[tuple[str, Tensor]]) -> tuple[list[Any], int]:
        refs, total = [], 0
        for bucket in pack(named_tensors):
            refs.append(self._put(bucket))
            total += bucket.bytes
        return refs, total

    def _put(self, bucket: Bucket) -> Any:
        try:
            return self._ray.put(bucket)
        except self._ray.exceptions.RayError as error:
            raise EngineFailed(
                f"the cluster's object store did not take {bucket.bytes:,} bytes of weights: {error}. Give Ray more "
                "(ray start --object-store-memory)"
            ) from error

    def install(self, staged: Staged, version: int) -> None:
        """Every engine takes the staged weights and proves it. Raises as `load_weights` of the engines does."""
        self.version = None
        try:
            if self._apart and staged.base is None:
                raise ValueError("the frozen weights are missing: an adapter alone is for engines that have them")
            self._pool.install(Weights(staged.refs, version, staged.base.refs if staged.base is not None else []))
        except BaseException:
            self._base = None
            raise
        self.version = version

    def rest(self) -> None:
        self._pool.each("rest")

    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        """What one of the engines says, as tensors without values."""
        (rows,) = self._pool.do([Task("live")])
        for part, name, dtype, shape in rows:
            yield part, name, torch.empty(shape, dtype=dtype, device="meta")

    # --- sampling

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in order, whoever drew it and whatever died meanwhile."""
        return self._divided("generate", prompts, sampling)

    def score(self, sequences: Sequence[Tokens], sampling: Sampling) -> list[Tensor]:
        return self._divided("score", sequences, sampling)

    def _divided(self, request: str, items: Sequence[Any], sampling: Sampling, seat: Seat | None = None) -> list[Any]:
        """In chunks of neighbours, which often share a prompt, and with it an engine's cache."""
        sampler.check(sampling)
        if self.version is None:
            raise ValueError("the engine has no weights yet, or its last load failed: call load_weights first.")
        # a quarter of what the pool began with: neither deaths nor speed change what is computed together
        even = math.ceil(len(items) / (4 * self._began_with))
        step = max(1, len(items) if seat is not None else self._spec.chunk or even)
        starts = range(0, len(items), step)
        tasks = [Task(request, (items[start : start + step], sampling, start), seat) for start in starts]
        return [value for values in self._pool.do(tasks) for value in values]

    # --- life and death

    def members(self) -> list[Engine]:
        """Each engine of the pool by itself."""
        return [_Member(self, seat) for seat in self._pool.seats]

    def close(self) -> None:
        """Ends the actors, and the cluster if it was started here. The engine cannot be used afterwards."""
        self.version = None
        if self._closed:
            return
        self._closed = True
        self._pool.close()
        ray_cluster.leave(self._ray)


class _Member(Closing):
    """One engine of a pool. Weights it takes only together with the others; the pool closes it."""

    def __init__(self, pool: RayEngine, seat: Seat) -> None:
        self._pool, self._seat = pool, seat

    @property
    def wants(self) -> Share:
        return self._pool.wants

    @property
    def version(self) -> int | None:
        return self._pool.version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return self._pool._divided("generate", prompts, sampling, self._seat)

    def score(self, sequences: Sequence[Tokens], sampling: Sampling) -> list[Tensor]:
        return self._pool._divided("score", sequences, sampling, self._seat)

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._pool.load_weights(named_tensors, version)

    def members(self) -> Sequence[Engine]:
        return [self]

    def rest(self) -> None:
        self._pool._pool.do([Task("rest", (), self._seat)])

    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        (rows,) = self._pool._pool.do([Task("live", (), self._seat)])
        for part, name, dtype, shape in rows:
            yield part, name, torch.empty(shape, dtype=dtype, device="meta")

    def close(self) -> None:
        """The pool does."""


def _without_adapter(
    named: Iterable[tuple[str, Tensor]], adapter: list[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The frozen weights; the adapter's factors, which are small and come in between, go into the list."""
    for name, tensor in named:
        if is_adapter(name):
            adapter.append((name, tensor))
        else:
            yield name, tensor


def _needed_gpus(rollout: RolloutSpec) -> float:
    if rollout.ray.engine != "vllm":
        return 1.0
    return float(rollout.vllm.parallel("tensor") * rollout.vllm.parallel("pipeline"))


def _shown(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(key, 0):g} {key}s" for key in ("CPU", "GPU"))
