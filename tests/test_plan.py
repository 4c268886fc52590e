"""The planner: counts against published numbers and hand arithmetic, bytes against what is really held."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from common_training import fixed_rows, fresh_backend, one_step
from conftest import small_config, small_module
from ranks import on_ranks
from test_cli import refused, tenbit
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import tenbit.backends.single as single
from tenbit.batching import collate
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.recipe import ModelSpec, OptimSpec, Recipe
from tenbit.studies import plan as planning
from tenbit.studies import plan_memory as memory
from tenbit.studies.plan import Machine, make_plan
from tenbit.studies.plan_memory import GIB, Sampler, Trainer
from tenbit.studies.plan_model import Shape, find_config, measure, shipped
from tenbit.studies.plan_screen import changes
from tenbit.types import Batch

ROOT = Path(__file__).parents[1]
DENSE, MOE = ROOT / "recipes/dense_14b.toml", ROOT / "recipes/moe_30b.toml"
WIDE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 2000, "max_position_embeddings": 2048}  # fmt: skip


def shape_of(name: str) -> Shape:
    return Shape.of(find_config(name)[0])


# --- what a model weighs -------------------------------------------------------------------------------------------


def test_the_dense_model_by_hand_and_as_published():
    shape = shape_of("Qwen/Qwen3-14B-Base")
    attention = 5120 * (40 + 8 + 8) * 128 + 40 * 128 * 5120 + 2 * 128
    layer = attention + 3 * 5120 * 17408 + 2 * 5120
    assert shape.layer == layer
    assert shape.parameters == 40 * layer + 2 * 151936 * 5120 + 5120
    assert (shape.layers, shape.head, shape.largest) == (40, 151936 * 5120, 151936 * 5120)
    assert round(shape.parameters / 1e9, 1) == 14.8  # the model card: 14.8B, of which 13.2B without embeddings
    assert round((shape.parameters - 2 * shape.head) / 1e9, 1) == 13.2
    assert shape.cache_per_token * 2 == 2 * 40 * 8 * 128 * 2 == 163_840


def test_the_mixture_by_hand_and_as_published():
    shape = shape_of("Qwen/Qwen3-30B-A3B-Base")
    attention = 2048 * (32 + 4 + 4) * 128 + 32 * 128 * 2048 + 2 * 128
    experts = 128 * 3 * 2048 * 768
    layer = attention + experts + 128 * 2048 + 2 * 2048
    assert shape.layer == layer
    assert shape.parameters == 48 * layer + 2 * 151936 * 2048 + 2048
    assert shape.largest == 128 * 2 * 768 * 2048  # all experts of a layer, gate and up
    assert round(shape.parameters / 1e9, 1) == 30.5  # the model card: 30.5B, 3.3B activated, 29.9B without embeddings
    assert shape.active == shape.parameters - 48 * experts * 120 // 128
    assert 3.25e9 < shape.active < 3.4e9
    assert round((shape.parameters - 2 * shape.head) / 1e9, 1) == 29.9


def test_the_model_of_the_lora_recipe_by_hand_and_as_published():
    shape = shape_of("Qwen/Qwen2.5-Math-1.5B")
    attention = 1536 * (12 + 2 + 2) * 128 + (12 + 2 + 2) * 128 + 12 * 128 * 1536
    layer = attention + 3 * 1536 * 8960 + 2 * 1536
    assert shape.layer == layer
    assert shape.parameters == 28 * layer + 151936 * 1536 + 1536  # embedding and head are one
    assert shape.parameters == 1_543_714_304
    assert round((shape.parameters - shape.head) / 1e9, 2) == 1.31  # published: 1.54B, without embeddings 1.31B
    assert shape.context == 4096


def test_tied_heads_count_once(model_folder):
    shape = shape_of(str(model_folder("qwen2")))
    assert shape.parameters == sum(p.numel() for p in small_module("qwen2").parameters())
    assert shape.outside == 300 * 64 + 64


def test_every_shape_is_offered_by_its_name_and_for_a_folder_still_to_come():
    assert set(shipped()) == {"Qwen3-14B-Base", "Qwen3-30B-A3B-Base", "Qwen2.5-Math-1.5B"}
    config, source = find_config("./models/Qwen3-14B-Base")
    assert config.num_hidden_layers == 40
    assert "comes with tenbit" in source


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    asked = []

    def model_info(self, name, timeout):
        asked.append(name)
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(ValueError, match=r"the hub cannot be reached: no route\).*Qwen2\.5-Math-1\.5B, Qwen3-14B-Base"):
        find_config("nobody/no-such-model")
    assert asked == ["nobody/no-such-model"]


# --- activations ---------------------------------------------------------------------------------------------------


def seen_by_autograd(family: str, plan: Any, checkpointing: bool, tokens: int) -> tuple[int, int, Model]:
    """(bytes kept between forward and backward, most bytes allocated at a time), really, by the real backend."""
    if family == "moe":
        module = AutoModelForCausalLM.from_config(moe_config()).train()
    else:
        module = small_module(family, **WIDE).train()
    if checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = Model(module, None, (256,), 257, 2048, torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    backend = single.SingleBackend(model, Precision.parse(plan), OptimSpec.model_validate({}), 1.0, 10)
    batch = collate(fixed_rows(1), 257)
    long = {"tokens": torch.randint(0, 256, (1, tokens)), "mask": torch.ones(1, tokens - 1, dtype=torch.bool)}
    batch = dataclasses.replace(batch, **long, prompt_length=torch.tensor([1]), logp_rollout=torch.zeros(1, tokens - 1))
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logp, _ = backend._score(batch)
    kept = sum(s.nbytes() for s in storages.values())
    storages.clear()
    logp.sum().backward()
    return kept, peak_of(backend, batch), model


def peak_of(backend: single.SingleBackend, batch: Batch) -> int:
    """By the allocator's own events, in a second pass, in which the gradient sums are there already."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        backend._score(batch)[0].sum().backward()
    events = profile.profiler.kineto_results.events()  # pyright: ignore
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()  # pyright: ignore
        peak = max(peak, now)
    return peak


