"""The whole run: `train` end to end on small random models, its folder, its equivalences, resuming after SIGKILL."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer

from tenbit import Recipe, train
from tenbit.algorithms import ALGORITHMS

QUIET = Console(file=io.StringIO())
TREE = {
    "steps": 3,
    "precision": "fp32",
    "task": {"data": "arithmetic", "limit": 12, "grader": "exact"},
    "rollout": {"prompts": 4, "samples": 3, "max_tokens": 24},
    "optim": {"lr": 1e-3, "updates": 2, "token_budget": 400},
    "checkpoint": {"every": 1},
}
NOT_REPRODUCIBLE = ("time/", "perf/")


def recipe(folder: Path, **changes) -> Recipe:
    """The small run, with ``section__key=value`` changes."""
    tree = json.loads(json.dumps(TREE))
    tree["model"] = {"path": str(folder)}
    for key, value in changes.items():
        *path, last = key.split("__")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return Recipe.of(tree)


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(NOT_REPRODUCIBLE)} for row in lines]


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, as torch's own converter reads them."""
    whole = checkpoint.with_suffix(".pt")
    dcp_to_torch_save(checkpoint / "trainer", whole)
    found = torch.load(whole)
    whole.unlink()
    return found


@pytest.fixture
def rewarding(monkeypatch, tmp_path):
    """A user's grader that a random model can please: the share of even bytes in its answer."""
    (tmp_path / "even.py").write_text(
        "def reward(problem, text):\n    b = text.encode()\n    return sum(x % 2 == 0 for x in b) / max(1, len(b))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "even:reward"


@pytest.mark.parametrize(
    ("family", "precision"),
    [("qwen2", "fp16"), ("llama", "fp16"), ("qwen3", "bf16"), ("qwen2", "fp32"), ("qwen2", "bf16/fp32")],
)
def test_a_run_leaves_everything_it_promises(model_folder, tmp_path, rewarding, family, precision):
    out = tmp_path / "run"
    wanted = recipe(
        model_folder(family),
        precision=precision,
        task__grader=rewarding,
        steps=2,
        eval__every=1,
        eval__data=["arithmetic_test"],
        eval__limit=3,
        compare__precisions=["fp16", "bf16"],
        compare__prompts=4,
        compare__samples=2,
    )
    assert train(wanted, out, console=QUIET) == out
    found = rows(out)
    assert [r["step"] for r in found] == [0, 1, 2]
    for name in metric_names():
        assert name in json.loads((out / "metrics.jsonl").read_text().splitlines()[-1]), name
    assert "eval/arithmetic_test/avg@1" in found[0]
    assert Recipe.load(out / "recipe.toml") == wanted
    assert len(json.loads((out / "mismatch.json").read_text())) == 2
    assert any((out / "tensorboard").iterdir())
    assert (out / "samples.jsonl").read_text()
    # the model a run ends with: loadable, in the format that was rolled out, equal to the last weights
    rollout = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "bf16/fp32": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {rollout[precision]}
    masters = saved_tensors(out / "checkpoints" / "step-000002")
    for name, p in model.named_parameters():
        assert torch.equal(p, masters[f"master.{name}"].to(p.dtype)), name
    assert AutoTokenizer.from_pretrained(out / "model").pad_token is not None


def metric_names() -> list[str]:
    """Those of the specification that every step has."""
    mismatch = [
        "kl_k1",
        "kl_k3",
        "logp_abs_mean",
        "logp_abs_max",
        "prob_diff_min",
        "prob_diff_max",
        "prob_diff_abs_mean",
        "seq_logratio_mean",
        "seq_logratio_std",
        "seq_ess",
        "seq_above_cap",
    ]
    return [
        "train/reward", "train/accuracy", "train/response_length", "train/truncated",
        *(f"mismatch/{m}" for m in mismatch), "correction/weight_mean", "correction/outside",
        "optim/loss", "optim/grad_norm", "optim/lr", "optim/loss_scale", "optim/skipped",
        "policy/entropy", "policy/clip_fraction",
        "time/rollout", "time/grade", "time/proximal", "time/update", "time/sync", "time/step",
        "perf/tokens_per_second",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains(model_folder, tmp_path, rewarding, name):
    wanted = recipe(model_folder(), algorithm__name=name, task__grader=rewarding, precision="fp16", steps=2)
    found = rows(train(wanted, tmp_path / "run", console=QUIET))
    assert all(r["optim/grad_norm"] is not None and r["optim/grad_norm"] > 0 for r in found)
    assert all(r["mismatch/kl_k3"] < 1e-3 for r in found)


def test_training_raises_the_reward(model_folder, tmp_path, rewarding):
    """The sign is right: the share of even bytes goes up, from about a half."""
    wanted = recipe(
        model_folder(), task__grader=rewarding, steps=20, precision="fp16", rollout__prompts=8, rollout__samples=8,
        optim__lr=5e-3, optim__updates=1, checkpoint__every=0,
    )  # fmt: skip
    found = [r["train/reward"] for r in rows(train(wanted, tmp_path / "run", console=QUIET))]
    assert found[0] < 0.6
    assert found[-1] > found[0] + 0.15


def test_micro_batch_size_does_not_matter(model_folder, tmp_path, rewarding):
    """Golden runs of one equivalence class: another token budget, the same trajectory (FP32 to rounding)."""
    runs = []
    for budget in (60, 400, 100_000):
        changes = {"optim__token_budget": budget, "algorithm__name": "grpo-seq-mis"}
        wanted = recipe(model_folder(), task__grader=rewarding, **changes)
        runs.append(rows(train(wanted, tmp_path / str(budget), console=QUIET)))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert a["train/reward"] == b["train/reward"]  # the same tokens were sampled
            assert a["optim/grad_norm"] == pytest.approx(b["optim/grad_norm"], rel=1e-4)
            assert a["optim/loss"] == pytest.approx(b["optim/loss"], rel=1e-3, abs=1e-6)


def test_fp32_engine_and_backend_are_the_same_policy(model_folder, tmp_path, rewarding):
    wanted = recipe(model_folder(), task__grader=rewarding, steps=2, optim__updates=1)
    found = rows(train(wanted, tmp_path / "run", console=QUIET))
    assert all(r["mismatch/kl_k3"] < 1e-10 for r in found)
    assert all(abs(r["correction/weight_mean"] - 1) < 1e-3 for r in found)


def test_dynamic_sampling_keeps_only_informative_groups(model_folder, tmp_path, rewarding):
    """With the built-in grader a random model never earns anything: nothing to train on, and no crash (pitfall 6)."""
    dull = recipe(model_folder(), algorithm__name="dapo", steps=1, rollout__max_rounds=3)
    (row,) = rows(train(dull, tmp_path / "dull", console=QUIET))
    assert row["train/rounds"] == 3
    assert row["train/kept_groups"] == 0
    assert "optim/grad_norm" not in row
    lively = recipe(model_folder(), algorithm__name="dapo", steps=1, task__grader=rewarding)
    (row,) = rows(train(lively, tmp_path / "lively", console=QUIET))
    assert row["train/rounds"] == 1
    assert row["optim/grad_norm"] > 0


COMMAND = [sys.executable, "-m", "tenbit", "train"]


def start(arguments: list[str], cwd: Path) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*COMMAND, *arguments], cwd=cwd, env=env, start_new_session=True, **pipes)


