"""`tenbit audit` on models that overflow at a known place: none may pass, each is named, each remedy really helps."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from audited import (
    LONGEST,
    answers,
    audited,
    biases_of_few_steps,
    certain,
    coarse_logits,
    experts,
    inside_attention,
    inside_mlp,
    inside_mlp_and_stream,
    large_weight,
    logits,
    norms_of_few_steps,
    rare_token,
    recipe_for,
    sharp_attention,
    small_stream,
    small_weights,
    small_weights_that_count,
    spoilt,
    stream,
)
from conftest import byte_tokenizer
from test_cli import tenbit

from tenbit import Recipe
from tenbit.batching import totals
from tenbit.loop import train
from tenbit.precision import Format, Precision
from tenbit.runlog import read_rows
from tenbit.studies.audit_forward import Place
from tenbit.studies.audit_plan import applied_path, make_plan, write_applied
from tenbit.studies.audit_run import confirm, most_bent, most_drift, watch
from tenbit.types import Overflow, Totals

EPS: dict[str, Any] = {"rms_norm_eps": 1e-12}
REMEDIED = {
    # what is wrong: (how it is made, shape, a module that must be named, remedies, whether forward is finite)
    "inside the MLP": (inside_mlp, {}, "model.layers.1.mlp.down_proj", {"fp32", "loss_scale"}, False),
    "inside attention": (inside_attention, {}, "model.layers.0.self_attn.v_proj", {"fp32", "loss_scale"}, False),
    "in the stream": (stream, {}, "model.layers.1", {"residual_scale"}, False),
    "both": (
        inside_mlp_and_stream, {}, "model.layers.1.mlp.down_proj", {"fp32", "residual_scale", "loss_scale"}, False,
    ),
    "in the logits": (logits, {}, "lm_head", {"head", "loss_scale"}, False),
    "backward only": (small_stream, EPS, "model.embed_tokens.weight", {"loss_scale"}, True),
    "inside experts": (experts, {"family": "qwen3_moe"}, "model.layers.1.mlp.experts", {"fp32", "loss_scale"}, False),
}  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "qwen3_moe"])
def test_an_ordinary_model_is_safe(family):
    found = audited(spoilt(family=family))
    assert found.verdict.kind == "safe"
    assert found.plan == found.base
    assert found.trial is not None
    assert found.trial.passed
    assert found.window.low < 65536 <= found.window.high


@pytest.mark.parametrize("what", REMEDIED)
def test_what_overflows_is_found_named_and_remedied(what):
    spoil, shape, module, remedies, finite_forward = REMEDIED[what]
    model = spoilt(spoil, **shape)
    recipe = recipe_for()
    rows = answers(model, recipe)
    total = totals(rows, LONGEST)

    # it really fails in FP16
    wanted = watch(model, recipe, recipe.precision, rows, total)
    plain = confirm(model, recipe, recipe.precision, rows, total, wanted)
    assert not plain.finite
    assert plain.failed.startswith("gradients" if finite_forward else "log-probabilities")

    found = audited(model)
    assert found.verdict.kind == "safe with"
    assert module in found.verdict.modules
    assert set(found.verdict.remedies) == remedies
    assert not found.left
    assert found.trial is not None
    assert found.trial.finite
    assert found.trial.trainer is not None
    assert found.trial.engine is not None
    assert max(found.trial.trainer, found.trial.engine) < 1e-4  # rounding; what is wrong gives NaN


def test_a_gradient_is_seen_before_and_after_the_plan_scales_what_it_is_of():
    """With a residual scale c the input of o_proj is multiplied by c: the product's gradient is 1 / c times larger."""
    found = audited(spoilt(stream))
    scale, place = found.plan.residual_scale, Place("model.layers.0.self_attn.o_proj", "input")
    without, within = found.before.backward[place], found.seen.backward[place]
    assert within.values == 2 * without.values
    assert within.largest == pytest.approx(without.largest / scale, rel=1e-3)
    assert within.norm == pytest.approx(without.norm * math.hypot(1, 1 / scale), rel=1e-3)


