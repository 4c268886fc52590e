"""LoRA's mismatch: all weights trained, adapters merged afresh, adapters in the engine; and what other merges would do.

    python benchmarks/lora.py [--sequences N] [--engines torch,vllm]

The built-in model with an adapter of rank 32 on every linear layer, whose product is 2% of each weight's norm. All ways
train the same policy: "full" has the adapter merged into FP32 masters. The engine samples `--sequences` responses of
exactly 256 tokens at temperature 1, in each format from the same prompts and seeds; the single backend scores them.

The second part leaves the trainer as it is and gives the built-in engine weights that were merged in other ways:

    afresh       as tenbit does: the base of the trainer, in FP32, rounded once
    original     from the FP32 base that was loaded, which the trainer rounded to 16 bits
    cycles N     merged into the 16-bit base and subtracted again N times, another adapter each time, as in training;
                 then merged with the present one

Writes results/lora.json.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from common import write
from torch import Tensor

from tenbit.engines.choose import make_engine
from tenbit.lora_spec import LoraSpec
from tenbit.models import loading
from tenbit.models.loading import Model
from tenbit.models.lora import Adapter, is_adapter
from tenbit.precision import Precision
from tenbit.prompts import ask
from tenbit.recipe import Recipe
from tenbit.scoring import measured, sample, score
from tenbit.types import Prompt

FORMATS = ("fp16", "bf16")
WAYS = ("full", "merged", "adapter")
SHARE, LENGTH = 0.02, 256
CYCLES = (1, 10, 100, 1000)
KEYS = ("kl_k3", "logp_abs_mean", "logp_abs_max", "seq_logratio_std")


def trained(recipe: Recipe, precision: Precision, rollout: str, seed: int = 0) -> Model:
    """The built-in model with an adapter that is `SHARE` of each weight, and no stop tokens."""
    spec = LoraSpec.model_validate({"rollout": rollout})
    model = loading.load(recipe.model, adapter=Adapter(spec, 0, precision.compute))
    fill(model.module, spec.scaling, seed)
    return replace(model, stop_token_ids=())


@torch.no_grad()
def fill(module: Any, scaling: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if hasattr(layer, "base_layer"):
            a, b, w = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
            b.normal_(generator=generator)
            b.mul_(SHARE * w.norm() / (scaling * (b @ a).norm()))


def full(model: Model) -> Model:
    """The same policy as FP32 weights that are all trained."""
    bare = copy.deepcopy(model.module.config)
    module = type(model.module)(bare)
    module.load_state_dict(dict(model.weights("model")))
    return replace(model, module=module.train(), adapter=None)


def mismatch(recipe: Recipe, model: Model, precision: Precision, prompts: list[Prompt]) -> dict[str, float]:
    seen = measured(score(recipe, model, precision, sample(recipe, model, precision, prompts)))
    return {key: seen.metrics()[key] for key in KEYS}


def ways(recipe: Recipe, prompts: list[Prompt], engines: list[str]) -> list[dict[str, Any]]:
    rows = []
    for engine in engines:
        for name in FORMATS:
            for way in WAYS:
                precision = Precision.parse(name)
                model = trained(recipe, precision, "merged" if way == "full" else way)
                rollout = recipe.rollout.model_copy(update={"engine": engine})
                own = recipe.model_copy(update={"rollout": rollout})
                found = mismatch(own, full(model) if way == "full" else model, precision, prompts)
                rows.append({"engine": engine, "precision": name, "way": way, **found})
                kl, mean, std = (f"{found[key]:.3e}" for key in ("kl_k3", "logp_abs_mean", "seq_logratio_std"))
                print(f"{engine:6} {name} {way:8} KL k3 {kl}  mean |l| {mean}  std of sequences {std}", flush=True)
    return rows


def layers(module: Any) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name of the weight, base, A, B) of every layer with an adapter."""
    for name, layer in module.named_modules():
        if hasattr(layer, "base_layer"):
            yield (
                f"{name}.weight",
                layer.base_layer.weight,
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
            )


