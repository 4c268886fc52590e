"""Whole runs under torchrun: the same run on any number of ranks, killed and resumed, resumed on other numbers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import ROOT, launch
from rich.console import Console
from test_loop import recipe, rows

from tenbit import Recipe, train
from tenbit.checkpoint import complete

QUIET = Console(file=io.StringIO())
# what the last bits of a log-probability decide: at FP32 the mismatch is rounding alone, and chi^2 and ESS are of it
ROUNDING = ("mismatch/", "correction/")


def run_recipe(model_folder, grader: str, **changes) -> Recipe:
    wanted = {"steps": 4, "task__grader": grader, "algorithm__name": "grpo-token-tis", "checkpoint__keep": 99}
    return recipe(model_folder(), **(wanted | changes))


def write(chosen: Recipe, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    chosen.dump(folder / "recipe-in.toml")
    return folder / "recipe-in.toml"


def under_torchrun(size: int, file: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return launch(size, "-m", "tenbit", "train", file, "--out", out, *more, timeout=120)


def same_run(one: list[dict], two: list[dict], bound: float) -> None:
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith(ROUNDING) and a[key] is not None:
                assert b[key] == pytest.approx(a[key], rel=bound, abs=bound * 1e-2), (a["step"], key)


@pytest.fixture(scope="module")
def two_ranks(model_folder, grader, tmp_path_factory) -> Path:
    """An uninterrupted run on two ranks, in FP32, with an evaluation."""
    folder = tmp_path_factory.mktemp("two")
    chosen = run_recipe(model_folder, grader, eval__every=2, eval__data=["arithmetic_test"], eval__limit=3)
    done = under_torchrun(2, write(chosen, folder), folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_a_run_is_the_same_on_one_rank_and_on_two(two_ranks, tmp_path):
    alone = train(Recipe.load(two_ranks / "recipe-in.toml"), tmp_path / "alone", console=QUIET)
    same_run(rows(alone), rows(two_ranks / "run"), 1e-3)
    for name in ("recipe.toml", "samples.jsonl", "summary.json", "precision.json", "report.html", "model/config.json"):
        assert (two_ranks / "run" / name).is_file(), name
    samples = [[json.loads(line) for line in (f / "samples.jsonl").read_text().splitlines()]
               for f in (alone, two_ranks / "run")]  # fmt: skip
    assert [s["response"] for s in samples[0][:4]] == [s["response"] for s in samples[1][:4]], "step 1 samples alike"
    from transformers import AutoModelForCausalLM

    ours, theirs = (AutoModelForCausalLM.from_pretrained(f / "model") for f in (alone, two_ranks / "run"))
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert float((p - q).detach().norm()) <= 1e-3 * float(p.detach().norm()), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "backend"), [(1, "single"), (3, "fsdp"), pytest.param(2, "deepspeed", marks=pytest.mark.scaling)]
)
def test_a_checkpoint_goes_on_with_another_number_of_ranks_and_another_backend(two_ranks, tmp_path, size, backend):
    """From two FSDP2 ranks to one process, to three ranks, and to DeepSpeed: sharded otherwise, the same trajectory."""
    if backend == "deepspeed":
        pytest.importorskip("deepspeed")
    shutil.copytree(two_ranks / "run", tmp_path / "run")
    for later in complete(tmp_path / "run" / "checkpoints")[2:]:
        shutil.rmtree(later)
    file = two_ranks / "recipe-in.toml"
    if size == 1:
        train(Recipe.load(file), tmp_path / "run", resume=True, console=QUIET)
    else:
        done = under_torchrun(size, file, tmp_path / "run", "--resume", f"backend.name={backend}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "resumes after step 2" in done.stdout
    same_run(rows(two_ranks / "run"), rows(tmp_path / "run"), 1e-3)
    assert rows(tmp_path / "run")[:3] == rows(two_ranks / "run")[:3]


def ranks_of(parent: int) -> dict[int, int]:
    """rank -> process, of a running torchrun."""
    found = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes())
                if rank:
                    found[int(rank[1])] = int(folder.name)
    return found


@pytest.mark.slow
def test_any_rank_killed_at_any_moment_ends_the_run_and_the_resumed_one_is_the_same_bit_for_bit(two_ranks, tmp_path):
    """SIGKILL, rank 0 and rank 1 in turn, at random moments; FP32 and the same layout: not one bit differs."""
    chance = random.Random(int(os.environ.get("TENBIT_KILL_SEED", "7")))
    file, out = two_ranks / "recipe-in.toml", tmp_path / "run"
    for kill, victim in enumerate((1, 0)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tenbit"]
        process = subprocess.Popen(
            [*command, "train", str(file), "--out", str(out), *(["--resume"] if kill else [])],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        metrics, until = out / "metrics.jsonl", time.monotonic() + 90
        while not metrics.exists() or metrics.read_text().count("\n") < 2 + kill:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(ranks_of(process.pid)[victim], signal.SIGKILL)
        killed = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        assert time.monotonic() - killed < 60
        assert "Signal 9 (SIGKILL)" in output, output
        assert not (out / "summary.json").exists(), "the run was too quick to be killed"
    done = under_torchrun(2, file, out, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(out) == rows(two_ranks / "run")
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (two_ranks / "run" / name).read_bytes(), name


@pytest.mark.slow
def test_a_mistake_is_said_once_however_many_ranks_there_are(two_ranks, tmp_path):
    text = (two_ranks / "recipe-in.toml").read_text()
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(text.replace("[optim]", "[optim]\nlearning_rate = 1"))
    done = under_torchrun(2, wrong, tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("there is no key 'optim.learning_rate'") == 1, done.stderr
    assert "tenbit.keys" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ctrl_c_on_several_ranks_finishes_the_step_and_saves(two_ranks, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tenbit"]
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*command, "train", str(two_ranks / "recipe-in.toml"), "steps=400", "checkpoint.every=0", "--out", str(out)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and (not (out / "metrics.jsonl").exists() or len(rows(out)) < 3):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    done = rows(out)[-1]["step"]
    assert f"Stopped after step {done}" in output, output
    assert output.count("stopping when this step is done") == 1
    assert [p.name for p in complete(out / "checkpoints")] == [f"step-{done:06d}"]


@pytest.mark.slow
@pytest.mark.scaling
def test_a_checkpoint_damaged_in_one_ranks_share_is_refused_by_all(model_folder, grader, tmp_path):
    """DeepSpeed's ranks read whole tensors, so that only one of them meets the damage; the other must not wait."""
    pytest.importorskip("deepspeed")
    file = write(run_recipe(model_folder, grader, steps=1, backend={"name": "deepspeed"}), tmp_path)
    done = under_torchrun(2, file, tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    (shard,) = (tmp_path / "run" / "checkpoints" / "step-000001" / "trainer").glob("__1_*.distcp")
    shard.write_bytes(shard.read_bytes()[:1000])
    done = under_torchrun(2, file, tmp_path / "run", "--resume", "steps=2")
    assert done.returncode != 0
    assert "step-000001: cannot be read" in done.stderr, done.stderr
    assert "Without this folder --resume goes on" in done.stderr
