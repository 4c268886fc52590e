"""LoRA on many ranks: FSDP2 and each stage of ZeRO train the adapter that one process trains, and leave the base be."""

from __future__ import annotations

import json

import pytest
import torch
from common_training import fresh_backend, trajectory
from ranks import on_ranks
from ranks_of_lora import LORA

FP32_BOUND, FP16_BOUND = 1e-5, 5e-3  # as for whole models (test_backend_fsdp.py)
FSDP = [
    {"name": "fsdp", "plan": "fp32"},
    {"name": "fsdp", "plan": "fp16", "checkpointing": True, "family": "llama"},
]
STAGES = ((1, "fp16"), (2, "fp16"), (3, "fp16"), (3, "fp32"))
ZERO = [{"name": "deepspeed", "stage": stage, "plan": plan} for stage, plan in STAGES]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """launched(ways) -> {way as text: one result per rank}; each list is launched once, on two ranks."""
    done: dict[str, dict[str, list[dict]]] = {}

    def run(ways: list[dict]) -> dict[str, list[dict]]:
        key = ways[0]["name"]
        if key not in done:
            texts = [json.dumps(how) for how in ways]
            found = on_ranks(2, "ranks_of_lora.py", *texts, folder=tmp_path_factory.mktemp("lora"))
            done[key] = {text: [rank[text] for rank in found] for text in texts}
        return done[key]

    return run


@pytest.fixture(scope="module")
def alone():
    known = {}

    def run(plan: str, family: str = "qwen2") -> dict:
        if (plan, family) not in known:
            backend = fresh_backend(plan, family, lora=LORA)
            known[plan, family] = trajectory(backend, 64)
            known[plan, family]["parts"] = {n: t.clone() for n, t in backend.weights(None, "parts")}
        return known[plan, family]

    return run


CASES = [pytest.param(FSDP, how, marks=pytest.mark.slow, id=json.dumps(how)) for how in FSDP]
CASES += [pytest.param(ZERO, how, marks=pytest.mark.scaling, id=json.dumps(how)) for how in ZERO]


@pytest.mark.parametrize(("ways", "how"), CASES)
def test_two_ranks_train_the_same_adapter(launched, alone, ways, how):
    want = alone(how["plan"], how.get("family", "qwen2"))
    bound = FP32_BOUND if how["plan"] == "fp32" else FP16_BOUND
    for got in launched(ways)[json.dumps(how)]:
        assert not any(got["skipped"])
        for key in ("loss", "norm"):
            assert got[key] == pytest.approx(want[key], rel=bound)
        for share in ("parts", "weights"):
            assert got[share].keys() == want[share].keys()
            for name, tensor in want[share].items():
                off = float((got[share][name].double() - tensor.double()).norm())
                assert off <= bound * float(tensor.double().norm()), name


@pytest.mark.parametrize(("ways", "how"), CASES)
def test_pitfall_25_the_base_is_never_written(launched, ways, how):
    for got in launched(ways)[json.dumps(how)]:
        moved = [n for n, t in got["parts"].items() if not torch.equal(t, got["before"][n])]
        assert sorted(moved) == sorted(got["trained"])
        assert all(".lora_" in name for name in moved)


@pytest.mark.parametrize(("ways", "how"), CASES)
def test_a_checkpoint_is_the_adapter_alone_and_comes_back(launched, ways, how):
    for got in launched(ways)[json.dumps(how)]:
        assert got["state"] == sorted(f"{k}.{n}" for k in ("master", "exp_avg", "exp_avg_sq") for n in got["trained"])
        assert got["comes back"]
        assert got["seen"]["copy"] >= len(got["parts"]) - 1  # frozen ones, too; a tied one once