def test_remedies_are_no_more_than_is_needed():
    assert audited(spoilt(inside_mlp)).plan.fp32 == ("model.layers.1.mlp",)
    assert audited(spoilt(inside_attention)).plan.fp32 == ("model.layers.0.self_attn",)
    found = audited(spoilt(stream))
    held = [r.largest for p, r in found.seen.forward.items() if p.kind != "product"]
    assert Format.FP16.largest / 8 < max(held) <= Format.FP16.largest / 4
    limit = audited(spoilt(small_stream, **EPS))
    assert limit.plan.loss_scale is not None
    assert limit.plan.loss_scale.initial == limit.plan.loss_scale.limit == limit.window.high / 4


@pytest.mark.parametrize("spoil", [inside_mlp, inside_attention, stream, small_stream, large_weight, small_weights])
def test_the_same_models_are_safe_in_bf16(spoil):
    shape: dict[str, Any] = EPS if spoil is small_stream else {}
    assert audited(spoilt(spoil, **shape), "bf16").verdict.kind == "safe"


def test_logits_that_bf16_cannot_tell_apart():
    """They fit, and their spacing is 512: only the run itself shows it."""
    found = audited(spoilt(logits), "bf16")
    assert found.verdict.kind == "safe with"
    assert found.verdict.remedies == {"head": "fp32"}
    assert found.verdict.modules == ("lm_head",)


def test_weights_that_do_not_fit_have_no_remedy():
    found = audited(spoilt(large_weight))
    assert found.verdict.kind == "unsafe"
    assert found.verdict.modules == ("model.layers.1.mlp.up_proj.weight",)
    (weight,) = [w for w in found.weights if not w.fits]
    assert (weight.name, weight.overflowed) == ("model.layers.1.mlp.up_proj.weight", 1)

    found = audited(spoilt(small_weights_that_count))
    assert found.verdict.kind == "unsafe"
    assert found.verdict.modules == ("model.layers.0.self_attn.v_proj.weight",)
    assert found.trial is None
    (weight,) = [w for w in found.weights if w.lossy and not w.harmless]
    assert (weight.flushed, weight.rms_error) == (weight.count, 1.0)


@pytest.mark.parametrize(("spoil", "family"), [(norms_of_few_steps, "gemma"), (biases_of_few_steps, "qwen2")])
def test_weights_that_the_cast_loses_and_nothing_depends_on_are_no_finding(spoil, family):
    found = audited(spoilt(spoil, family=family))
    lossy = [w.name for w in found.weights if w.lossy]
    assert lossy
    assert all("norm" in name or "bias" in name for name in lossy)
    assert found.verdict.kind == "safe"
    assert found.trial is not None
    assert found.trial.trainer is not None
    assert found.trial.trainer < 1e-6
    (note,) = [n for n in found.notes if "nothing depends on it" in n]
    assert lossy[0] in note


@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_rounding_that_is_too_large_for_its_format_gets_the_key_that_makes_it_small(format):
    """FP16's own rounding gives a KL of 1e-6. Here it is 100 times more, and `head` takes it away."""
    added = {"fp16": 40.0, "bf16": 20.0}[format]
    found = audited(spoilt(lambda model: coarse_logits(model, added)), format)
    assert (found.verdict.kind, found.verdict.remedies) == ("safe with", {"head": "fp32"})
    assert found.verdict.modules == ("lm_head",)
    assert "is more than rounding explains" in found.verdict.because[0]
    assert found.trial is not None
    assert found.trial.steady
    assert found.trial.drift < 1e-5


def test_a_key_that_is_worth_it_is_named_where_rounding_is_within_bounds():
    found = audited(spoilt(lambda model: coarse_logits(model, 10.0)))
    assert (found.verdict.kind, found.plan) == ("safe", found.base)
    (note,) = [n for n in found.notes if n.startswith('precision.head = "fp32" would make the mismatch smaller')]
    before, after = (float(x) for x in re.search(r"from FP32 (\S+) -> (\S+),", note).groups())  # type: ignore
    assert 1e-5 < before < 1.3e-4
    assert after < before / 100
    assert not any("precision.head" in n for n in audited(spoilt()).notes)


