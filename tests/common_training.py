"""A few gradient steps on fixed rows, for tests that train the same thing on different backends and ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from conftest import byte_tokenizer, small_module

from tenbit import algorithms, world
from tenbit.algorithms import ALGORITHMS
from tenbit.backends import Backend, StepStats
from tenbit.backends.choose import make_backend
from tenbit.batching import Row, collate, micro_batches, totals
from tenbit.lora_spec import LoraSpec
from tenbit.models.loading import Model
from tenbit.models.lora import Adapter
from tenbit.precision import Precision
from tenbit.recipe import BackendSpec, OptimSpec
from tenbit.types import Batch, Completion, Problem, Rollout, Stats, merge

UPDATES = 4


def fixed_rows(count: int = 11, seed: int = 0) -> list[Row]:
    """Random prompts and responses of different lengths, with advantages and plausible log-probabilities."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = tuple(chance.randrange(256) for _ in range(chance.randint(1, 9)))
        response = tuple(chance.randrange(256) for _ in range(chance.randint(1, 20)))
        logp = torch.tensor([chance.uniform(-7, -4) for _ in response])
        completion = Completion(prompt, response, logp, "length")
        rows.append(Row(Rollout(Problem("", "", ""), completion, "", 0.0, False, 0), chance.uniform(-1, 1)))
    return rows


def fresh_model(family: str = "qwen2", checkpointing: bool = False, device: str = "cpu",
                adapter: Adapter | None = None, **changes: Any) -> Model:  # fmt: skip
    """A small model on the CPU; on ranks other than the first it is on meta, as `loading.load` makes it."""
    module = small_module(family, **changes).train()
    if adapter is not None:
        adapter.inject(module)
        chance = torch.Generator().manual_seed(0)
        for name, p in module.named_parameters():
            if "lora_B" in name:  # zeros would leave A without a gradient
                p.data.normal_(std=0.05, generator=chance)
    if checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not world.is_first():
        module.to("meta")
        module.tie_weights()
    return Model(module, byte_tokenizer(), (256,), 257, 512, torch.device(device), adapter)


def fresh_backend(plan: Any = "fp32", family: str = "qwen2", checkpointing: bool = False, lr: float = 1e-3,
                  shape: dict[str, Any] | None = None, device: str = "cpu", lora: dict[str, Any] | None = None,
                  **spec: Any) -> Backend:  # fmt: skip
    # eps as large as gradients: AdamW's g / (|g| + eps) would otherwise magnify the rounding of tiny gradients
    optim = OptimSpec.model_validate({"lr": lr, "eps": 1e-3, "warmup": 2})
    precision = Precision.parse(plan)
    adapter = None if lora is None else Adapter(LoraSpec(**lora), 0, precision.compute)
    model = fresh_model(family, checkpointing, device, adapter, **(shape or {}))
    return make_backend(model, precision, optim, 1.0, UPDATES, BackendSpec.model_validate(spec))


def one_step(
    backend: Backend, rows: Sequence[Row], budget: int, algorithm: str = "grpo-token-tis",
    spoil: Callable[[int], bool] = lambda i: False,
) -> tuple[Stats, StepStats]:  # fmt: skip
    """One gradient step on this rank's share. `spoil(i)` makes the i-th micro-batch's loss infinite, on this rank."""
    plan = micro_batches([r.length for r in rows], budget, world.size())[world.rank()]
    batches = [collate([rows[i] for i in indices], 257) for indices in plan]
    total, how = totals(rows, 16), ALGORITHMS[algorithm]
    if how.needs_old:
        batches = [b.with_old(backend.logprobs(b).cpu()) for b in batches]
    stats = []
    for number, batch in enumerate(batches):

        def loss(logp: torch.Tensor, b: Batch, spoilt: bool = spoil(number)) -> tuple[torch.Tensor, Stats]:
            value, seen = algorithms.loss(how, logp, b, total)
            return (value * float("inf") if spoilt else value), seen

        stats.append(backend.accumulate(batch, loss))
    step = backend.step()
    return merge(world.gather(merge(stats))), step


def trajectory(
    backend: Backend, budget: int, updates: int = UPDATES, spoilt: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Loss and norm of each step, and the masters after the last. `spoilt`: (rank, step) of an infinite loss."""
    seen = []
    for i in range(updates):
        bad = spoilt == (world.rank(), i)
        seen.append(one_step(backend, fixed_rows(seed=i), budget, spoil=lambda number, bad=bad: bad and number == 0))
    return {
        "skipped": [step.skipped for _, step in seen],
        "loss": [stats["optim/loss"].total for stats, _ in seen],
        "entropy": [stats["policy/entropy"].mean for stats, _ in seen],
        "norm": [step.grad_norm for _, step in seen],
        "scale": [step.loss_scale for _, step in seen],
        "lr": [step.lr for _, step in seen],
        "weights": {name: t.clone() for name, t in backend.weights()},
    }
