"""What `tenbit audit` does not see, refuses or says beside its verdict; and that it writes the plan that it audited."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from audited import (
    LONGEST,
    VLLM_FOLLOWS,
    answers,
    audited,
    experts,
    inside_attention,
    inside_mlp,
    recipe_for,
    small_stream,
    spoilt,
    stream,
)
from conftest import small_module
from rich.console import Console
from test_audit import ASKED, RECIPE, saved
from test_cli import tenbit

from tenbit import Recipe
from tenbit.advantages import ADVANTAGES
from tenbit.batching import totals
from tenbit.models.loading import load
from tenbit.precision import Precision
from tenbit.recipe import ModelSpec
from tenbit.scoring import sample
from tenbit.studies import evaluation_plan, probe_plan
from tenbit.studies.audit import audit_model, run
from tenbit.studies.audit_notes import few, unfollowed
from tenbit.studies.audit_plan import applied_path, make_plan, table_of
from tenbit.studies.audit_run import confirm, largest_advantage, rows_of, watch
from tenbit.studies.audit_where import first_bad
from tenbit.types import Prompt, Totals

GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # one forward pass must be the other's
QUICK = {"data": "arithmetic_test", "prompts": 4, "max_tokens": 16}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models that are spoilt in a known way."""
    folder = tmp_path_factory.mktemp("models")
    made = {"plain": None, "stream": stream, "mlp": inside_mlp, "attention": inside_attention}
    return {name: saved(spoilt(spoil), folder / name) for name, spoil in made.items()}


def written(folder: Path, model: Any, grader: str, precision: str = "", more: str = "") -> Path:
    recipe = folder / "mine.toml"
    text = RECIPE.format(model=model, grader=grader, precision=precision, optim="")
    recipe.write_text(text.replace("[rollout]\n", f"[rollout]\n{more}"))
    return recipe


# --- the plan that is written is the plan that was audited


@pytest.mark.parametrize(
    ("own", "named", "keys", "model"),
    [
        ('precision = "bf16"', "fp16", [], "stream"),
        ('precision = "bf16"', "fp16", [], "mlp"),
        ('precision = "bf16"', "fp16", [], "plain"),  # no remedy, and still another plan than the recipe's
        ('precision = "fp16"', None, ["precision.head=fp32", "precision.loss_scale.interval=9"], "stream"),
        ('precision = {preset = "fp16", loss_scale = {initial = 64.0}}', "bf16", [], "plain"),
        ('precision = "bf16"', "fp16/fp8", ["precision.sync=fp32"], "stream"),
    ],
)
def test_the_recipe_that_is_written_has_the_plan_that_was_audited(own, named, keys, model, models, tmp_path, grader):
    recipe = written(tmp_path, models[model], grader, own)
    found = run(make_plan(str(models[model]), QUICK, named, recipe, keys), tmp_path / "out", Console(quiet=True))
    assert found.verdict.kind == ("safe" if model == "plain" else "safe with")
    assert Recipe.load(applied_path(recipe)).precision == found.plan
    assert found.plan != Recipe.load(recipe).precision


@pytest.mark.parametrize("text", ["fp16", "bf16/fp32", "fp16/fp8", "fp16/fp16~4", "fp32"])
def test_a_plan_as_a_table_is_that_plan(text):
    plan = Precision.parse(text)
    assert table_of(plan) == {"preset": text}
    wider = Precision.parse({"preset": text, "head": "fp32", "sync": "fp32"})
    assert Precision.parse(table_of(wider)) == wider


def test_a_plan_that_the_recipe_could_not_hold_is_refused_first(tmp_path, grader):
    recipe = written(tmp_path, "builtin", grader)
    recipe.write_text(recipe.read_text() + '\n[lora]\nrollout = "adapter"\n')
    with pytest.raises(ValueError, match="precision rounds what is rolled out"):
        make_plan("builtin", QUICK, "fp16/fp8", recipe)


