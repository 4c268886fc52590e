"""What a reader once broke: each test is the shortest way to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import byte_tokenizer, small_module
from safetensors.torch import load_file, save_file
from test_cli import refused, tenbit
from test_loop import QUIET, recipe, rows

from tenbit import Recipe, train
from tenbit.folder import choose_folder
from tenbit.models import loading
from tenbit.precision import Precision
from tenbit.prompts import set_name


@pytest.fixture
def command(model_folder, tmp_path):
    """command("--out=o", steps=2) writes the small recipe with changes and trains."""

    def run(*arguments: str, model=None, **changes) -> subprocess.CompletedProcess:
        recipe(model or model_folder(), **{"steps": 1, **changes}).dump(tmp_path / "r.toml")
        return tenbit("train", "r.toml", *arguments, cwd=tmp_path)

    return run


@pytest.fixture
def damaged(model_folder, tmp_path):
    """damaged("llama") -> a copy of a model folder that may be spoilt."""
    return lambda family="qwen2": shutil.copytree(model_folder(family), tmp_path / "model")


# --- models


def test_a_greedy_generation_config_with_a_temperature_is_exported_at_the_end(damaged, command, tmp_path):
    """Many published models have one; the library loads it and refuses to save it."""
    folder = damaged()
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "do_sample": False, "temperature": 0.6}))
    done = command("--out=o", model=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "o/model/generation_config.json").read_text())["eos_token_id"] == 256


def test_missing_weights_are_not_made_up(damaged, command, tmp_path):
    folder = damaged("llama")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(command("--out=o", model=folder), "lm_head.weight", "random")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("file", "spoil", "word"),
    [
        ("model.safetensors", lambda b: b[: len(b) // 2], "loaded"),
        ("config.json", lambda b: b.replace(b'"intermediate_size": 160', b'"intermediate_size": 128'), "loaded"),
        ("tokenizer.json", lambda b: b"{}", "tokenizer"),
    ],
)
def test_damaged_files_are_bad_input(damaged, command, file, spoil, word):
    folder = damaged()
    (folder / file).write_bytes(spoil((folder / file).read_bytes()))
    refused(command("--out=o", model=folder), "model.path", word)


def test_a_pad_token_beyond_the_embedding(command, tmp_path):
    folder = tmp_path / "model"
    small_module(vocab_size=257, pad_token_id=None).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    refused(command("--out=o", model=folder), "<|pad|>", "257", "model.pad_token")


@pytest.mark.parametrize(
    ("family", "changes", "refuses"),
    [("GPT2", {}, "_pdrop"), ("GPTNeoX", {}, None), ("GPTNeoX", {"hidden_dropout": 0.1}, "hidden_dropout")],
)
def test_dropout_by_other_names(tmp_path, family, changes, refuses):
    """GPT-2 calls it resid_pdrop; Pythia's classifier_dropout is not on the way to a token."""
    import transformers

    sizes = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, f"{family}Config")(**sizes, eos_token_id=256, bos_token_id=256, **changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    spec = Recipe.of({"steps": 1, "rollout": {"max_tokens": 8}, "model": {"path": str(tmp_path)}}).model
    if refuses is None:
        assert loading.load(spec).context > 0
    else:
        with pytest.raises(ValueError, match=refuses):
            loading.load(spec)


# --- data and recipes


def test_two_evaluation_sets_of_one_name_are_refused(command, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    refused(command("--out=o", eval__every=1, eval__data=["a/x.jsonl", "b/x.jsonl"]), "eval.data", "eval/x")


def test_names_of_evaluation_sets():
    assert [set_name(s) for s in ("aime24", "d/x.jsonl.gz", "x.parquet", "folder/", "me/MATH-v1.5:main")] == [
        "aime24", "x", "x", "folder", "MATH-v1.5:main",
    ]  # fmt: skip


def test_shipped_sets_and_evaluation_sets_have_their_own_keys(command, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (tmp_path / "e.jsonl").write_text('{"asked": "1+2", "answer": "3"}\n')
    asked = {"task__data": "q.jsonl", "task__problem_key": "question", "eval__every": 1, "eval__limit": 1}
    done = command("--out=o", **asked, eval__data=["arithmetic_test", "e.jsonl"], eval__problem_key="asked")
    assert done.returncode == 0, done.stderr
    assert {"eval/arithmetic_test/avg@1", "eval/e/avg@1"} <= rows(tmp_path / "o")[-1].keys()


def test_half_a_surrogate_pair_is_a_malformed_row(command, tmp_path):
    (tmp_path / "s.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "\\ud800", "answer": "2"}\n')
    refused(command("--out=o", task__data="s.jsonl"), "s.jsonl:2", "Unicode")


def test_an_evaluation_that_exceeds_the_context_names_its_own_key(command):
    refused(command("--out=o", eval__every=1, eval__data=["arithmetic_test"], eval__max_tokens=600), "eval.max_tokens")


def test_values_that_torch_or_the_disk_would_refuse_later(command, tmp_path):
    command("--out=o")
    refused(tenbit("train", "r.toml", "optim.betas=[1.5, 0.9]", cwd=tmp_path), "optim.betas", "less than 1")
    refused(tenbit("train", "r.toml", "name=..", cwd=tmp_path), "name")
    refused(tenbit("train", "r.toml", "--out=r.toml/o", cwd=tmp_path), "r.toml/o", "another folder")
    refused(tenbit("train", "r.toml", "--out=/proc/nowhere/o", cwd=tmp_path), "/proc/nowhere/o")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "bad.toml").write_text('algorithm = "grpo"\n')
    refused(tenbit("recipes", cwd=tmp_path), "bad.toml", "algorithm")


# --- resuming


def test_resuming_never_cuts_a_folder_that_holds_no_run_of_ours(command, tmp_path):
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/metrics.jsonl").write_text('{"step": 1}\n')
    refused(command("--resume"), "no run to resume")
    assert (tmp_path / "runs/run/metrics.jsonl").read_text() == '{"step": 1}\n'


def test_resuming_with_fewer_steps_than_are_done(command, tmp_path):
    assert command("--out=o", steps=2).returncode == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("*") if p.is_file() and p.name != ".lock"}
    refused(command("--out=o", "--resume", steps=1), "2 steps are done")
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_start_that_was_killed_at_once_can_be_repeated(command, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o/.lock").touch()
    (tmp_path / "o/recipe.toml.tmp").write_text('name = "ru')
    assert command("--out=o").returncode == 0
    assert not (tmp_path / "o/recipe.toml.tmp").exists()


def test_resuming_without_out_takes_the_newest(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = recipe(model_folder())
    for name in ("run", "run-2"):
        assert str(choose_folder(wanted, None, False)) == f"runs/{name}"
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert str(choose_folder(wanted, None, True)) == "runs/run-2"


def test_failures_of_grading_are_counted_by_step_and_so_survive_a_resume(model_folder, tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(
        "def reward(problem, text):\n    if len(text) % 2:\n        raise KeyError('odd')\n    return 0.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    whole = rows(train(recipe(model_folder(), task__grader="odd:reward"), tmp_path / "whole", console=QUIET))
    train(recipe(model_folder(), task__grader="odd:reward", steps=1), tmp_path / "cut", console=QUIET)
    train(recipe(model_folder(), task__grader="odd:reward"), tmp_path / "cut", resume=True, console=QUIET)
    assert rows(tmp_path / "cut") == whole
    assert all(0 < row["grade/error"] <= 12 for row in whole)


def test_gradients_are_held_against_the_plan(model_folder, tmp_path, monkeypatch):
    """They exist between backward and step only; a look after the step sees none."""
    looks = []
    verify = Precision.verify
    monkeypatch.setattr(Precision, "verify", lambda plan, live: looks.append(verify(plan, live)) or looks[-1])
    train(recipe(model_folder(), precision="fp16", steps=1), tmp_path / "o", console=QUIET)
    assert any(look.get("gradient") == look["master"] for look in looks)


def test_what_a_killed_save_left_is_removed(model_folder, tmp_path):
    folder = train(recipe(model_folder(), steps=1), tmp_path / "o", console=QUIET)
    (folder / "checkpoints/.step-000099.tmp").mkdir()
    train(recipe(model_folder(), steps=2), folder, resume=True, console=QUIET)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_says_something(model_folder, tmp_path):
    """Sent while the formats are compared, which takes long here."""
    changes = {"compare__precisions": ["fp16"], "compare__prompts": 500, "compare__samples": 64, "task__limit": 500}
    recipe(model_folder(), **changes).dump(tmp_path / "r.toml")
    process = subprocess.Popen(
        [sys.executable, "-m", "tenbit", "train", "r.toml", "--out=o"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "o/samples.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert b"--resume" in output
    assert b"Traceback" not in output
