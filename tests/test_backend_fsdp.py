"""FSDP2 against the single process: the same losses, norms and parameters on any number of ranks, however sharded."""

from __future__ import annotations

import json

import pytest
import torch
from common_training import UPDATES, fresh_backend, trajectory
from ranks import on_ranks

from tenbit.backends.choose import backend_name
from tenbit.recipe import BackendSpec

# after four steps, relative. FP16: another cut into micro-batches rounds 16-bit gradients in another order
FP32_BOUND, FP16_BOUND = 1e-5, 5e-3

PLAIN = {"plan": "fp32", "name": "fsdp"}
AUTOCAST = {"preset": "fp16", "casting": "autocast"}
ON_TWO = {
    "fp32": PLAIN,
    "fp32, small micro-batches": PLAIN | {"budget": 20},
    "fp32, offloaded": PLAIN | {"offload": True},
    "fp32, kept gathered": PLAIN | {"reshard": False},
    "fp32, recomputed": PLAIN | {"checkpointing": True},
    "fp32, untied": PLAIN | {"family": "llama"},
    "fp32, norms per head": PLAIN | {"family": "qwen3"},
    "fp16": PLAIN | {"plan": "fp16"},
    "fp16, small micro-batches": PLAIN | {"plan": "fp16", "budget": 20},
    "fp16, autocast": PLAIN | {"plan": AUTOCAST},
    "fp16, reduced in fp16": PLAIN | {"plan": {"preset": "fp16", "reduce": "fp16"}},
    "bf16": PLAIN | {"plan": "bf16"},
    "fp16, inf on rank 1": PLAIN | {"plan": "fp16", "spoilt": [1, 1]},
    "bf16, inf on rank 0": PLAIN | {"plan": "bf16", "spoilt": [0, 2]},
}
ON_ONE = {key: ON_TWO[key] for key in ("fp32", "fp16")}
ON_THREE = {key: ON_TWO[key] for key in ("fp32", "fp32, small micro-batches", "fp16")} | {
    "fp16, inf on rank 2": PLAIN | {"plan": "fp16", "spoilt": [2, 0]}
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(ranks) -> {what: one result per rank}, each number of ranks launched once."""
    done: dict[int, dict[str, list[dict]]] = {}

    def run(size: int) -> dict[str, list[dict]]:
        if size not in done:
            cases = {1: ON_ONE, 2: ON_TWO, 3: ON_THREE}[size]
            texts = {what: json.dumps(how) for what, how in cases.items()}
            found = on_ranks(size, "ranks_of_backends.py", *texts.values(), folder=tmp_path_factory.mktemp("ranks"))
            done[size] = {what: [rank[text] for rank in found] for what, text in texts.items()}
        return done[size]

    return run


@pytest.fixture(scope="module")
def alone():
    """The same steps in one process."""
    known = {}

    def run(how: dict) -> dict:
        key = json.dumps([how["plan"], how.get("family", "qwen2")])
        if key not in known:
            known[key] = trajectory(fresh_backend(plan=how["plan"], family=how.get("family", "qwen2")), 64)
        return known[key]

    return run


def far(got: list[float], want: list[float]) -> float:
    return max(abs(g - w) / abs(w) for g, w in zip(got, want, strict=True))


def weights_far(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(float((got[n] - want[n]).double().norm() / want[n].double().norm()) for n in want)


CASES = [(size, what) for size, cases in ((1, ON_ONE), (2, ON_TWO), (3, ON_THREE)) for what in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "what"), [c for c in CASES if "inf" not in c[1]])
def test_pitfall_27_any_number_of_ranks_gives_the_same_steps(runs, alone, size, what):
    """Loss, norm, learning rate and parameters of four steps; at different cuts, with the same count on each rank."""
    how = {1: ON_ONE, 2: ON_TWO, 3: ON_THREE}[size][what]
    got, want = runs(size)[what], alone(how)
    bound = FP32_BOUND if what.startswith("fp32") else FP16_BOUND
    for rank in got:
        assert far(rank["loss"], want["loss"]) < bound
        assert far(rank["norm"], want["norm"]) < bound
        assert far(rank["entropy"], want["entropy"]) < bound
        assert rank["lr"] == want["lr"]
        assert rank["scale"] == want["scale"]
        assert not any(rank["skipped"])
        assert weights_far(rank["weights"], want["weights"]) < bound
    assert all(rank["norm"] == got[0]["norm"] for rank in got), "one norm for all ranks"


@pytest.mark.slow
@pytest.mark.parametrize(("size", "what"), [c for c in CASES if "inf" in c[1]])
def test_an_inf_on_one_rank_skips_the_step_on_all(runs, size, what):
    how = {2: ON_TWO, 3: ON_THREE}[size][what]
    bad = how["spoilt"][1]
    for rank in runs(size)[what]:
        assert rank["skipped"] == [i == bad for i in range(UPDATES)]
        assert rank["norm"][bad] is None
        assert rank["updates"] == UPDATES - 1
        if how["plan"] == "fp16":
            want = [65536.0 if i <= bad else 32768.0 for i in range(UPDATES)]
            assert rank["scale"] == want
            assert rank["scale_now"] == 32768.0
    weights = [rank["weights"] for rank in runs(size)[what]]
    assert all(torch.equal(w[n], weights[0][n]) for w in weights for n in w), "ranks went apart"


@pytest.mark.slow
def test_each_rank_holds_its_share_in_fp32(runs):
    for size in (1, 2, 3):
        parts = runs(size)["fp16"]
        whole = 3 * sum(t.numel() for n, t in parts[0]["weights"].items() if n != "lm_head.weight")
        assert sum(rank["tensors"] for rank in parts) == whole
        for rank in parts:
            assert rank["tensors"] <= whole / size * 1.1
            assert ("master", "torch.float32") in rank["dtypes"]
            assert ("optimizer", "torch.float32") in rank["dtypes"]
            assert ("copy", "torch.float16") in rank["dtypes"]
            assert ("logits", "torch.float32") in rank["dtypes"]


@pytest.mark.slow
def test_weights_are_the_masters_whatever_is_gathered(runs):
    """After a forward the root's 16-bit weights stay gathered, and `backend.reshard = false` keeps all of them."""
    assert all(rank["steady"] for size in (1, 2, 3) for what in runs(size).values() for rank in what)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("how", [{}, {"offload": True}, {"reshard": False}, {"checkpointing": True}], ids=str)
def test_gpus_take_the_same_steps(alone, tmp_path, plan, how):
    """On every GPU there is, against one process on the CPU."""
    case = PLAIN | {"plan": plan, "device": "cuda"} | how
    found = on_ranks(torch.cuda.device_count(), "ranks_of_backends.py", json.dumps(case), folder=tmp_path)
    got, want = found[0][json.dumps(case)], alone(PLAIN | {"plan": plan})
    bound = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}[plan]
    assert far(got["loss"], want["loss"]) < bound
    assert far(got["norm"], want["norm"]) < bound
    assert weights_far({n: t.cpu() for n, t in got["weights"].items()}, want["weights"]) < bound


@pytest.mark.slow
def test_pitfall_24_tied_heads_stay_tied_through_a_start_on_meta(runs):
    assert all(rank["tied"] == 1 for size in (1, 2, 3) for rank in runs(size)["fp32"])
    assert all(rank["tied"] == 2 for rank in runs(2)["fp32, untied"])
    first = runs(2)["fp16"][0]["weights"]
    assert torch.equal(first["lm_head.weight"], first["model.embed_tokens.weight"])


def test_a_backend_that_these_processes_cannot_use_is_refused():
    assert backend_name(BackendSpec.model_validate({})) == "single"
    with pytest.raises(ValueError, match=r"backend.name = 'fsdp'.*torchrun"):
        backend_name(BackendSpec.model_validate({"name": "fsdp"}))
