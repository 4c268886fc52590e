"""LoRA and the model under it: which layers of which family have an adapter, and that the base stays the same one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common_training import fresh_model
from conftest import small_module
from peft import PeftModel
from test_loop import QUIET
from test_lora import ONCE, adapter_of, lora_recipe
from transformers import AutoModelForCausalLM

from tenbit import Recipe, train
from tenbit.backends.choose import make_backend
from tenbit.export import export_adapter
from tenbit.models.lora import base_digest, described, linears, targets
from tenbit.precision import Format, Precision
from tenbit.recipe import BackendSpec
from tenbit.rehearsal import rehearse

MIXTURES = {
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
ADAPTED = {
    "jetmoe": {"kv_proj"}, "hunyuan_v1_moe": ATTENTION | MLP, "qwen2_moe": ATTENTION | MLP, "deepseek_v3": LATENT | MLP
}  # fmt: skip


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_of_a_mixture_no_router_and_no_routed_expert_has_one(family, meta, recwarn):
    module = small_module(family, **MIXTURES[family])
    plain_names = set(module.state_dict())
    wanted = linears(module)
    assert {name.rpartition(".")[2] for name in wanted} == ADAPTED[family]
    assert not [n for n in wanted if {"router", "gate", "experts", "shared_expert_gate"} & set(n.split("."))]
    if meta:
        module.to("meta")
    adapter = adapter_of()
    adapter.inject(module)
    assert {n for n, part in module.named_modules() if hasattr(part, "lora_A")} == set(wanted)
    assert {n for n, _ in adapter.merged(module.state_dict().items())} == plain_names
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
    assert f"on {len(wanted)} layers" in described(module, adapter.spec)
    assert "; its routed experts have none;" in described(module, adapter.spec)


def test_of_a_dense_model_every_layer_has_one_whatever_its_name():
    module = small_module("llama")
    module.model.layers[0].mlp.gate = torch.nn.Linear(64, 64)
    assert "model.layers.0.mlp.gate" in linears(module)


def test_adapters_in_other_places_than_asked_are_refused(monkeypatch):
    import peft

    def elsewhere(config, model):
        config.target_modules = {t for t in config.target_modules if not t.endswith("layers.1.self_attn.q_proj")}
        return mount(config, model)

    mount = peft.inject_adapter_in_model
    monkeypatch.setattr(peft, "inject_adapter_in_model", elsewhere)
    with pytest.raises(ValueError, match=r"lora\.targets: PEFT.*'llama'.*layers\.1\.self_attn\.q_proj.*lora\.targets"):
        adapter_of().inject(small_module("llama"))


def test_a_model_without_linear_layers_is_refused():
    module = small_module("gpt2", n_embd=64, n_head=4, n_layer=2)
    for wanted in ("all-linear", ("c_attn",)):
        with pytest.raises(ValueError, match=r"lora: model_type 'gpt2' has no linear layer.*lora = 'none'"):
            targets(module, wanted)


def test_of_a_state_space_mixer_only_the_first_layer_has_one():
    """Its kernels on GPUs take the other weights themselves, past an adapter."""
    sizes = {
        "num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8
    }  # fmt: skip
    mixer = [n for n in linears(small_module("bamba", **sizes)) if ".mamba." in n]
    assert mixer == ["model.layers.0.mamba.in_proj"]


@pytest.mark.parametrize("wanted", ["all-linear", ("gate_proj",)])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_peft_reads_the_adapter_of_a_mixture_with_shared_experts(family, wanted, tmp_path, recwarn):
    """In families that PEFT renames targets of, too: there its file names weights in place of layers."""
    model = fresh_model(family, adapter=adapter_of("fp16", targets=wanted), **MIXTURES[family])
    backend = make_backend(model, Precision.parse("fp16"), ONCE, 1.0, 9, BackendSpec())
    export_adapter(tmp_path / "adapter", replace(model, base="sha256:x"), backend, "builtin")
    about = json.loads((tmp_path / "adapter" / "tenbit_base.json").read_text())
    assert (about["format"], about["digest"]) == ("fp16", "sha256:x")

    merged = small_module(family, **MIXTURES[family])
    merged.load_state_dict(dict(model.adapter.merged(model.module.state_dict().items())))
    base = small_module(family, **MIXTURES[family])
    for p in base.parameters():
        p.data = p.data.half().float()
    ids = torch.arange(20)[None]
    before = base(ids).logits
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not [w for w in recwarn if "adapter keys" in str(w.message) or "pattern keys" in str(w.message)]
    ours = merged.eval()(ids).logits
    assert float((ours - before).abs().max()) > 0.05
    assert float((theirs(ids).logits - ours).norm()) < 1e-3 * float((ours - before).norm())


# --- the base


def test_the_digest_is_that_of_the_rounded_base():
    module = small_module()
    digest = adapter_of("fp16").inject(module)
    assert digest is not None
    assert digest == base_digest(module, Format.FP16), "of a model with its adapter"
    assert digest == base_digest(small_module(), Format.FP16)
    assert digest == base_digest(small_module().to(torch.float16), Format.FP16), "as the adapter's user loads it"
    assert digest == adapter_of("fp16", seed=1, rank=8).inject(small_module()), "of the base alone"
    other = small_module()
    row = other.model.layers[1].mlp.up_proj.weight.data[0]
    row[:2] = row[:2].flip(0)
    assert base_digest(other, Format.FP16) != digest
    assert base_digest(small_module(), Format.BF16) != digest
    assert adapter_of("fp16").inject(small_module().to("meta")) is None
    grouped = [small_module("deepseek_v3", **MIXTURES["deepseek_v3"]) for _ in range(2)]
    grouped[1].model.layers[1].mlp.gate.e_score_correction_bias += 1
    assert base_digest(grouped[0], Format.FP16) != base_digest(grouped[1], Format.FP16)


def test_a_run_does_not_go_on_beside_another_base(model_folder, tmp_path, grader):
    folder, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(model_folder("llama"), folder)
    train(lora_recipe(folder, grader, steps=1, precision="fp16"), out, console=QUIET)
    digest = json.loads((out / "adapter" / "tenbit_base.json").read_text())["digest"]
    checkpoint = out / "checkpoints" / "step-000001"
    about = json.loads((checkpoint / "state.json").read_text())
    assert about["base"] == digest == base_digest(AutoModelForCausalLM.from_pretrained(folder), Format.FP16)
    small_module("llama", seed=1).save_pretrained(folder)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"model\.path = .*step-000001 was trained beside.*Put the earlier ones back"):
        train(lora_recipe(folder, grader, steps=2, precision="fp16"), out, resume=True, console=QUIET)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    (checkpoint / "state.json").write_text(json.dumps({k: v for k, v in about.items() if k != "base"}))
    train(
        lora_recipe(folder, grader, steps=2, precision="fp16"), out, resume=True, console=QUIET
    )  # written before there was a digest


def test_none_trains_all_weights(tmp_path):
    given = {"steps": 1, "rollout": {"max_tokens": 8}, "lora": "none"}
    assert Recipe.of(given) == Recipe.of({k: v for k, v in given.items() if k != "lora"})
    file = Path(__file__).parent.parent / "recipes" / "cpu" / "lora.toml"
    found = Recipe.load(file, ["lora=none"])
    assert found.lora is None
    assert "lora" not in found.tree()
    assert rehearse(found, tmp_path / "run").model.adapter is None
    with pytest.raises(ValueError, match="lora"):
        Recipe.load(file, ["lora=some"])
