"""ZeRO 1, 2 and 3 against one process: the same steps, the same skips, the same checkpoints, on 1 and 2 ranks."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from typing import Any

import pytest
import ranks
import torch
from common_training import UPDATES, fixed_rows, fresh_backend, one_step, trajectory

from tenbit.backends.deepspeed import _library
from tenbit.backends.masters import MAX_SKIPS_IN_A_ROW
from tenbit.precision import Precision

pytestmark = pytest.mark.scaling
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
SIZES, STAGES, FORMATS = (1, 2), (1, 2, 3), ("fp32", "fp16", "bf16")
BUDGET = 64
GROWS = {"preset": "fp16", "loss_scale": {"initial": 256.0, "interval": 2}}
on_each = pytest.mark.parametrize(("size", "stage"), [(size, stage) for size in SIZES for stage in STAGES])


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    """What one process had after two steps, and its masters after two more."""
    backend = fresh_backend(GROWS, name="single")
    for seed in range(2):
        one_step(backend, fixed_rows(seed=seed), BUDGET)
    state = backend.state()
    found = {"counts": dict(state.counts), "tensors": {k: t.clone() for k, t in state.tensors.items()}}
    found["weights at once"] = {n: t.clone() for n, t in backend.weights()}
    found["steps"] = [one_step(backend, fixed_rows(seed=seed), BUDGET)[1] for seed in (2, 3)]
    found["weights"] = {n: t.clone() for n, t in backend.weights()}
    return found


@pytest.fixture(scope="module")
def launched(saved, tmp_path_factory) -> dict[int, list[dict[Any, Any]]]:
    """By number of ranks, what each rank found."""
    folder = tmp_path_factory.mktemp("deepspeed")
    torch.save({k: saved[k] for k in ("counts", "tensors")}, folder / "state.pt")
    found = {}
    for size in SIZES:
        out = folder / f"{size}"
        out.mkdir()
        script = ranks.ROOT / "tests" / "ranks_of_deepspeed.py"
        done = ranks.launch(size, script, folder / "state.pt", TENBIT_TEST_OUT=str(out))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        assert done.stdout == "", "DeepSpeed wrote on the screen"
        assert not re.search(r"torch\.distributed\S* is deprecated", done.stderr)
        found[size] = [torch.load(out / f"rank{i}.pt", weights_only=False) for i in range(size)]
    return found


@pytest.fixture(scope="module")
def alone() -> Any:
    """trajectory(way) of SingleBackend, made once."""
    made: dict[str, Any] = {}

    def make(way: dict[str, Any]) -> dict[str, Any]:
        way = {k: v for k, v in way.items() if k in ("plan", "family")}
        key = json.dumps(way)
        if key not in made:
            made[key] = trajectory(fresh_backend(**way, name="single"), BUDGET)
        return made[key]

    return make


def relative(want: list[float], got: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(want, got, strict=True))


def furthest(want: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> float:
    """The distance of the tensor that is furthest off, relative to its norm."""
    assert want.keys() == got.keys()
    return max(float((want[n] - got[n]).norm() / want[n].norm()) for n in want)


# 16 bits: where products have other shapes (another number of rows in a micro-batch, other kernels) they round apart
BOUNDS = {"fp32": (1e-5, 1e-5, 1e-5), "fp16": (5e-3, 2e-3, 1e-2), "bf16": (4e-2, 1e-2, 6e-2)}


@needs_deepspeed
@on_each
def test_four_steps_are_those_of_one_process(launched, alone, size, stage):
    """Loss, norm and masters; with other micro-batches, recomputed activations, masters in the CPU's memory, untied."""
    ways = [json.loads(key) for key in launched[size][0]["trajectory"]]
    mine = [way for way in ways if way["stage"] == stage]
    assert len(mine) == (4 if size == 1 else 11)
    for way in mine:
        want = alone(way)
        for rank in launched[size]:
            got = rank["trajectory"][json.dumps(way)]
            for_loss, for_norm, for_weights = BOUNDS[Precision.parse(way["plan"]).compute.value]
            assert len(got["norm"]) == UPDATES, way
            assert relative(want["loss"], got["loss"]) < for_loss, way
            assert relative(want["norm"], got["norm"]) < for_norm, way
            assert furthest(want["weights"], got["weights"]) < for_weights, way
            assert (got["scale"], got["lr"]) == (want["scale"], want["lr"]), way


