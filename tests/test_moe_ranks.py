"""Mixtures of experts on several ranks: an even share each for any number of experts, the same steps, the same run."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from common_training import fresh_backend, trajectory
from ranks import on_ranks
from test_backend_deepspeed import needs_deepspeed
from test_backend_fsdp import FP16_BOUND, FP32_BOUND, far, weights_far
from test_moe import QUIET, recipe, rows
from test_ranks import same_run, under_torchrun, write
from torch.distributed.tensor import Shard

from tenbit import train
from tenbit.backends.fsdp import placement
from tenbit.precision import Precision

pytestmark = pytest.mark.slow

MOE = {"plan": "fp32", "name": "fsdp", "family": "qwen3_moe"}
FIVE, SIX = {"num_experts": 5}, {"num_experts": 6, "moe_intermediate_size": 48}
ON = {
    2: [{"shape": FIVE}, {"shape": SIX}, {"shape": FIVE, "checkpointing": True}, {"shape": FIVE, "plan": "fp16"}],
    4: [{"shape": SIX}],
}
ZERO = [(2, "fp32"), (3, "fp32"), (3, "fp16")]
BOUNDS = {"fp32": FP32_BOUND, "fp16": FP16_BOUND}


def close(got: dict[str, Any], want: dict[str, Any], bound: float) -> None:
    assert far(got["loss"], want["loss"]) < bound
    assert far(got["norm"], want["norm"]) < bound
    assert weights_far(got["weights"], want["weights"]) < bound


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(ranks) -> one list of results per shape, of each rank."""
    done: dict[int, list[list[dict]]] = {}

    def run(size: int) -> list[list[dict]]:
        if size not in done:
            texts = [json.dumps(MOE | how) for how in ON[size]]
            found = on_ranks(size, "ranks_of_backends.py", *texts, folder=tmp_path_factory.mktemp("ranks"))
            done[size] = [[rank[text] for rank in found] for text in texts]
        return done[size]

    return run


@pytest.mark.parametrize(
    ("shape", "ranks", "dim"),
    [
        ((128, 1536, 2048), 8, None),
        ((60, 1536, 2048), 8, 1),  # 8, 8, ... and 4
        ((6, 96, 64), 4, 1),  # 2, 2, 2 and none
        ((5, 63, 64), 2, 2),
        ((5, 7, 9), 2, None),  # nothing comes out even
        ((151936, 2048), 7, None),  # a row more or less is no burden
        ((128, 1536, 2048), 7, None),  # 19 where 18.3 would be even: more than a share, but no dimension is better
        ((64,), 3, None),
        ((), 2, None),
    ],
)
def test_which_dimension_is_divided(shape, ranks, dim):
    assert placement(shape, ranks) == (None if dim is None else Shard(dim))


@pytest.mark.parametrize("size", ON)
def test_every_rank_holds_an_even_share(runs, size):
    """Masters and moments. Divided by whole experts, the fullest rank would hold up to half more."""
    for parts in runs(size):
        held = [rank["tensors"] for rank in parts]
        assert sum(held) == 3 * sum(t.numel() for t in parts[0]["weights"].values())
        assert max(held) < 1.02 * sum(held) / size


@pytest.mark.parametrize("size", ON)
def test_sharded_mixtures_take_the_steps_of_one_process(runs, size):
    for how, parts in zip(ON[size], runs(size), strict=True):
        plan = how.get("plan", "fp32")
        want = trajectory(fresh_backend(plan=plan, family="qwen3_moe", shape=how["shape"]), 64)
        for rank in parts:
            close(rank, want, BOUNDS[plan])
            assert rank["steady"]


def test_a_run_goes_on_on_another_number_of_ranks(model_folder, grader, tmp_path):
    """With replay, five experts: a step in one process, one on two ranks, one in one process again."""
    folder = model_folder("qwen3_moe", num_experts=5)
    wanted = recipe(folder, grader).model_copy(update={"steps": 3, "precision": Precision.parse("fp32")})
    whole = train(wanted, tmp_path / "whole", console=QUIET)
    out = train(wanted.model_copy(update={"steps": 1}), tmp_path / "run", console=QUIET)
    shutil.rmtree(out / "model")
    done = under_torchrun(2, write(wanted.model_copy(update={"steps": 2}), tmp_path), out, "--resume")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    train(wanted, out, resume=True, console=QUIET)
    same_run(rows(out), rows(whole), 1e-3)
    assert all(row["routing/tokens_differ"] == 0 for row in rows(out))


@pytest.mark.scaling
@needs_deepspeed
def test_zero_takes_the_steps_of_one_process(tmp_path):
    cases = [MOE | {"name": "deepspeed", "stage": n, "plan": plan, "shape": FIVE} for n, plan in ZERO]
    results = on_ranks(2, "ranks_of_backends.py", *map(json.dumps, cases), folder=tmp_path)
    for how in cases:
        want = trajectory(fresh_backend(plan=how["plan"], family="qwen3_moe", shape=FIVE), 64)
        for rank in (found[json.dumps(how)] for found in results):
            close(rank, want, BOUNDS[how["plan"]])
