"""The commands, and bad input: one clear message with the remedy, exit status 2, earlier runs untouched."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest
from conftest import byte_tokenizer, small_module
from test_loop import recipe, rows

from tenbit.cli import main


def tenbit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The command in this process, as its entry point runs it: a new one would import torch each time."""
    out, err = io.StringIO(), io.StringIO()
    argv, code = ["tenbit", *arguments], 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        unittest.mock.patch.object(sys, "argv", argv),
    ):
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def test_only_training_is_for_several_processes():
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run([sys.executable, "-m", "tenbit", "precisions"], env={**os.environ, **environment},
                          capture_output=True, text=True, check=False)  # fmt: skip
    refused(done, "only `tenbit train` runs in several processes")


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)


@pytest.fixture
def run_in(model_folder, tmp_path):
    """run_in("rollout.max_tokens=5") writes the small recipe, trains with overrides, and looks for damage."""
    earlier = tmp_path / "runs" / "run"
    earlier.mkdir(parents=True)
    (earlier / "metrics.jsonl").write_text('{"step": 1}\n')

    def run(*overrides: str, model: Path | None = None, text: str | None = None, leaves=False):
        file = tmp_path / "r.toml"
        recipe(model or model_folder()).dump(file)
        if text is not None:
            file.write_text(text)
        done = tenbit("train", "r.toml", *overrides, cwd=tmp_path)
        assert [p.name for p in (tmp_path / "runs").iterdir()] == ["run"] or done.returncode != 2 or leaves
        assert (earlier / "metrics.jsonl").read_text() == '{"step": 1}\n'
        return done

    return run


def test_a_misspelt_key_names_its_neighbour(run_in):
    refused(run_in("optim.learning_rat=1"), "optim.learning_rat", "r.toml")
    refused(run_in("optim.updats=2"), "did you mean 'updates'")
    refused(run_in("rolout.prompts=2"), "did you mean 'rollout'")


def test_a_wrong_type(run_in):
    refused(run_in("steps=many"), "steps", "many", "r.toml")
    refused(run_in("rollout.temperature=0"), "rollout.temperature", "greater than 0")
    refused(run_in("steps"), "key=value")
    refused(run_in(text="steps = "), "not valid TOML")


def test_missing_files(run_in, tmp_path):
    refused(tenbit("train", "nowhere.toml", cwd=tmp_path), "nowhere.toml")
    refused(run_in("model.path=./nowhere"), "model.path", "nowhere")
    refused(run_in("task.data=nowhere.jsonl"), "nowhere.jsonl")
    refused(run_in("task.data=math50"), "math500")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", ["d.jsonl:2"]),
        ('{"problem": "1+1"}', ["d.jsonl:2", "answer"]),
        ('{"problem": "", "answer": "2"}', ["d.jsonl:2", "empty"]),
        ("[1, 2]", ["d.jsonl:2"]),
    ],
)
def test_malformed_rows_name_file_and_line(run_in, tmp_path, line, words):
    (tmp_path / "d.jsonl").write_text('{"problem": "1+2", "answer": "3"}\n' + line + "\n")
    refused(run_in("task.data=d.jsonl"), *words)


def test_an_empty_file(run_in, tmp_path):
    (tmp_path / "d.jsonl").write_text("")
    refused(run_in("task.data=d.jsonl"), "d.jsonl", "no problem in it")


def test_a_prompt_longer_than_the_context(run_in, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"problem": "9" * 600, "answer": "9"}) + "\n")
    refused(run_in("task.data=d.jsonl"), "d.jsonl:1", "601 tokens", "context of 512", "drop_long_prompts")


def test_a_model_without_a_pad_token(run_in, model_folder, tmp_path):
    folder = model_folder("llama", pad=False)
    refused(run_in(model=folder), "no pad token", "model.pad_token = '<|eos|>'")
    done = run_in("model.pad_token=<|eos|>", "steps=1", "--out=padded", model=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("precision=fp16/int4", ["precision", "int4", "fp16"]),
        ("precision.export=bf16", ["precision.export", "Remove the key"]),
        ("precision.master=fp16", ["precision.master"]),
        ("precision.reduce=bf16", ["precision.reduce"]),
    ],
)
def test_an_impossible_precision(run_in, override, words):
    refused(run_in("precision=fp16", override) if "." in override else run_in(override), *words)