def moe_config() -> Qwen3MoeConfig:
    experts = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    return Qwen3MoeConfig.from_dict(WIDE | experts)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    ("family", "plan"),
    [("qwen2", "fp32"), ("qwen3", "fp16"), ("llama", {"preset": "bf16", "casting": "autocast"}), ("moe", "fp16")],
    ids=["qwen2-fp32", "qwen3-fp16", "llama-autocast", "moe-fp16"],
)
def test_activations_on_fake_tensors_are_those_on_real_ones(family, plan, checkpointing, monkeypatch):
    monkeypatch.setattr(single, "fuse", lambda module: [])
    kept, peak, model = seen_by_autograd(family, plan, checkpointing, 1024)
    use = measure(model.module.config, Precision.parse(plan), ModelSpec.model_validate({}), 1024, checkpointing)
    assert use.kept == pytest.approx(kept, rel=0.06)
    assert 0.97 < use.peak / peak < 1.35  # gradients of parameters are in the real peak and counted elsewhere here


def test_fused_layers_keep_less_than_is_planned():
    kept, peak, model = seen_by_autograd("qwen3", "fp32", False, 1024)
    use = measure(model.module.config, Precision.parse("fp32"), ModelSpec.model_validate({}), 1024, False)
    assert kept <= 1.001 * use.kept
    assert peak <= use.peak


# --- what is held between steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["fp32", "fp16", "bf16", {"preset": "fp16", "casting": "autocast"}], ids=str)
def test_one_process_holds_exactly_what_is_planned(plan):
    precision, backend = Precision.parse(plan), fresh_backend(plan)
    one_step(backend, fixed_rows(), 64)
    backend.accumulate(collate(fixed_rows(2), 257), lambda logp, batch: (logp.sum(), {}))
    tensors = {t.data_ptr(): t.nbytes for part, _, t in backend.live() if part != "logits"}
    shape, trainer = Shape.of(small_config("qwen2")), Trainer("single")
    planned = memory.total(memory.resident(shape, precision, trainer, 1))
    assert sum(tensors.values()) == planned + memory.gradients(shape, precision, trainer, 1).bytes