@torch.no_grad()
def cycled(model: Model, precision: Precision, count: int) -> tuple[dict[str, Tensor], float]:
    """Weights after `count` merges and as many unmerges in 16 bits, and how far the base has moved, relative."""
    assert model.adapter is not None
    form, scaling = precision.rollout.dtype, model.adapter.spec.scaling
    out = dict(model.weights("model"))
    generator = torch.Generator().manual_seed(1)
    moved = norm = 0.0
    for name, base, a, b in layers(model.module):
        held = base.to(form)
        for i in range(count):
            then = b * (i + 1) / count + 0.1 * b.std() * torch.randn(b.shape, generator=generator)
            delta = (then @ a * scaling).to(form)
            held = held + delta
            held = held - delta
        moved += float((held.float() - base).square().sum())
        norm += float(base.square().sum())
        out[name] = held + (b @ a * scaling).to(form)
    return out, (moved / norm) ** 0.5


def merges(recipe: Recipe, prompts: list[Prompt]) -> list[dict[str, Any]]:
    rows = []
    original = dict(loading.load(recipe.model).module.named_parameters())
    for name in FORMATS:
        precision = Precision.parse(name)
        model = trained(recipe, precision, "merged")
        assert model.adapter is not None
        scaling = model.adapter.spec.scaling

        def afresh(model: Model = model) -> tuple[dict[str, Tensor], float]:
            return dict(model.weights("model")), 0.0

        @torch.no_grad()
        def from_original(model: Model = model, scaling: float = scaling) -> tuple[dict[str, Tensor], float]:
            out = {n: t.detach() for n, t in original.items()}
            off = sum(float((original[n] - w).square().sum()) for n, w, _, _ in layers(model.module))
            size = sum(float(w.square().sum()) for _, w, _, _ in layers(model.module))
            return out | {n: original[n] + b @ a * scaling for n, _, a, b in layers(model.module)}, (off / size) ** 0.5

        cases: dict[str, Callable[[], tuple[dict[str, Tensor], float]]] = {"afresh": afresh, "original": from_original}
        for count in CYCLES:
            cases[f"cycles {count}"] = lambda model=model, precision=precision, count=count: cycled(
                model, precision, count
            )
        for what, make in cases.items():
            weights, moved = make()
            found = given(recipe, model, precision, prompts, weights)
            rows.append({"precision": name, "merge": what, "base_moved": moved, **found})
            print(f"{name} {what:12} base moved {moved:.2e}  KL k3 {found['kl_k3']:.3e}", flush=True)
    return rows


def given(
    recipe: Recipe, model: Model, precision: Precision, prompts: list[Prompt], weights: dict[str, Tensor]
) -> dict[str, float]:
    """The mismatch of the trainer's adapter and an engine that was given these weights."""
    with make_engine(recipe.rollout, model, precision, longest=model.context) as engine:
        engine.load_weights(precision.to_engine(weights.items()), version=0)
        drawn = engine.generate(prompts, recipe.sampling(()))
    seen = measured(score(recipe, model, precision, drawn))
    return {key: seen.metrics()[key] for key in KEYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--engines", default="torch,vllm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe.of({"steps": 1, "rollout": {"max_tokens": LENGTH}})
    model = loading.load(recipe.model)
    asked = ask(recipe.task.data, recipe, model, LENGTH, None)[: options.sequences]
    prompts = [Prompt(a.ids, seed=i) for i, a in enumerate(asked)]
    named = trained(recipe, recipe.precision, "merged").module.named_parameters()
    size = sum(p.numel() for name, p in named if is_adapter(name))
    rows = ways(recipe, prompts, options.engines.split(","))
    table = {f"{r['engine']} {r['precision']} {r['way']}": r["kl_k3"] for r in rows}
    ratios = {
        f"{e} {way}": table[f"{e} bf16 {way}"] / table[f"{e} fp16 {way}"]
        for e in options.engines.split(",")
        for way in WAYS
    }
    print("BF16's KL over FP16's:", {k: round(v, 1) for k, v in ratios.items()})
    result = {"sequences": len(prompts), "tokens": LENGTH * len(prompts), "adapter_parameters": size, "share": SHARE,
              "ways": rows, "bf16_over_fp16": ratios, "merges": merges(recipe, prompts)}  # fmt: skip
    print(write("lora", {"command": "python benchmarks/lora.py", **result}))


if __name__ == "__main__":
    main()
