"""The canary on the built-in engine: rounding passes, whatever is stale does not, however small the update was."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from tenbit.backends.single import SingleBackend
from tenbit.canary import Canary
from tenbit.engines.choose import make_engine
from tenbit.models import loading
from tenbit.precision import Precision
from tenbit.prompts import Asked
from tenbit.recipe import ModelSpec, OptimSpec, RolloutSpec
from tenbit.types import Problem, Sampling, Undelivered

CONTEXT = 320


@pytest.fixture
def sides(model_folder):
    """sides("fp16") -> (engine, backend, canary, plan) on one small model."""
    opened = []

    def make(precision="fp16", temperature=1.0, family="llama", longest=CONTEXT):
        model = loading.load(ModelSpec(path=str(model_folder(family))))
        plan = Precision.parse(precision)
        asked = [Asked(Problem("", "", ""), tuple(range(i, i + 20))) for i in range(0, 200, 20)]
        canary = Canary.of(asked, model, plan, Sampling(32, temperature), longest)
        engine = make_engine(RolloutSpec(max_tokens=32), model, plan)
        own = copy.deepcopy(model.module)
        backend = SingleBackend(
            loading.Model(own, model.tokenizer, model.stop_token_ids, model.pad_token_id, model.context, model.device),
            plan, OptimSpec(), temperature, 1,
        )  # fmt: skip
        opened.append(engine)
        return engine, backend, canary, plan

    yield make
    for engine in opened:
        engine.close()


def send(engine, backend, plan, version=0, only=lambda name: True):
    held = dict(engine._module.state_dict())
    named = ((n, t if only(n) else held[n]) for n, t in plan.to_engine(backend.weights()))
    engine.load_weights(list(named), version)


@torch.no_grad()
def move(backend, scale, seed=0):
    """An update that moves every weight by a share of its tensor's spread."""
    generator = torch.Generator().manual_seed(seed)
    for master in backend._masters.tensors.values():
        spread = float(master.std()) if master.numel() > 1 else 0.1
        master.add_(scale * spread * torch.randn(master.shape, generator=generator))
    backend._refresh_copy()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "bf16/fp16", "fp16/fp32"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rounding_passes_at_every_update_of_a_run(sides, precision, temperature):
    engine, backend, canary, plan = sides(precision, temperature)
    for version in range(12):
        send(engine, backend, plan, version)
        assert canary.prove(engine, backend) < canary.bound / 2
        move(backend, 0.05, seed=version)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_weights_of_another_update_are_caught(sides, precision):
    engine, backend, canary, plan = sides(precision)
    send(engine, backend, plan)
    canary.prove(engine, backend)
    move(backend, 0.3)
    with pytest.raises(Undelivered, match="canary"):
        canary.prove(engine, backend)


@pytest.mark.parametrize("scale", [0.1, 0.01, 0.002])
def test_an_update_far_smaller_than_the_bound_is_caught_by_its_movement(sides, scale):
    engine, backend, canary, plan = sides("fp16")
    send(engine, backend, plan)
    canary.prove(engine, backend)
    move(backend, scale)
    with pytest.raises(Undelivered, match="canary"):
        canary.prove(engine, backend)


@pytest.mark.parametrize("part", ["lm_head", "embed_tokens", "layers.1."])
def test_one_stale_part_is_caught(sides, part):
    engine, backend, canary, plan = sides("fp16")
    send(engine, backend, plan)
    canary.prove(engine, backend)
    move(backend, 0.05)
    send(engine, backend, plan, 1, only=lambda name: part not in name)
    with pytest.raises(Undelivered, match="canary"):
        canary.prove(engine, backend)


def test_log_probabilities_that_are_not_numbers_are_caught(sides, monkeypatch):
    engine, backend, canary, plan = sides("fp32")
    send(engine, backend, plan)
    score = engine.score

    def broken(sequences, sampling):
        out = score(sequences, sampling)
        return [out[0], out[1].clone().index_fill_(0, torch.tensor([5]), math.nan), *out[2:]]

    monkeypatch.setattr(engine, "score", broken)
    with pytest.raises(Undelivered, match="canary of 47 tokens"):
        canary.prove(engine, backend)


def test_another_temperature_is_caught(sides):
    engine, backend, canary, plan = sides("fp16", 1.0)
    send(engine, backend, plan)
    cooler = replace(canary, sampling=Sampling(2, 0.8))
    with pytest.raises(Undelivered, match="canary"):
        cooler.prove(engine, backend)


@pytest.mark.parametrize("longest", [2, 3, 4, 5, 12])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_it_fits_engines_with_little_room(sides, precision, longest):
    engine, backend, canary, plan = sides(precision, longest=longest)
    assert max(len(p) + len(r) for p, r in canary.sequences) <= longest
    assert len(canary.prompt) + canary.sampling.max_tokens <= longest
    for version in range(8):  # so few tokens may agree by luck at first
        send(engine, backend, plan, version)
        assert canary.prove(engine, backend) < canary.bound
        move(backend, 0.05, seed=version)


@pytest.mark.parametrize("precision", ["fp32/bf16", "fp16/bf16", "fp32/fp16"])
def test_updates_that_round_away_on_one_side_are_not_called_stale(sides, precision):
    """Weights that lie on the rollout format's grid, as a published 16-bit model's do, and then move by a little."""
    engine, backend, canary, plan = sides(precision)
    with torch.no_grad():
        for master in backend._masters.tensors.values():
            master.copy_(master.to(plan.rollout.dtype))
        backend._refresh_copy()
    generator = torch.Generator().manual_seed(0)
    for version in range(4):
        send(engine, backend, plan, version)
        canary.prove(engine, backend)
        with torch.no_grad():
            for master in backend._masters.tensors.values():
                master.add_(1e-5 * torch.randn(master.shape, generator=generator).sign())
            backend._refresh_copy()


def test_sequences_are_longer_than_any_cache_block(sides):
    _, _, canary, _ = sides()
    assert max(len(p) + len(r) for p, r in canary.sequences) > 128