# tensors above DeepSpeed's threshold for staying gathered
SIZES = {"vocab_size": 1000, "hidden_size": 352, "intermediate_size": 704, "num_key_value_heads": 4}


WAYS = [
    {"name": "fsdp"},
    {"name": "fsdp", "reshard": False},
    {"name": "deepspeed", "stage": 1},
    {"name": "deepspeed", "stage": 2},
    {"name": "deepspeed", "stage": 3},
]


@pytest.mark.slow
@pytest.mark.scaling
def test_two_ranks_hold_what_is_planned(tmp_path, monkeypatch):
    """Every tensor of the process is counted, not those that the backend names."""
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(memory, "BUCKET", 10000)  # as in the ranks
    asked = [json.dumps({"plan": "fp16", "shape": SIZES, **way}) for way in WAYS]
    results = on_ranks(2, "ranks_of_plan.py", *asked, folder=tmp_path)
    shape, precision = Shape.of(small_config("qwen2", **SIZES)), Precision.parse("fp16")
    for text, way in zip(asked, WAYS, strict=True):
        trainer = Trainer(way["name"], way.get("stage", 0), way.get("reshard", True))
        resident = memory.total(memory.resident(shape, precision, trainer, 2))
        sums = 0 if trainer.stage == 3 else memory.gradients(shape, precision, trainer, 2).bytes
        if trainer.backend == "fsdp" and not trainer.reshard:  # gathered until the step
            sums += precision.copy_format.bytes * shape.parameters
        for result in results:
            assert result[text]["resident"] == pytest.approx(resident, rel=0.02), way
            assert result[text]["with gradients"] == pytest.approx(resident + sums, rel=0.02), way


# --- verdicts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def measured_once():
    """Measuring activations takes a second; what is the same for many plans is measured once."""
    kept = {}

    def remember(config, *rest):
        key = (config.to_json_string(), *map(str, rest))
        return kept[key] if key in kept else kept.setdefault(key, measure(config, *rest))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "measure", remember)
        yield


@pytest.fixture
def plans():
    """plans(recipe, gpus, memory, overrides)."""

    def make(recipe: Path, gpus: int, gb: float, *overrides: str):
        return make_plan(Recipe.load(recipe, list(overrides)), str(recipe), Machine(gpus, gb))

    return make


@pytest.mark.parametrize("recipe", [DENSE, MOE], ids=lambda p: p.stem)
def test_the_papers_settings_fit_as_their_recipes_say(plans, recipe):
    plan = plans(recipe, 64, 80)
    assert plan.asked.comfortable
    assert plan.chosen is plan.asked
    assert plan.asked.sequences >= 8
    assert plan.longest == 2048 + 20480 == plan.uses[True].tokens


def test_the_items_by_hand_for_the_dense_model_on_64_gpus(plans):
    plan, p = plans(DENSE, 64, 80), 14_768_307_200
    part = {item.name: item.bytes for item in plan.asked.train}
    assert part["FP32 masters"] == math.ceil(p / 64) * 4
    assert part["AdamW's moments"] == math.ceil(p / 64) * 8
    assert part["gradient sums"] == math.ceil(p / 64) * 4
    layer, head = 330_311_936, 151936 * 5120
    assert part["gathered weights"] == 2 * (2 * layer + 2 * head + 5120)
    assert part["gradients before reduction"] == (2 + 4) * layer + 2 * head
    assert part["activations"] == pytest.approx(40 * 22528 * 5120 * 2, rel=0.12)  # each layer's input, and a little
    sampled = {item.name: item.bytes for item in plan.asked.sample}
    assert sampled["engine's weights"] == 2 * p
    assert plan.asked.sequences == sampled["cache"] // (163_840 * 22528)
    assert memory.checkpoint_bytes(plan.shape) == 12 * p


def test_the_verdict_turns_where_the_bytes_do(plans):
    train = memory.total(plans(DENSE, 64, 80).asked.train) / GIB
    tight = plans(DENSE, 64, train + 0.1, "rollout.vllm.memory=0.5")
    assert memory.total(tight.asked.train) <= tight.machine.bytes
    short = plans(DENSE, 64, train - 0.1, "rollout.vllm.memory=0.5")
    assert not short.asked.fits
    assert "does not fit" in short.asked.verdict