@needs_deepspeed
@on_each
def test_the_step_in_which_the_scale_grows_is_like_the_others(launched, size, stage):
    """DeepSpeed's own dynamic scale divides that step's gradients by the new scale: half of what they are."""
    key = next(k for k in launched[size][0]["trajectory"] if json.loads(k)["stage"] == stage and "interval" in k)
    assert launched[size][0]["trajectory"][key]["scale"] == [256.0, 256.0, 512.0, 512.0]
    fixed = trajectory(fresh_backend({"preset": "fp16", "loss_scale": {"initial": 256.0}}, name="single"), BUDGET)
    got = launched[size][0]["trajectory"][key]
    assert relative(fixed["norm"], got["norm"]) < BOUNDS["fp16"][1]
    assert furthest(fixed["weights"], got["weights"]) < BOUNDS["fp16"][2]


@needs_deepspeed
@pytest.mark.parametrize(
    ("plan", "size", "stage"), [("fp16", 1, s) for s in STAGES] + [(p, 2, s) for p in FORMATS for s in STAGES]
)
def test_an_inf_on_one_rank_skips_the_step_on_all(launched, plan, size, stage):
    """Section 3.2: masters, moments, count and schedule stand still, and the scale halves, on every rank alike."""
    found = [rank["overflow", plan, stage] for rank in launched[size]]
    high, low = (65536.0, 32768.0) if plan == "fp16" else (1.0, 1.0)
    for rank in found:
        first, bad, after = rank["steps"]
        assert (first.skipped, bad.skipped, after.skipped) == (False, True, False)
        assert bad.grad_norm is None
        assert (first.loss_scale, bad.loss_scale, after.loss_scale) == (high, high, low)
        assert (first.lr, bad.lr, after.lr) == pytest.approx((0.5e-3, 1e-3, 1e-3))  # a warm-up of two updates
        assert rank["unmoved"]
        assert rank["moved"]
        before, skipped = rank["counts"]
        assert (before["updates"], skipped["updates"], skipped["skips_in_a_row"]) == (1, 1, 1)
        assert skipped["loss_scale"] == low
    assert all(rank["steps"] == found[0]["steps"] for rank in found)


@needs_deepspeed
@on_each
def test_a_scale_below_one_goes_on_and_fifty_skips_do_not(launched, size, stage):
    for rank in launched[size]:
        found = rank["never clean", stage]
        assert found["scales"] == [2.0, 1.0, 0.5]  # and the fourth raises
        assert found["said"].startswith(f"{MAX_SKIPS_IN_A_ROW} gradient steps in a row")


@needs_deepspeed
@on_each
def test_resuming_continues_bit_for_bit(launched, size, stage):
    assert all(rank["resume", stage]["bitwise"] for rank in launched[size])


@needs_deepspeed
@on_each
def test_one_process_goes_on_from_its_state(launched, size, stage):
    """One form of checkpoint: whole FP32 tensors under the model's names, and four counts."""
    found = launched[size][0]["resume", stage]
    backend = fresh_backend(GROWS, name="single")
    own = backend.state()
    assert found["tensors"].keys() == own.tensors.keys()
    assert all(t.dtype == torch.float32 and t.shape == own.tensors[n].shape for n, t in found["tensors"].items())
    assert found["counts"] == {"updates": 2, "skips_in_a_row": 0, "loss_scale": 512.0, "clean_steps": 0}

    def read(wanted: dict[str, torch.Tensor]) -> None:
        for name, place in wanted.items():
            place.copy_(found["tensors"][name])

    backend.restore(found["counts"], read)
    for seed in (2, 3):
        one_step(backend, fixed_rows(seed=seed), BUDGET)
    assert furthest(dict(backend.weights()), found["weights"]) < BOUNDS["fp16"][2]


@needs_deepspeed
@on_each
def test_it_goes_on_from_the_state_of_one_process(launched, saved, size, stage):
    for rank in launched[size]:
        found = rank["take over", stage]
        assert furthest(saved["weights at once"], found["at_once"]) == 0.0
        assert found["copies_follow"]
        for want, got in zip(saved["steps"], found["steps"], strict=True):
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=BOUNDS["fp16"][1])
            assert (got.loss_scale, got.lr, got.skipped) == (want.loss_scale, want.lr, False)
        assert furthest(saved["weights"], found["weights"]) < BOUNDS["fp16"][2]