def test_a_reward_that_is_not_a_number(run_in, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "mine.py").write_text("def nan(problem, text):\n    return float('nan')\n")
    done = run_in("task.grader=mine:nan", leaves=True)
    refused(done, "mine:nan", "nan", "arithmetic")
    refused(run_in("task.grader=mine:missing", leaves=True), "mine", "missing")


def test_settings_that_contradict_each_other(run_in):
    refused(run_in("rollout.samples=1"), "rollout.samples", "at least 2")
    refused(run_in("rollout.top_p=0.9"), "rollout.top_p", "not the policy")
    refused(run_in("algorithm.name=grop"), "did you mean 'grpo'")
    refused(run_in("algorithm.clip_high=0.3"), "does not clip")
    refused(run_in("algorithm.name=cispo", "algorithm.clip_dual=3"), "clip_dual", "Remove")
    refused(run_in("algorithm.name=icepop", "algorithm.floor=9"), "algorithm.floor", "rejected")
    refused(run_in("algorithm.name=pg-is", "algorithm.cap=2"), "algorithm.cap", "no threshold")
    refused(run_in("optim.updates=9"), "optim.updates")
    refused(run_in("model.device=cuda:7"), "model.device")


def test_dropout_is_refused(run_in, tmp_path):
    folder = tmp_path / "dropout"
    small_module("llama", attention_dropout=0.1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    refused(run_in(model=folder), "attention_dropout", "0.1")


def test_a_folder_that_holds_a_run_is_left_alone(run_in, tmp_path):
    before = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text()
    refused(run_in("--out=runs/run"), "not empty", "--resume")
    refused(run_in("--out=runs/run", "--resume"), "no run to resume")
    assert (tmp_path / "runs" / "run" / "metrics.jsonl").read_text() == before


def test_resuming_with_another_recipe_is_refused_and_with_more_steps_goes_on(run_in, tmp_path):
    assert run_in("--out=mine", "steps=1").returncode == 0
    refused(run_in("--out=mine", "--resume", "steps=1", "optim.lr=1"), "optim", "same recipe")
    assert run_in("--out=mine", "--resume", "steps=3").returncode == 0
    assert run_in("--out=straight", "steps=3").returncode == 0
    assert rows(tmp_path / "mine") == rows(tmp_path / "straight")


def test_without_out_every_run_has_a_folder_of_its_own(run_in, tmp_path):
    done = run_in("steps=1")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["run", "run-2"]
    last = [line for line in done.stdout.splitlines() if line.strip()][-2:]
    assert "runs/run-2" in last[0]
    assert last[1].endswith("report.html")


def test_the_lists(tmp_path):
    root = Path(__file__).parents[1]
    done = tenbit("--help", cwd=tmp_path)
    assert all(word in done.stdout for word in ("train", "report", "recipes", "algorithms", "precisions"))
    assert "grpo-seq-mis" in tenbit("algorithms", cwd=tmp_path).stdout
    assert "65504" in tenbit("precisions", cwd=tmp_path).stdout
    assert "demo.toml" in tenbit("recipes", cwd=root).stdout
    refused(tenbit("recipes", cwd=tmp_path), "no recipes")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_real_problems_with_math_verify(model_folder, tmp_path, family):
    """The whole command on the authors' perfectible set, as with a real model folder."""
    overrides = [
        "task.data=math_perfectible_r1d15b", "task.template=plain", "task.grader=math", "task.limit=200",
        "task.drop_long_prompts=true", "rollout.max_tokens=64", "precision=fp16", "steps=2", "--out=run",
    ]  # fmt: skip
    recipe(model_folder(family)).dump(tmp_path / "r.toml")
    done = tenbit("train", "r.toml", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows(tmp_path / "run")) == 2


def test_python_m_tenbit(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tenbit", "train", "nowhere.toml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    refused(done, "nowhere.toml")