@pytest.mark.parametrize(
    ("recipe", "gpus", "gb"),
    [(DENSE, 8, 80), (DENSE, 16, 80), (MOE, 8, 80), (MOE, 16, 141), (DENSE, 64, 40), (DENSE, 4, 141)],
    ids=lambda x: getattr(x, "stem", str(x)),
)
def test_a_recommendation_put_into_the_recipe_is_the_recipes_own_way(plans, recipe, gpus, gb):
    plan = plans(recipe, gpus, gb)
    assert plan.chosen is not None
    again = plans(recipe, gpus, gb, *changes(plan, plan.chosen))
    assert again.asked.trainer == plan.chosen.trainer
    assert again.asked.sampler == plan.chosen.sampler
    assert again.asked.peak == plan.chosen.peak
    assert again.asked.comfortable or not plan.chosen.comfortable
    assert changes(again, again.chosen or again.asked) == []


def test_more_ranks_hold_less_and_offload_moves_it_to_the_host(plans):
    few, many = plans(MOE, 8, 80), plans(MOE, 64, 80)
    way = Trainer("fsdp", checkpointing=True)
    pick = {n: next(o for o in p.outcomes if o.trainer == way) for n, p in ((8, few), (64, many))}
    assert memory.total(pick[8].train) > memory.total(pick[64].train)
    away = next(o for o in few.outcomes if o.trainer == dataclasses.replace(way, offload=True))
    moved = memory.total(away.host) - memory.total(pick[8].host)
    assert moved == 16 * few.shape.parameters
    assert memory.total(pick[8].train) - memory.total(away.train) == pytest.approx(moved / 8, rel=1e-6)


def test_tensor_parallelism_cannot_cut_a_key_value_head():
    shape, plan = shape_of("Qwen/Qwen3-30B-A3B-Base"), Precision.parse("fp16")
    tokens = [memory.cache_per_token(shape, plan, Sampler("vllm", n)) for n in (1, 2, 4, 8)]
    assert tokens == [98304, 49152, 24576, 24576]