@needs_deepspeed
@pytest.mark.parametrize("plan", FORMATS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_plan_holds_for_live_tensors(launched, plan, stage):
    """Every parameter has its master, moments, copy and gradient on some rank, in the plan's formats."""
    count = len(fresh_backend(plan, name="single")._params)  # type: ignore[attr-defined]
    found = [rank["holds", plan, stage] for rank in launched[2]]
    for when in ("start", "before the step", "after the step"):
        assert all(rank[when]["copy"] == count for rank in found)
        assert all(rank[when]["logits"] == 1 for rank in found)
        assert sum(rank[when]["master"] for rank in found) >= count
        assert sum(rank[when]["optimizer"] for rank in found) >= 2 * count
    assert sum(rank["before the step"]["gradient"] for rank in found) >= count
    for rank in found:
        assert rank["names"]
        assert rank["tied"]
        assert rank["tied still"]
        assert rank["cast"]
        assert rank["dtypes"] == {torch.float32}


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_offloaded_tensors_are_in_the_plans_formats_and_sums_are_fp32(launched, stage):
    plain = torch.cat([t.flatten() for rank in launched[2] for t in rank["holds", "fp16", stage]["gradients"].values()])
    for rank in launched[2]:
        assert min(rank["holds offloaded", stage]["after the step"].values()) > 0
        assert rank["holds offloaded", stage]["before the step"]["gradient"] > 0
    sums = [t.flatten() for rank in launched[2] for t in rank["holds offloaded", stage]["gradients"].values()]
    assert float(torch.cat(sums).norm()) == pytest.approx(float(plain.norm()), rel=1e-3)  # they are not all zero


@needs_deepspeed
@on_each
def test_rotary_tables_reach_every_rank_and_stay_fp32(launched, size, stage):
    """Pitfall 21; they are in no checkpoint, and the other ranks' were on meta."""
    want = dict(fresh_backend("fp32", name="single")._module.named_buffers())  # type: ignore[attr-defined]
    for rank in launched[size]:
        got = rank["holds", "fp16", stage]["buffers"]
        assert got.keys() == want.keys() > set()
        assert all(b.dtype == torch.float32 and torch.equal(b, want[n]) for n, b in got.items())


@needs_deepspeed
@pytest.mark.parametrize("plan", ["fp16", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_micro_batches_add_up_in_fp32(launched, plan, stage):
    """A sum kept in 16 bits would have 16-bit values only. The sums are those of one process, up to rounding."""
    got = launched[1][0]["holds", plan, stage]["gradients"]
    backend: Any = fresh_backend(plan, name="single")
    backend.step = lambda: None
    one_step(backend, fixed_rows(), BUDGET)
    want = {n: t.flatten() for part, n, t in backend.live() if part == "gradient"}
    assert got.keys() == want.keys()
    form = Precision.parse(plan).compute.dtype
    for name, total in want.items():
        if total.numel() > 1000:
            assert (got[name].to(form).float() != got[name]).float().mean() > 0.3, name
    bound = 5e-3 if plan == "fp16" else 3e-2
    every = [torch.cat([t[n].double() for n in sorted(t)]) for t in (want, got)]
    assert (every[0] - every[1]).norm() < bound * every[0].norm()


@needs_deepspeed
@pytest.mark.parametrize("plan", FORMATS)
@pytest.mark.parametrize("stage", STAGES)
def test_masters_start_from_the_fp32_weights_of_rank_0(launched, plan, stage):
    """DeepSpeed makes them of the 16-bit copy, which has lost the weights' last bits."""
    want = dict(fresh_backend("fp32", name="single").weights())
    assert all(furthest(want, rank["holds", plan, stage]["weights at start"]) == 0.0 for rank in launched[2])


@needs_deepspeed
@on_each
def test_old_weights_can_be_scored_with_and_come_back(launched, size, stage):
    for rank in launched[size]:
        assert rank["snapshot", stage] == {"then": True, "now": True, "moved": True, "masters": True}


def test_autocast_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"precision\.casting = 'autocast'.*backend\.name = 'fsdp'"):
        Precision.parse({"preset": "fp16", "casting": "autocast"}).deepspeed()


def test_without_deepspeed_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"pip install 'tenbit\[deepspeed\]'"):
        _library(torch.device("cpu"))


@needs_deepspeed
def test_a_device_that_deepspeed_would_not_train_on_is_refused():
    """It takes the accelerator that it finds; on a CPU machine a model on meta stands for one that is elsewhere."""
    with pytest.raises(ValueError, match=r"model\.device = 'meta'"):
        _library(torch.device("meta"))
