"""Run by torchrun, for `test_lora_ray.py`: ranks train an adapter under FSDP2 and load it into a Ray pool of rank 0's.

torchrun ... ranks_of_lora_ray.py RECIPE OUT        the second of five loads fails; then the recipe is run
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import ranks
import ray
import torch
from common_training import fixed_rows, fresh_model, one_step
from rich.console import Console
from test_engine_ray import prompts, rows, spec
from torch import Tensor

from tenbit import Recipe, train, world
from tenbit.backends.choose import make_backend
from tenbit.batching import collate, ungraded
from tenbit.engines import ray_cluster
from tenbit.engines.choose import make_engine
from tenbit.engines.spread import spread
from tenbit.lora_spec import LoraSpec
from tenbit.models.lora import Adapter, is_adapter
from tenbit.precision import Precision
from tenbit.recipe import BackendSpec, OptimSpec
from tenbit.types import Overflow, Sampling

PLAN = Precision.parse("fp32")


def spoilt(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, torch.full_like(t, torch.inf) if is_adapter(name) else t) for name, t in named)


def main() -> None:
    adapter = Adapter(LoraSpec(rank=4, alpha=8, rollout="adapter"), 0, PLAN.compute)
    model = fresh_model("llama", adapter=adapter)
    wanted, raised, drawn, apart = [], [], [], 0.0
    if world.is_first():  # once, for both
        ray_cluster.join(ray, 4, 300 << 20)
    with spread(lambda: make_engine(spec(engines=1), model, PLAN), pool=True) as engine:
        backend = make_backend(model, PLAN, OptimSpec.model_validate({"lr": 1e-2}), 1.0, 9, BackendSpec(name="fsdp"))
        for version in range(5):
            wanted.append(engine.wants)
            named = PLAN.to_engine(backend.weights(PLAN.sync.dtype, wanted[-1]))
            try:
                engine.load_weights(spoilt(named) if version == 1 else named, version)
                raised.append("")
            except Overflow as error:
                raised.append(type(error).__name__)
                continue
            completions = engine.generate(prompts(4), Sampling(12))
            drawn += rows(completions)
            pi = backend.logprobs(collate([ungraded(c) for c in completions], 257))
            for own, c in zip(pi, completions, strict=True):
                apart = max(apart, float((own[: c.length] - c.logp).abs().max()))
            one_step(backend, fixed_rows(seed=version), 400)
    train(Recipe.load(sys.argv[1]), Path(sys.argv[2]), console=Console(file=io.StringIO()))
    if world.is_first():
        ray_cluster.leave(ray)
    ranks.report({"wanted": wanted, "raised": raised, "drawn": drawn, "apart": apart})


if __name__ == "__main__":
    torch.set_num_threads(1)
    with world.joined():
        main()