def test_rounding_that_no_key_makes_smaller_is_said():
    """It is the weights' own: a gradient that is 4% off is told of, one that is 26% off is unsafe, and in BF16 too."""
    found = audited(spoilt(lambda model: sharp_attention(model, 8)))
    assert (found.verdict.kind, set(found.verdict.remedies)) == ("safe with", {"loss_scale"})
    (note,) = [n for n in found.notes if "no key of [precision] brings it within that" in n]
    assert all(key in note for key in ("head", "self_attn", "mlp"))
    found = audited(spoilt(lambda model: sharp_attention(model, 16)))
    assert found.verdict.kind == "unsafe"
    assert found.instead == ("fp32",)


def test_what_rounding_may_take():
    """In spacings of the format; in a mixture near-ties are decided otherwise, a share of epsilon of all."""
    fp16, bf16, fp32 = (f.epsilon for f in (Format.FP16, Format.BF16, Format.FP32))
    assert most_drift(fp16, False) == most_drift(fp32, False) == 2.0**-13
    assert most_drift(bf16, False) == most_drift(bf16, True) == 2.0**-7
    assert most_drift(fp16, True) == 2.0**-10
    assert most_drift(0.125, False) == 1e-2
    assert (most_bent(fp16), most_bent(bf16)) == (2.0**-6, 0.1)


def test_a_token_that_no_answer_has_is_looked_at():
    found = audited(spoilt(rare_token))
    assert found.verdict.kind == "safe with"
    assert found.verdict.remedies == {"residual_scale": 0.25}
    assert found.verdict.because[0].startswith("model.embed_tokens: the embedding of some token reaches 6e+04")
    assert found.seen.forward[Place("model.embed_tokens", "table")].largest == 15000
    assert found.before.forward[Place("model.embed_tokens", "output")].largest < 1


def test_what_is_judged_by_no_gradient_is_not_judged():
    """Certain of every token, as a model with logits in the thousands is."""
    with pytest.raises(ValueError, match=r"every gradient is zero.*Raise --prompts, --samples or rollout.temperature"):
        audited(spoilt(certain))


def test_gradients_that_vanish_at_a_scale_of_one():
    """A plan that starts there is not safe, and the remedy is a larger scale."""
    plan = {"preset": "fp16", "loss_scale": {"initial": 1.0, "limit": 1.0}}
    found = audited(spoilt(), plan, total=Totals(64, 1536, 1024))
    assert found.window_before.low > 1
    assert found.verdict.kind == "safe with"
    scale = found.plan.loss_scale
    assert scale is not None
    assert found.window.low <= scale.initial <= found.window.high
    assert "vanish at the loss scale of 1" in found.verdict.because[0]


def test_gradients_that_vanish_at_the_default_scale():
    """A huge step divides them further than 65536 lifts them; the window moves by exactly as much."""
    model = spoilt()
    near, far = audited(model), audited(model, total=Totals(8 * 2**26, 0, LONGEST))
    assert far.window.low == pytest.approx(near.window.low * 2**26, rel=0.5)
    assert far.verdict.kind == "safe with"
    assert far.plan.loss_scale is not None
    assert far.plan.loss_scale.initial > 65536


# --- through the command line and the loop


def saved(model: Any, folder: Path) -> Path:
    model.module.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


RECIPE = """
# a comment
steps = 1
{precision}

[model]
path = "{model}"

[rollout]
prompts = 4
samples = 2
max_tokens = 16

[optim]
updates = 1
lr = 1e-4
{optim}
[task]
data = "arithmetic_test"
limit = 8
grader = "{grader}"
"""
ASKED = ["--data", "arithmetic_test", "--prompts", "4", "--max-tokens", "16"]