def test_nothing_fits_on_one_small_gpu(plans):
    plan = plans(DENSE, 1, 24)
    assert plan.chosen is None
    assert not any(o.fits for o in plan.outcomes)


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [100, 160])
def test_the_screen_is_whole_at_every_width(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    done = tenbit("plan", "recipes/dense_14b.toml", "--gpus", "64", "--memory", "80", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    screen, command = done.stdout.split("To run it")
    assert "…" not in screen
    assert max(map(len, screen.splitlines())) <= width
    assert "As the recipe says: fsdp, gradient checkpointing; vLLM on each GPU: fits" in screen
    assert "torchrun --nnodes 8 --nproc-per-node 8" in command
    assert "train recipes/dense_14b.toml" in command


def test_json_adds_up():
    done = tenbit("plan", "recipes/moe_30b.toml", "--gpus", "16", "--json", cwd=ROOT)
    found = json.loads(done.stdout)
    assert found["shape"]["parameters"] == 30_532_122_624
    for outcome in [*found["outcomes"], found["recommended"]]:
        parts = outcome["parts"]
        sums = [sum(item["bytes"] for item in parts[key]) for key in ("training", "update", "sampling")]
        assert outcome["peak"] == max(sums)
        assert outcome["fits"] == (outcome["peak"] <= found["memory"] and outcome["sequences_per_engine"] > 0)


def test_overrides_reach_the_plan_and_the_command():
    keys = ("backend.name=deepspeed", "backend.stage=3", "algorithm.name=pg-tis")
    done = tenbit("plan", "recipes/moe_30b.toml", *keys, "--gpus", "8", "--memory", "141", cwd=ROOT)
    assert "As the recipe says: deepspeed ZeRO 3" in done.stdout
    assert "torchrun --nproc-per-node 8 -m tenbit train recipes/moe_30b.toml " + " ".join(keys) in done.stdout


def test_bad_input_names_the_key_and_the_remedy():
    def plan(*arguments: str):
        return tenbit("plan", "recipes/dense_14b.toml", *arguments, cwd=ROOT)

    refused(plan("--gpus", "12"), "--gpus 12", "whole nodes", "--gpus-per-node")
    refused(plan("--gpus", "0"), "--gpus 0", "positive")
    refused(plan("rollout.max_tokens=40000"), "rollout.max_tokens", "32768", "Lower it")
    refused(plan("model.path=./nowhere"), "model.path", "no such folder")
    refused(plan("backend.name=single", "--gpus", "8"), "backend.name", "--gpus 1")
    refused(plan("rollout.vllm.options.tensor_parallel_size=3", "--gpus", "8"), "tensor_parallel_size = 3")
    refused(plan("rollout.engine=ray", "rollout.ray.engines=8", "--gpus", "8"), "rollout.ray.engines")
    refused(plan("backend.name=deepspeed", "precision=fp16", "precision.casting=autocast", "--gpus", "8"), "autocast")
    refused(plan("optim.tokens=1"), "optim.tokens")


# --- Table 3 -------------------------------------------------------------------------------------------------------


def test_the_recipes_are_table_3():
    dense, moe = Recipe.load(DENSE), Recipe.load(MOE)
    for recipe in (dense, moe):
        assert recipe.rollout.prompts == 512
        assert recipe.rollout.samples == 16
        assert recipe.rollout.max_tokens == 20480
        assert recipe.rollout.temperature == recipe.rollout.top_p == 1
        assert recipe.rollout.prompts / recipe.optim.updates == 32  # ppo_mini_batch_size
        assert recipe.optim.token_budget == 22528
        assert recipe.optim.lr == 1e-6
        assert recipe.precision == Precision.parse("fp16")
    assert dense.optim.betas == (0.9, 0.999)
    assert dense.optim.eps == 1e-8
    assert (dense.optim.warmup, dense.optim.weight_decay) == (10, 0.1)
    assert (moe.optim.warmup, moe.optim.weight_decay) == (0, 0.0)
    assert moe.optim.betas == (0.9, 0.95)
    assert moe.optim.eps == 1e-15
    assert (dense.eval.temperature, dense.eval.top_p, dense.eval.samples) == (1.0, 0.7, 8)
    assert (moe.eval.temperature, moe.eval.top_p, moe.eval.samples) == (0.6, 1.0, 32)
    assert dense.dynamic_sampling
    assert dense.rollout.max_rounds == 10
    assert dense.overlong_buffer == 4096
    assert not moe.dynamic_sampling
    assert moe.overlong_buffer == 0
    clip = dense.algorithm.build().objective.clip  # pyright: ignore
    assert (clip.low, clip.high, clip.dual) == (0.2, 0.28, 10.0)
    assert dense.algorithm.build().reduction == "token-mean"
    for name in ("grpo-seq-mis", "grpo-token-tis", "pg-tis"):
        how = Recipe.load(MOE, [f"algorithm.name={name}"]).algorithm.build()
        assert how.reduction == "dr-grpo"
        assert how.objective.correction.cap == 3.0  # pyright: ignore
        if name != "pg-tis":
            assert (how.objective.clip.low, how.objective.clip.high) == (0.2, 0.28)  # pyright: ignore


# --- docs/scaling.md -----------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs/scaling.md").read_text()


def test_the_documents_table_is_what_the_planner_says(plans):
    rows = dict(re.findall(r"^\| \**([^|*]+?)\** \| ([^|]+ \| [^|]+) \|$", PAGE, re.MULTILINE))
    state = ("FP32 masters", "AdamW's moments", "gradient sums")
    moving = ("gathered weights", "gradients before reduction")
    found: dict[str, list[str]] = {}
    for file in (DENSE, MOE):
        plan = plans(file, 64, 80)
        train = {part.name: part.bytes / GIB for part in plan.asked.train}
        sequence = plan.shape.cache_per_token * 2 * plan.longest / GIB
        numbers = {
            "masters, moments, gradient sums": sum(train[name] for name in state),
            "gathered weights, gradients before reduction": sum(train[name] for name in moving),
            "activations without checkpointing": plan.uses[False].peak / GIB,
            "activations with it": plan.uses[True].peak / GIB,
            "training, at the largest moment": memory.total(plan.asked.train) / GIB,
            "weight update": memory.total(plan.asked.update) / GIB,
            "engine's weights, one GPU": 2 * plan.shape.parameters / GIB,
            "cache of one full-length sequence": sequence,
            "host memory of the first node": memory.total(plan.asked.host) / GIB,
        }
        for name, number in numbers.items():
            found.setdefault(name, []).append(f"{number:.1f}")
        assert f"{memory.checkpoint_bytes(plan.shape) / GIB:.0f}" in rows["a checkpoint"]
    assert {name: rows[name] for name in found} == {name: " | ".join(both) for name, both in found.items()}


def test_bytes_per_parameter_are_those_in_the_document():
    shape, ranks = shape_of("Qwen/Qwen3-14B-Base"), 64
    rows = re.findall(
        r"^\| (single|fsdp|deepspeed)(?:, ZeRO (\d))? \| (.+) \| (.+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE
    )
    assert len(rows) == 5
    for backend, stage, *cells in rows:
        trainer = Trainer(backend, int(stage or 0))
        plans = ("fp16", "fp32", {"preset": "fp16", "casting": "autocast"}, "fp16")
        for column, (cell, spec) in enumerate(zip(cells, plans, strict=True)):
            if cell == "refused":
                with pytest.raises(ValueError, match="autocast"):
                    Precision.parse(spec).deepspeed()
                continue
            plan = Precision.parse(spec)
            held = [part for part in memory.resident(shape, plan, trainer, ranks) if part.exact]
            if column < 3 and trainer.stage != 3:
                held.append(memory.gradients(shape, plan, trainer, ranks))
            said = eval(cell.split("=")[-1].replace("N", str(ranks)))
            assert memory.total(held) == pytest.approx(said * shape.parameters, rel=1e-6), (backend, stage, column)


def test_every_command_in_the_document_is_understood():
    """`tenbit plan` runs; of what torchrun would start, the recipe is resolved with its overrides."""
    text = PAGE.replace("\\\n", " ")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    plans = [shlex.split(line) for line in lines if line.startswith("tenbit plan")]
    trains = [shlex.split(line.split("-m tenbit train ")[1]) for line in lines if "-m tenbit train " in line]
    assert len(plans) >= 4
    assert len(trains) >= 5
    for words in plans:
        done = tenbit(*words[1:], cwd=ROOT)
        assert done.returncode == 0, done.stderr
    for recipe, *rest in trains:
        assert Recipe.load(ROOT / recipe, [word for word in rest if "=" in word])


@pytest.mark.parametrize(
    ("changes", "machine", "prompt", "words"),
    [
        ({}, {"memory": math.nan}, 64, "--memory nan"),
        ({}, {"memory": math.inf}, 64, "--memory inf"),
        ({}, {}, 0, "--prompt-tokens 0"),
        ({"engine": "vllm", "vllm": {"options": {"tensor_parallel_size": 0}}}, {}, 64, "tensor_parallel_size = 0"),
        ({"engine": "vllm", "vllm": {"options": {"tensor_parallel_size": "two"}}}, {}, 64, "= 'two' must be a whole"),
        ({"engine": "vllm", "vllm": {"options": {"tensor_parallel_size": 4}}}, {"gpus": 6}, 64, "the 6 GPUs of a node"),
        (
            {"engine": "ray", "ray": {"engine": "torch", "engines": 12}},
            {"gpus": 32},
            64,
            "a pool of 12 GPUs is not whole nodes of 8",
        ),
    ],
)
def test_what_could_not_be_started_is_not_planned(changes, machine, prompt, words):
    recipe = Recipe.load("recipes/dense_14b.toml").tree()
    recipe["rollout"] |= changes
    with pytest.raises(ValueError, match=words):
        make_plan(Recipe.of(recipe), "r.toml", Machine(**{"gpus": 8, "memory": 80.0, "per_node": 8} | machine), prompt)
