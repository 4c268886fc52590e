"""`tenbit plan RECIPE --gpus N --memory GB`: what fits, before a cluster is asked for it.

    plan = make_plan(Recipe.load("recipes/dense_14b.toml"), "recipes/dense_14b.toml", Machine(gpus=64, memory=80))
    plan.outcomes       every way of training with every way of sampling: bytes per GPU, item by item, and a verdict
    plan.chosen         the recipe's own way if it fits with a tenth to spare, else the simplest way that does

Simplest means: the fewest departures from the recipe, where what costs speed (offload above all, a pool of GPUs that
wait in turn, computing activations twice) counts more. GB are of 2^30 bytes, as on a GPU's label.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from tenbit.models.lora import Adapter
from tenbit.recipe import Recipe
from tenbit.studies import plan_memory as memory
from tenbit.studies.plan_memory import CONTEXT, GIB, Part, Sampler, Trainer
from tenbit.studies.plan_model import Shape, Use, find_config, measure

HEADROOM = 0.1  # of the GPU's memory: fragmentation, and what the estimates miss
FEW = 8  # full-length sequences in one engine's cache, below which sampling waits for memory
PROMPT = 2048  # tokens of the longest prompt, where nothing says otherwise (Table 3)


@dataclass(frozen=True)
class Machine:
    """`memory` of one GPU in GB of 2^30 bytes."""

    gpus: int
    memory: float
    per_node: int = 8

    def __post_init__(self) -> None:
        for option, value in (("--gpus", self.gpus), ("--memory", self.memory), ("--gpus-per-node", self.per_node)):
            if value <= 0:
                raise ValueError(f"{option} {value:g}: give a positive number")
        if not (math.isfinite(self.memory) and self.memory > 0):
            raise ValueError(f"--memory {self.memory:g}: give the GB of one GPU, such as 80")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(
                f"--gpus {self.gpus} are not whole nodes of {self.per_node}. Give a multiple, or set --gpus-per-node"
            )

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.per_node)

    @property
    def bytes(self) -> int:
        return int(self.memory * GIB)


@dataclass(frozen=True)
class Outcome:
    """One way of training with one way of sampling. Lists of parts are of one GPU; `host` is of the first node."""

    trainer: Trainer
    sampler: Sampler
    ranks: int
    limit: int
    train: list[Part]
    update: list[Part]
    sample: list[Part]
    host: list[Part]
    engines: int
    share: float | None
    sequences: int
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(memory.total(parts) for parts in (self.train, self.update, self.sample))

    @property
    def spare(self) -> int:
        return self.limit - self.peak

    @property
    def fits(self) -> bool:
        return self.spare >= 0 and self.sequences > 0

    @property
    def comfortable(self) -> bool:
        return self.fits and self.spare >= HEADROOM * self.limit

    @property
    def verdict(self) -> str:
        if self.spare < 0:
            moments = {"training": self.train, "the weight update": self.update, "sampling": self.sample}
            worst = max(moments, key=lambda name: memory.total(moments[name]))
            return f"does not fit by {-self.spare / GIB:.1f} GB ({worst})"
        if not self.sequences:
            return "does not fit: the cache has no room for one sequence of full length"
        tight = "" if self.comfortable else ", tight"
        return f"fits, {self.spare / GIB:.1f} GB to spare{tight}"


@dataclass(frozen=True)
class Plan:
    """What `tenbit plan` found. `asked` is the recipe's own way."""

    recipe: Recipe
    source: str
    model: str
    machine: Machine
    shape: Shape
    longest: int
    uses: dict[bool, Use]
    asked: Outcome
    outcomes: list[Outcome]

    @property
    def chosen(self) -> Outcome | None:
        if self.asked.comfortable:
            return self.asked
        good = [o for o in self.outcomes if o.comfortable]
        if good:
            return min(good, key=lambda o: (_cost(o, self.asked), -o.spare))
        return max((o for o in self.outcomes if o.fits), key=lambda o: o.spare, default=None)

    def micro_batches(self, length: int) -> int:
        """On each rank in one gradient step, if every sequence has this length."""
        rows = self.recipe.rollout.prompts * self.recipe.rollout.samples / self.recipe.optim.updates
        together = max(1, self.recipe.optim.token_budget // length)
        return max(1, math.ceil(rows / together / (self.chosen or self.asked).ranks))


def make_plan(recipe: Recipe, source: str, machine: Machine, prompt: int = PROMPT) -> Plan:
    """Raises ValueError, with the key and the remedy, for what cannot be planned."""
    config, model = find_config(recipe.model.path)
    adapter = Adapter.of(recipe)
    shape = Shape.of(config, adapter)
    room = shape.context - recipe.rollout.max_tokens
    if room < 1:
        raise ValueError(
            f"rollout.max_tokens = {recipe.rollout.max_tokens} leaves no room for a prompt in the model's context of "
            f"{shape.context} tokens. Lower it"
        )
    if prompt < 1:
        raise ValueError(f"--prompt-tokens {prompt}: a prompt has at least one token")
    longest = min(prompt, room) + recipe.rollout.max_tokens
    trainer, sampler = _asked_trainer(recipe, machine), _asked_sampler(recipe, machine, shape)
    tokens = max(recipe.optim.token_budget, longest)
    uses = {on: measure(config, recipe.precision, recipe.model, tokens, on, adapter) for on in (False, True)}
    bare = _Ground(recipe, machine, shape, longest, uses)
    asked = bare.outcome(trainer, sampler, settled=True)
    outcomes = [bare.outcome(t, s) for s in _samplers(recipe, machine, shape) for t in _trainers(recipe, machine)]
    return Plan(recipe, source, model, machine, shape, longest, uses, asked, outcomes)


def _asked_trainer(recipe: Recipe, machine: Machine) -> Trainer:
    spec, again = recipe.backend, recipe.model.gradient_checkpointing
    name = spec.name if spec.name != "auto" else "single" if machine.gpus == 1 else "fsdp"
    if name == "single":
        if machine.gpus > 1:
            raise ValueError(
                f"backend.name = 'single' trains on one GPU, and --gpus is {machine.gpus}. Remove the key, or plan "
                "with --gpus 1"
            )
        return Trainer("single", checkpointing=again)
    if name == "fsdp":
        return Trainer("fsdp", reshard=spec.reshard, offload=spec.offload, checkpointing=again)
    recipe.precision.deepspeed()  # raises for a plan that it cannot follow
    return Trainer("deepspeed", stage=spec.stage, offload=spec.offload, checkpointing=again)


def _asked_sampler(recipe: Recipe, machine: Machine, shape: Shape) -> Sampler:
    rollout = recipe.rollout
    tensor, node = rollout.vllm.options.get("tensor_parallel_size", 1), min(machine.gpus, machine.per_node)
    heads = shape.config.get_text_config().num_attention_heads
    if not isinstance(tensor, int) or tensor < 1 or node % tensor or heads % tensor:
        raise ValueError(
            f"rollout.vllm.options.tensor_parallel_size = {tensor!r} must be a whole number that divides the model's "
            f"{heads} attention heads and the {node} GPUs of a node. Correct it"
        )
    if rollout.engine != "ray":
        return Sampler(rollout.engine, tensor if rollout.engine == "vllm" else 1)
    tensor = tensor if rollout.ray.engine == "vllm" else 1
    pool = rollout.ray.engines * tensor if rollout.ray.engines else _pools(machine)[-1:] or [0]
    pool = pool if isinstance(pool, int) else pool[0]
    if not 0 < pool < machine.gpus:
        raise ValueError(
            f"rollout.engine = 'ray': a pool of {max(pool, tensor)} GPUs leaves none of --gpus {machine.gpus} to train "
            "on. Lower rollout.ray.engines, or set rollout.engine = 'vllm' to sample on the training GPUs"
        )
    if machine.nodes > 1 and pool % machine.per_node:
        raise ValueError(
            f"rollout.ray.engines: a pool of {pool} GPUs is not whole nodes of {machine.per_node}, and torchrun starts "
            "as many ranks on every node. Make it a multiple"
        )
    return Sampler(rollout.ray.engine, tensor, pool)


def _trainers(recipe: Recipe, machine: Machine) -> Iterator[Trainer]:
    many = machine.gpus > 1
    stages = () if recipe.precision.casting == "autocast" else (1, 2, 3)  # DeepSpeed knows no autocast of ours
    for again in (False, True):
        if not many:
            yield Trainer("single", checkpointing=again)
        for offload in (False, True) if many else (True,):
            yield Trainer("fsdp", offload=offload, checkpointing=again)
            if not offload:
                yield Trainer("fsdp", reshard=False, checkpointing=again)
            for stage in stages:
                yield Trainer("deepspeed", stage=stage, offload=offload, checkpointing=again)


def _pools(machine: Machine) -> list[int]:
    """GPUs that a pool could have: a quarter or half of the nodes, or half of one node."""
    if machine.nodes == 1:
        return [machine.gpus // 2] if machine.gpus > 1 else []
    quarters = {machine.nodes // 4, machine.nodes // 2}
    return sorted(n * machine.per_node for n in quarters if n)


def _samplers(recipe: Recipe, machine: Machine, shape: Shape) -> Iterator[Sampler]:
    rollout = recipe.rollout
    if rollout.kind == "torch":
        yield Sampler("torch")
    heads = shape.config.get_text_config().num_attention_heads
    apart = recipe.lora is not None and recipe.lora.rollout == "adapter"  # which one GPU has to hold whole
    most = 1 if apart else min(machine.gpus, machine.per_node)
    sizes = [t for t in (1, 2, 4, 8) if most % t == 0 and heads % t == 0]
    for size in sizes:
        yield Sampler("vllm", size)
    for pool in _pools(machine):
        yield from (Sampler("vllm", size, pool) for size in sizes if pool % size == 0)


@dataclass(frozen=True)
class _Ground:
    """What all outcomes share."""

    recipe: Recipe
    machine: Machine
    shape: Shape
    longest: int
    uses: dict[bool, Use]

    def outcome(self, trainer: Trainer, sampler: Sampler, settled: bool = False) -> Outcome:
        """`settled`: the engine's share of the GPU is what the recipe says; else what is left for it."""
        shape, plan, limit = self.shape, self.recipe.precision, self.machine.bytes
        ranks = 1 if trainer.backend == "single" else self.machine.gpus - sampler.pool
        held = memory.resident(shape, plan, trainer, ranks)
        train = memory.training(shape, plan, trainer, ranks, self.uses[trainer.checkpointing])
        here = not sampler.pool
        update = memory.update(shape, plan, held, sampler, here)
        beside = (memory.total(held) if here else 0) + CONTEXT
        share, engine = self._engine(sampler, beside, settled)
        cache = engine[-1].bytes
        sample = [*(held if here else []), *engine, Part("CUDA, NCCL", CONTEXT, False)]
        if here:
            train = [*train, *self._resting(sampler, engine)]
        keys = trainer.keys() | sampler.keys()
        if share is not None and self.recipe.rollout.vllm.cache_gib is None:
            keys["rollout.vllm.memory"] = f"{share:g}"
        return Outcome(
            trainer=trainer,
            sampler=sampler,
            ranks=ranks,
            limit=limit,
            train=train,
            update=update,
            sample=sample,
            host=memory.host(shape, self.recipe, trainer, sampler, ranks, self.machine.per_node),
            engines=(sampler.pool or ranks) // sampler.tensor,
            share=share,
            sequences=max(0, cache) // (memory.cache_per_token(shape, plan, sampler) * self.longest),
            keys=keys,
        )

    def _engine(self, sampler: Sampler, beside: int, settled: bool) -> tuple[float | None, list[Part]]:
        """(share of the GPU, the engine's weights, its working memory, its cache) beside what training holds."""
        plan, limit, spec = self.recipe.precision, self.machine.bytes, self.recipe.rollout.vllm
        weights = memory.engine_weights(self.shape, plan, sampler)
        work = memory.engine_work(self.shape, sampler, self.recipe)
        if sampler.engine == "torch":
            token = memory.cache_per_token(self.shape, plan, sampler)
            rows = self.recipe.rollout.max_batch
            return None, [weights, work, Part("cache", rows * token * self.longest)]
        if spec.cache_gib is not None:
            return spec.memory, [weights, work, Part("cache", int(spec.cache_gib * GIB))]
        share = spec.memory
        if not settled:  # in twentieths, with the headroom left free
            share = max(0.05, min(0.9, math.floor(20 * ((1 - HEADROOM) - beside / limit)) / 20))
        return share, [weights, work, Part("cache", max(0, int(share * limit) - weights.bytes - work.bytes))]

    def _resting(self, sampler: Sampler, engine: list[Part]) -> list[Part]:
        """What the engine holds while training goes on."""
        if sampler.engine == "torch":
            return [engine[0]]
        if self.recipe.rollout.vllm.sleep:
            return [Part("engine, asleep", GIB, False)]
        return [replace(part, name=f"{part.name}, awake") for part in engine]


def _cost(outcome: Outcome, asked: Outcome) -> float:
    """How far a way is from the recipe's, and how slow."""
    t, s, was = outcome.trainer, outcome.sampler, asked.trainer
    changed = (
        2 * (t.backend != was.backend)
        + (t.backend == was.backend == "deepspeed" and t.stage != was.stage)
        + (t.backend == was.backend == "fsdp" and t.reshard != was.reshard)
        + 2 * (t.checkpointing and not was.checkpointing)
        + (was.checkpointing and not t.checkpointing)
        + 2 * (s.engine != asked.sampler.engine)
        + abs(math.log2(s.tensor / asked.sampler.tensor))
        + 3 * (bool(s.pool) != bool(asked.sampler.pool))
    )
    slow = 8 * t.offload + 2 * (outcome.sequences < FEW) + 0.5 * (not t.reshard)
    return float(changed + slow)


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, in bytes."""
    shape = {k: v for k, v in vars(plan.shape).items() if k != "config"}
    return {
        "recipe": plan.source,
        "model": plan.model,
        "gpus": plan.machine.gpus,
        "gpus_per_node": plan.machine.per_node,
        "memory": plan.machine.bytes,
        "shape": shape,
        "longest_sequence": plan.longest,
        "micro_batch_tokens": plan.uses[False].tokens,
        "micro_batches_per_update": plan.micro_batches(plan.longest),
        "checkpoint": memory.checkpoint_bytes(plan.shape),
        "export": plan.recipe.precision.export.bytes * plan.shape.parameters,
        "as_the_recipe_says": _outcome_json(plan.asked),
        "recommended": _outcome_json(plan.chosen) if plan.chosen else None,
        "outcomes": [_outcome_json(outcome) for outcome in plan.outcomes],
    }


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    moments = {"training": outcome.train, "update": outcome.update, "sampling": outcome.sample, "host": outcome.host}
    return {
        "training": outcome.trainer.label,
        "gradient_checkpointing": outcome.trainer.checkpointing,
        "sampling": outcome.sampler.label,
        "ranks": outcome.ranks,
        "engines": outcome.engines,
        "sequences_per_engine": outcome.sequences,
        "fits": outcome.fits,
        "comfortable": outcome.comfortable,
        "verdict": outcome.verdict,
        "peak": outcome.peak,
        "parts": {name: [vars(part) for part in parts] for name, parts in moments.items()},
        "keys": outcome.keys,
    }