@pytest.mark.parametrize("what", ["inside the MLP", "in the stream", "in the logits", "backward only"])
def test_an_applied_audit_trains_in_fp16_and_sampler_and_trainer_agree(what, tmp_path, grader, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, shape, _, remedies, _ = REMEDIED[what]
    model = saved(spoilt(spoil, **shape), tmp_path / "model")
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE.format(model=model, grader=grader, precision='precision = "fp16"', optim=""))
    if what == "backward only":
        (first,) = read_rows(train(Recipe.load(recipe)) / "metrics.jsonl")
        assert first["optim/skipped"] == 1
    else:
        with pytest.raises((Overflow, ValueError)):
            train(Recipe.load(recipe))

    done = tenbit("audit", str(model), *ASKED, "--apply", str(recipe), "--out", "found", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "SAFE WITH" in done.stdout
    found = json.loads((tmp_path / "found" / "audit.json").read_text())
    applied = tmp_path / "mine.audited.toml"
    before, after = tomllib.loads(recipe.read_text()), tomllib.loads(applied.read_text())
    assert remedies <= set(after["precision"]) == {"preset", *found["verdict"]["remedies"]}
    assert {k: v for k, v in before.items() if k != "precision"} == {k: v for k, v in after.items() if k != "precision"}
    (row,) = read_rows(train(Recipe.load(applied, ["name=audited"])) / "metrics.jsonl")
    assert row["optim/skipped"] == 0
    assert row["optim/grad_norm"] > 0
    assert abs(row["mismatch/kl_k3"]) < 1e-4


def test_the_command_says_unsafe_and_writes_no_recipe(tmp_path, grader):
    model = saved(spoilt(large_weight), tmp_path / "model")
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE.format(model=model, grader=grader, precision="", optim=""))
    done = tenbit("audit", str(model), *ASKED, "--apply", str(recipe), "--out", "found", cwd=tmp_path)
    assert done.returncode == 1
    assert "UNSAFE in fp16: train it in bf16 or fp32" in done.stdout
    assert "model.layers.1.mlp.up_proj.weight: 1 of 10,240 weights become inf" in done.stdout
    assert not applied_path(recipe).exists()
    again = tenbit("audit", str(model), *ASKED, "--out", "found", cwd=tmp_path)
    assert again.returncode == 2
    assert "not empty" in again.stderr


def test_the_recipe_that_is_applied_to_decides_how_gradients_are_made(tmp_path, grader):
    recipe = tmp_path / "mine.toml"
    optim = "token_budget = 99"
    recipe.write_text(RECIPE.format(model="builtin", grader=grader, precision='precision = "bf16/fp16"', optim=optim))
    plan = make_plan("builtin", {"data": "arithmetic_test"}, apply=recipe)
    assert plan.precision.name == "bf16/fp16"
    assert plan.probe.recipe.optim.token_budget == 99
    rows = answers(spoilt(), recipe_for())
    assert plan.totals(rows).sequences == 8
    assert plan.totals(rows).max_response_length == 16
    assert make_plan("builtin", {}, "fp16", recipe).precision.name == "fp16"
    assert make_plan("builtin", {}, None, None, ["precision.head=fp32"]).precision.head == "fp32"


def test_an_applied_recipe_is_never_overwritten(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'steps = 1\n[precision]\npreset = "fp16"\nloss_scale = {interval = 7}\n[rollout]\nmax_tokens = 8\n'
    )
    scale = {"interval": 7, "initial": 8.0, "limit": 8.0}
    plan = Precision.parse({"preset": "fp16", "loss_scale": scale, "fp32": ["a.b"]})
    path = write_applied(recipe, plan, "said")
    assert path == tmp_path / "mine.audited.toml"
    assert path.read_text().startswith("# said\n")
    assert Recipe.load(path).precision == plan
    with pytest.raises(ValueError, match="is there already"):
        make_plan("builtin", {}, apply=recipe)
    with pytest.raises(ValueError, match="is there already"):
        write_applied(recipe, plan, "")


def test_one_plan_at_a_time():
    with pytest.raises(ValueError, match="--precision fp16,bf16: an audit judges one plan"):
        make_plan("builtin", {}, "fp16,bf16")
    with pytest.raises(ValueError, match="--data: name the problems"):
        make_plan("/models/other", {})
    with pytest.raises(ValueError, match=r"tenbit audit: there is no key 'precision.haed'; did you mean 'head'"):
        make_plan("builtin", {}, overrides=["precision.haed=fp32"])


def test_the_model_is_not_changed():
    model = spoilt(stream)
    before = {name: t.clone() for name, t in model.module.state_dict().items()}
    audited(model)
    assert all(torch.equal(t, before[name]) for name, t in model.module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert math.isfinite(float(model.module(input_ids=torch.tensor([[1, 2, 3]])).logits.detach().abs().max()))


def test_a_safe_plan_is_what_was_asked_for():
    found = audited(spoilt(), {"preset": "fp16", "head": "fp32"})
    assert found.verdict.kind == "safe"
    assert found.plan == Precision.parse({"preset": "fp16", "head": "fp32"})