def test_another_model_than_the_recipes_is_said(models, tmp_path, grader):
    recipe = written(tmp_path, "builtin", grader)
    done = tenbit("audit", str(models["stream"]), *ASKED, "--apply", str(recipe), "--out", "found", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = "trains model.path = 'builtin': what is found is of the former"
    assert said in done.stdout
    assert any(said in note for note in json.loads((tmp_path / "found" / "audit.json").read_text())["notes"])


# --- sums of gradients


def test_sums_in_fp16_get_the_remedy_that_they_be_fp32():
    found = audited(spoilt(), {"preset": "fp16", "reduce": "fp16"})
    assert (found.verdict.kind, found.verdict.remedies) == ("safe with", {"reduce": "fp32"})
    assert found.verdict.modules == ()
    assert "add up in fp16" in found.verdict.because[0]
    assert audited(spoilt(), {"preset": "bf16", "reduce": "bf16"}).verdict.kind == "safe"  # they have no end to reach


def test_why_few_answers_cannot_judge_sums_in_fp16():
    """At the highest scale of eight answers the sum over 128 overflows in FP16, and in FP32 it does not."""
    model, recipe = spoilt(), recipe_for()
    prompts = [Prompt(tuple(range(40 + i % 30, 50 + i % 30)), i) for i in range(128)]
    rows = rows_of(sample(recipe, model, Precision.parse("fp32"), prompts))
    total = totals(rows, LONGEST)
    high = audit_model(model, recipe, rows[:8], total, lambda text: None, {}).window_before.high
    trials = {}
    for reduce in ("fp16", "fp32"):
        plan = Precision.parse({"preset": "fp16", "reduce": reduce, "loss_scale": {"initial": high}})
        trials[reduce] = confirm(model, recipe, plan, rows, total, watch(model, recipe, plan, rows, total))
    assert not trials["fp16"].finite
    assert trials["fp32"].finite


# --- what vLLM does not follow


def recipe_with(engine: str, **more: Any) -> Recipe:
    return Recipe.of({"steps": 1, "rollout": {"engine": engine, "max_tokens": 8}, **more})


@pytest.mark.parametrize(("family", "plan", "refused"), VLLM_FOLLOWS)
def test_what_vllm_does_not_follow_is_known(family, plan, refused):
    """`tests/test_fit_vllm.py` holds the same table against vLLM itself."""
    module, precision = small_module(family), Precision.parse({"preset": "fp16", **plan})
    said = unfollowed(precision, recipe_with("vllm"), module)
    assert len(said) == bool(refused)
    assert all(word in said[0] for word in refused)
    assert all("rollout.engine = 'torch' does" in text for text in said)
    assert "'model.layers.1.mlp'" not in "".join(said) or "model.layers.1.mlp" in refused
    assert unfollowed(precision, recipe_with("torch"), module) == []
    assert unfollowed(precision, None, module) == []
    assert bool(unfollowed(precision, recipe_with("ray"), module)) == bool(refused)
    pool = Recipe.of({"steps": 1, "rollout": {"engine": "ray", "max_tokens": 8, "ray": {"engine": "torch"}}})
    assert unfollowed(precision, pool, module) == []


def test_an_adapter_beside_vllms_weights_follows_neither():
    plan = Precision.parse({"preset": "fp16", "fp32": ["model.layers.1.mlp"], "residual_scale": 0.5})
    (said,) = unfollowed(plan, recipe_with("vllm", lora={"rollout": "adapter"}), small_module("llama"))
    assert "precision.fp32 or precision.residual_scale beside an adapter" in said
    assert "lora.rollout = 'merged' works" in said
    assert unfollowed(plan, recipe_with("vllm", lora={"rank": 4}), small_module("llama")) == []


def test_a_remedy_that_the_recipes_engine_refuses_is_not_called_applied(models, tmp_path, grader):
    recipe = written(tmp_path, models["attention"], grader, more='engine = "vllm"\n')
    done = tenbit("audit", str(models["attention"]), *ASKED, "--apply", str(recipe), "--out", "found", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = "rollout.engine = 'vllm' does not follow precision.fp32: 'model.layers.0.self_attn'"
    assert said in done.stdout
    assert "applied" not in done.stdout
    assert "its engine does not follow it" in done.stdout
    (text,) = json.loads((tmp_path / "found" / "audit.json").read_text())["unfollowed"]
    assert text.startswith(said)
    assert "does not follow precision.fp32" in (tmp_path / "found" / "audit.html").read_text()
    assert f"# {said}" in applied_path(recipe).read_text()


# --- what is refused at once


def test_weights_that_are_not_finite_are_named_when_a_model_is_loaded(tmp_path):
    model = spoilt()
    with torch.no_grad():
        model.module.model.layers[0].mlp.up_proj.weight[3, 3] = math.nan
        model.module.model.embed_tokens.weight[200, 1] = math.inf  # no token that the trial of the head looks at
    folder = saved(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"model.path: inf or NaN in .*embed_tokens.weight, .*0.mlp.up_proj.weight"):
        load(ModelSpec.model_validate({"path": str(folder)}))
    done = tenbit("audit", str(folder), *ASKED, cwd=tmp_path)
    assert done.returncode == 2
    assert "model.layers.0.mlp.up_proj.weight" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_logits_beyond_fp32_are_not_taken_for_another_head(tmp_path):
    model = spoilt()
    with torch.no_grad():
        model.module.model.norm.weight *= 1e25
        model.module.lm_head.weight *= 1e25
    folder = saved(model, tmp_path / "model")
    with pytest.raises(ValueError, match="logits are inf or NaN in FP32, though no weight is"):
        load(ModelSpec.model_validate({"path": str(folder)}))


def test_a_misspelt_layer_is_refused_before_anything_is_sampled(tmp_path):
    done = tenbit("audit", "builtin", *ASKED, 'precision.fp32=["model.layers.1.mpl"]', cwd=tmp_path)
    assert done.returncode == 2
    assert "the model has no module 'model.layers.1.mpl'" in done.stderr
    assert "sampling" not in done.stdout


# --- advantages


@pytest.mark.parametrize("group", [2, 3, 8, 16])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_are_as_large_as_the_algorithm_makes_them(name, group):
    """One right answer of G: sqrt(G) - 1 / sqrt(G) with the unbiased deviation, 1 of leave-one-out, 1 - 1/G of mean."""
    g = group
    wanted = {
        "leave-one-out": 1.0, "group-mean": 1 - 1 / g, "reward": 1.0, "group-mean-std": (g - 1) / math.sqrt(g),
        "leave-one-out-std": math.sqrt(g),
    }  # fmt: skip
    assert largest_advantage(ADVANTAGES[name], g) == pytest.approx(wanted[name], rel=1e-5)
    assert largest_advantage(ADVANTAGES[name], 1) == 1.0


def test_the_recipes_algorithm_and_group_decide_the_advantages(tmp_path, grader):
    recipe = written(tmp_path, "builtin", grader)
    recipe.write_text(recipe.read_text().replace("samples = 2", "samples = 16") + '\n[algorithm]\nname = "dapo"\n')
    assert make_plan("builtin", QUICK, apply=recipe).advantage == pytest.approx(3.75, rel=1e-5)
    assert make_plan("builtin", QUICK).advantage == 1.0
    for given in ("algorithm.name=dapo", "algorithm.advantage=group-mean-std"):
        plan = make_plan("builtin", QUICK, overrides=[given])
        assert plan.advantage == pytest.approx(7 / math.sqrt(8), rel=1e-5)
    model = spoilt()
    rows = answers(model, recipe_for())
    larger = rows_of([r.rollout.completion for r in rows], 4.0)
    assert {r.advantage for r in larger} == {4.0, -4.0}
    found = [audit_model(model, recipe_for(), x, totals(x, LONGEST), lambda text: None, {}) for x in (rows, larger)]
    assert found[1].window.high == found[0].window.high / 4


# --- the same keys elsewhere


def test_evaluate_and_probe_take_the_same_keys():
    key = "precision.residual_scale=0.125"
    plan = evaluation_plan.make_plan("builtin", data=["arithmetic_test"], overrides=[key])
    assert plan.recipe.precision == Precision.parse({"preset": "fp16", "residual_scale": 0.125})
    plan = evaluation_plan.make_plan("builtin", data=["arithmetic_test"], precision="bf16", overrides=[key])
    assert plan.recipe.precision == Precision.parse({"preset": "bf16", "residual_scale": 0.125})
    given = ["precision.fp32=['model.layers.0.mlp']", key]
    for p, name in zip(probe_plan.make_plan("builtin", overrides=given).precisions, ("fp16", "bf16"), strict=True):
        assert p == Precision.parse({"preset": name, "residual_scale": 0.125, "fp32": ["model.layers.0.mlp"]})
    (only,) = probe_plan.make_plan("builtin", precision="fp16/fp8", overrides=["precision.head=fp32"]).precisions
    assert only == Precision.parse({"preset": "fp16/fp8", "head": "fp32"})
    with pytest.raises(ValueError, match="write --precision instead"):
        probe_plan.make_plan("builtin", overrides=["precision=fp32"])
    with pytest.raises(ValueError, match="makes fp16/bf16 of fp16"):
        probe_plan.make_plan("builtin", precision="fp16", overrides=["precision.rollout=bf16"])


# --- the trial


@pytest.mark.parametrize(
    ("spoil", "shape", "named"),
    [
        (inside_mlp, {}, "model.layers.1.mlp.down_proj input"),
        (inside_attention, {}, "model.layers.0.self_attn.v_proj output"),
        (experts, {"family": "qwen3_moe"}, "model.layers.1.mlp.experts inside"),
        (small_stream, {"rms_norm_eps": 1e-12}, "model.norm input"),
    ],
)
def test_a_trial_that_fails_names_the_first_module(spoil, shape, named):
    """Backward the first is the last norm: it is the first to divide by a small stream."""
    model, recipe = spoilt(spoil, **shape), recipe_for()
    rows = answers(model, recipe)
    total = totals(rows, LONGEST)
    trial = confirm(model, recipe, recipe.precision, rows, total, watch(model, recipe, recipe.precision, rows, total))
    assert trial.failed.endswith(f": the first is {'the gradient of ' * (spoil is small_stream)}{named}")
    assert trial.where == named.rpartition(" ")[0]
    assert first_bad(spoilt(), recipe, recipe.precision, rows, total) is None


def test_a_norm_that_a_vanished_gradient_has_fails_the_trial():
    """At a scale of 1 and a step of 2^23 answers, FP16 gradients are zeros: finite, and no gradients."""
    model, recipe = spoilt(), recipe_for({"preset": "fp16", "loss_scale": {"initial": 1.0}})
    rows = answers(model, recipe)
    total = Totals(2**23, 2**26, LONGEST)
    seen = watch(model, recipe, recipe.precision, rows, total)
    trial = confirm(model, recipe, recipe.precision, rows, total, seen)
    assert trial.finite
    assert not trial.passed
    assert trial.bent is not None
    assert trial.bent > 0.1 > 0.01 > trial.doubt
    assert "the gradient's norm is" in trial.failed
    plain = confirm(model, recipe, Precision.parse("fp16"), rows, total, seen)
    assert plain.passed
    assert plain.bent is not None
    assert plain.bent < 0.01


def test_the_norm_in_fp32_is_that_of_the_whole_step():
    model, recipe = spoilt(), recipe_for()
    rows = answers(model, recipe)
    total = totals(rows, LONGEST)
    seen = watch(model, recipe, recipe.precision, rows, total)
    assert seen.micro_batches > 1
    wide = confirm(model, recipe, Precision.parse("fp32"), rows, total, seen)
    assert wide.grad_norm == pytest.approx(seen.grad_norm, rel=1e-4)
    assert all(p.grad is None for p in model.module.parameters())


# --- what is said beside a verdict


def test_how_little_was_seen_is_said(tmp_path):
    done = tenbit(
        "audit", "builtin", "--data", "arithmetic_test", "--prompts", "1", "--samples", "1", "--max-tokens", "1",
        "lora.rank=4", "--out", "found", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^SAFE.* 1 token of 1 answer seen$", done.stdout, re.MULTILINE)
    tree = json.loads((tmp_path / "found" / "audit.json").read_text())
    assert tree["seen"] == {"answers": 1, "tokens": 1}
    assert any("below 500 tokens or 16 answers" in note for note in tree["notes"])
    assert any("the adapter (lora.*) is not looked at" in note for note in tree["notes"])
    assert "1 tokens of 1 answers were seen" in (tmp_path / "found" / "audit.html").read_text()
    assert few(16, 500) == []
    assert few(15, 5000) != [] != few(64, 499)


def test_what_a_verdict_says_of_a_model_with_unjudged_insides():
    """GPT-2's activation cubes its input inside one module: no place shows it, the trial does, and it is named."""
    found = audited(spoilt(_cubed, family="gpt2", **GPT2))
    assert found.verdict.kind == "unsafe"
    assert found.trial is not None
    assert found.verdict.modules[0] == found.trial.where == "transformer.h.1.mlp.act"


def _cubed(model: Any) -> None:
    """What goes into the activation reaches 1e3: its cube is 1e9, and what comes out 1e3 again."""
    mlp = model.transformer.h[1].mlp
    mlp.c_fc.weight *= 2.0**10
    mlp.c_proj.weight *= 2.0**-10
