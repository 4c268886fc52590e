"""The paper's mixture of experts, planned and rehearsed from its configuration: no weights, no hub."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from tenbit import Recipe
from tenbit.backends.fsdp import placement
from tenbit.models.experts import router_layers, routers
from tenbit.rehearsal import rehearse, show
from tenbit.studies.plan import Machine, make_plan

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "moe_30b.toml"
H, LAYERS, EXPERTS, TOP, I, HEADS, KV, DIM, V = 2048, 48, 128, 8, 768, 32, 4, 128, 151936


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Its real configuration and a tokenizer; no weights."""
    made = tmp_path_factory.mktemp("a3b")
    (config,) = (ROOT / "tenbit" / "models" / "shapes").glob("Qwen3-30B-A3B-Base.json")
    (made / "config.json").write_text(config.read_text())
    byte_tokenizer().save_pretrained(made)
    return made


def by_hand(experts: int) -> int:
    """Parameters, if each token met so many experts."""
    attention = H * DIM * (HEADS + 2 * KV) + HEADS * DIM * H + 2 * DIM
    layer = attention + EXPERTS * H + experts * 3 * I * H + 2 * H
    return 2 * V * H + LAYERS * layer + H


def test_its_size_is_what_the_configuration_says(folder):
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"]) == (EXPERTS, TOP)
    plan = make_plan(Recipe.load(RECIPE, [f"model.path={folder}"]), str(RECIPE), Machine(64, 80))
    assert plan.shape.parameters == by_hand(EXPERTS) == 30_532_122_624
    assert by_hand(TOP) == 3_353_032_704  # the A3B of its name: 3.3 billion at work for a token


@pytest.mark.parametrize("ranks", [8, 24, 48, 64])
def test_fsdp_gives_every_rank_an_even_share_of_it(folder, ranks):
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert len(routers(module)) == LAYERS
    assert router_layers(module) == list(range(LAYERS))
    held = 0
    for p in module.parameters():
        place = placement(p.shape, ranks)
        size = p.shape[0 if place is None else place.dim]
        held += -(-size // ranks) * p.numel() // size
    assert held <= 1.01 * by_hand(EXPERTS) / ranks


def test_a_dry_run_goes_as_far_as_it_can_without_weights(folder, tmp_path):
    """Configuration, tokenizer, templates, prompts against the context; the model's weights are not asked for."""
    changes = [f"model.path={folder}", "task.data=aime24", "task.template=plain", "rollout.replay=true"]
    changes += ["backend.name=auto"]
    rehearsal = rehearse(Recipe.load(RECIPE, changes), tmp_path / "run")
    screen = io.StringIO()
    show(rehearsal, Console(file=screen, width=160))
    assert sum(p.numel() for p in rehearsal.model.module.parameters()) == by_hand(EXPERTS)
    assert {p.device.type for p in rehearsal.model.module.parameters()} == {"meta"}
    said = " ".join(screen.getvalue().split())
    assert "qwen3_moe" in said
    assert f"model.path = '{folder}': the folder holds a configuration but no weights" in said
    assert not (tmp_path / "run").exists()
    assert not re.search(r"nan|None", said)