def arguments(model: Path, cwd: Path, out: str, steps: int) -> list[str]:
    tree = recipe(
        model,
        steps=steps,
        precision="fp16",
        checkpoint__every=2,
        checkpoint__keep=2,
        eval__every=3,
        eval__data=["arithmetic_test"],
        eval__limit=2,
        algorithm__name="grpo-token-tis",
    )
    tree.dump(cwd / "recipe-in.toml")
    return ["recipe-in.toml", "--out", out]


@pytest.mark.slow
def test_killed_at_any_moment_a_resumed_run_is_the_uninterrupted_one(model_folder, tmp_path):
    """SIGKILL at several random moments; metrics and final weights are identical, bit for bit."""
    args = arguments(model_folder(), tmp_path, "whole", steps=12)
    whole = start(args, tmp_path)
    output, _ = whole.communicate(timeout=200)
    assert whole.returncode == 0, output.decode()
    chance = random.Random(int(os.environ.get("TENBIT_KILL_SEED", "5")))
    args = arguments(model_folder(), tmp_path, "killed", steps=12)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    kills = 0
    for target in (1, 5, 9):  # somewhere in the step after so many rows
        process = start([*args, "--resume"] if kills else args, tmp_path)
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < target):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.4))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 2, "the run was too quick to be killed; give it more steps"
    last = start([*args, "--resume"], tmp_path)
    output, _ = last.communicate(timeout=200)
    assert last.returncode == 0, output.decode()
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    for name in ("samples.jsonl", "model/config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    final = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "killed")]
    assert all(torch.equal(final[0][k], final[1][k]) for k in final[0])


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(model_folder, tmp_path):
    args = arguments(model_folder(), tmp_path, "run", steps=40)
    process = start(args, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 2):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the run and its grading workers alike
    output, _ = process.communicate(timeout=60)
    text = output.decode()
    assert process.returncode == 130, text
    done = rows(tmp_path / "run")[-1]["step"]
    assert f"Stopped after step {done}" in text
    assert "--resume" in text
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:06d}" / "state.json").is_file()
    assert "Traceback" not in text
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_run_on_cuda(model_folder, tmp_path, rewarding, precision):
    wanted = recipe(model_folder(), task__grader=rewarding, precision=precision)
    found = rows(train(wanted, tmp_path / "r", console=QUIET))
    assert found[-1]["mismatch/kl_k3"] < (1e-3 if precision != "fp32" else 1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_moe", {"rollout__replay": True}),
        ("qwen2", {"lora": {"rank": 8, "alpha": 16}}),
        ("qwen2", {"lora": {"rank": 8, "alpha": 16, "rollout": "adapter"}}),
        ("llama", {"precision": {"preset": "fp16", "residual_scale": 0.0625, "fp32": ["model.layers.1.mlp"]}}),
    ],
)
def test_a_run_on_cuda_with_more_inside(model_folder, tmp_path, rewarding, family, changes):
    wanted = recipe(model_folder(family), task__grader=rewarding, **changes)
    found = rows(train(wanted, tmp_path / "r", console=QUIET))
    assert found[-1]["mismatch/kl_k3"] < 1e-3
