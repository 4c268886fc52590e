"""What `tenbit audit` takes from a recipe or a run, what it says beside its verdict, and how it ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from audited import LONGEST, answers, recipe_for, spoilt
from rich.console import Console
from test_audit import RECIPE
from test_cli import tenbit

from tenbit import Recipe
from tenbit.batching import totals
from tenbit.precision import Precision
from tenbit.studies import audit, probe_plan
from tenbit.studies.audit import audit_model
from tenbit.studies.audit_backward import Window
from tenbit.studies.audit_forward import Place
from tenbit.studies.audit_notes import cut_short, instead, narrow
from tenbit.studies.audit_plan import make_plan
from tenbit.studies.audit_verdict import AS_SEEN, Stretch
from tenbit.studies.probe import Study
from tenbit.studies.probe_run import _finish
from tenbit.types import EngineFailed, Overflow

QUICK = {"data": "arithmetic_test", "prompts": 4, "max_tokens": 16}


def written(folder: Path, grader: str, longest: int = 16, rollout: str = "", task: str = "", more: str = "") -> Path:
    text = RECIPE.format(model="builtin", grader=grader, precision="", optim="")
    text = text.replace("max_tokens = 16", f"max_tokens = {longest}").replace("[rollout]\n", f"[rollout]\n{rollout}")
    recipe = folder / "mine.toml"
    recipe.write_text(text.replace("[task]\n", f"[task]\n{task}") + more)
    return recipe


# --- answers that the audit cuts off and the recipe does not


@pytest.fixture(scope="module")
def sampled():
    model = spoilt()
    rows = answers(model, recipe_for())
    assert sum(r.rollout.completion.finish == "length" for r in rows) > 0
    return model, rows


@pytest.mark.parametrize("algorithm", ["dapo", "gspo", "pg-is"])
def test_the_window_allows_for_answers_that_were_cut_off(algorithm, sampled, tmp_path, grader):
    """Divided by lengths gradients shrink as these grow; divided by a constant they add up, in a micro-batch."""
    _, rows = sampled
    recipe = written(tmp_path, grader, 1024, more=f'\n[algorithm]\nname = "{algorithm}"\n')
    plan = make_plan("builtin", QUICK, apply=recipe)
    assert plan.cut_off(rows) == sum(r.rollout.completion.finish == "length" for r in rows)
    mean = sum(r.rollout.completion.length for r in rows) / len(rows)
    power = 2.0 ** math.ceil(math.log2(1024 / mean))
    held = sum(r.length for r in rows)  # one micro-batch of 8192 tokens has room for all
    wanted = Stretch(high=2.0 ** math.ceil(math.log2(min(1024 / mean, 8192 / held))))
    assert plan.stretch(rows) == (wanted if algorithm == "pg-is" else Stretch(low=power))
    same = make_plan("builtin", {**QUICK, "max_tokens": 1024}, apply=recipe)
    assert (same.cut_off(rows), same.stretch(rows)) == (0, AS_SEEN)
    assert make_plan("builtin", QUICK).stretch(rows) == AS_SEEN


def test_the_verdict_is_of_the_safe_side(sampled):
    """So much longer answers that the plan's loss scale lies below the window get another one; a hair's breadth of a
    window is told of."""
    model, rows = sampled
    total = totals(rows, LONGEST)

    def found(stretch: Stretch) -> Any:
        return audit_model(model, recipe_for(), rows, total, lambda text: None, {}, stretch)

    plain = found(AS_SEEN)
    low, high = plain.window.low, plain.window.high
    assert plain.verdict.kind == "safe"
    assert low < 65536 < high
    longer = found(Stretch(low=high / low))
    assert (longer.window.low, longer.window.high) == (high, high)
    assert longer.verdict.remedies == {"loss_scale": {"initial": high, "limit": high}}
    assert any("hardly a loss scale fits" in n for n in longer.notes)
    assert not any("hardly a loss scale fits" in n for n in plain.notes)
    assert found(Stretch(high=16)).window.high == high / 16


def test_a_window_with_no_room_is_told_of():
    low, high = Place("a", "input"), Place("b", "output")
    assert "2048 to 4096" in narrow(Window(2048, 4096, low, high))[0]
    assert narrow(Window(1024, 4096, low, high)) == narrow(Window(2, 1, low, high)) == []
    assert narrow(Window(0, math.inf, None, None)) == []


# --- how problems are put


def test_problems_are_put_as_the_recipe_puts_them(tmp_path, grader):
    rollout = 'stop_tokens = ["Q"]\ntemperature = 0.7\n'
    recipe = written(tmp_path, grader, rollout=rollout, task='template = "Q: {problem} A:"\n')
    plan = make_plan("builtin", QUICK, apply=recipe, overrides=["rollout.max_batch=4", "model.device=cpu"])
    made = plan.probe.recipe
    assert (made.task.template, made.rollout.stop_tokens, made.rollout.temperature) == ("Q: {problem} A:", ("Q",), 0.7)
    assert (made.rollout.max_batch, made.model.device) == (4, "cpu")
    given = make_plan("builtin", {**QUICK, "template": "plain"}, apply=recipe, overrides=["rollout.temperature=0.5"])
    assert (given.probe.recipe.task.template, given.probe.recipe.rollout.temperature) == ("plain", 0.5)


def test_template_and_cut_off_answers_are_on_page_and_screen(tmp_path, grader):
    recipe = written(tmp_path, grader, 256, task='template = "Q: {problem} A:"\n')
    asked = ("--data", "arithmetic_test", "--prompts", "4", "--max-tokens", "2")
    done = tenbit("audit", "builtin", *asked, "--apply", str(recipe), "--out", "found", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tree, page = (json.loads((tmp_path / "found/audit.json").read_text()), (tmp_path / "found/audit.html").read_text())
    cut = tree["answers"]["cut_off"]
    assert cut > 0
    said = f"{cut} of 8 answers were cut off at 2 tokens"
    for text in (done.stdout, page):
        assert "Q: {problem} A:" in text
        assert said in text
    assert cut_short(0, 8, recipe_for(), recipe_for(), AS_SEEN) == []


# --- how it ends


@pytest.mark.parametrize("error", [EngineFailed("it died"), Overflow("inf"), OSError("disk full"), KeyError("bug")])
def test_an_audit_that_broke_off_has_another_status_than_a_verdict(error, tmp_path, monkeypatch):
    def broken(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(audit, "sample", broken)
    done = tenbit("audit", "builtin", "--data", "arithmetic_test", "--prompts", "1", cwd=tmp_path)
    assert done.returncode == audit.FAILED == 4
    assert str(error) in done.stderr
    assert ("Traceback" in done.stderr) == isinstance(error, KeyError)


@pytest.mark.parametrize("key", ["rollout.engine=vllm", "rollout.engine=ray", "rollout.vllm.memory=0.5"])
def test_another_engine_is_refused(key):
    with pytest.raises(ValueError, match="an audit samples and scores with the built-in engine"):
        make_plan("builtin", QUICK, overrides=[key])
    assert make_plan("builtin", QUICK, overrides=["rollout.engine=torch"]).probe.recipe.rollout.engine == "torch"


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        ("fp16", ("bf16", "fp32")), ("bf16", ("fp32",)), ("fp32", ()), ("bf16/fp16", ("fp32",)),
        ("fp16/fp32", ("bf16", "fp32")),
    ],
)  # fmt: skip
def test_what_an_unsafe_model_is_trained_in_is_another_plan(plan, wanted):
    assert instead(Precision.parse(plan), False) == wanted
    assert "bf16" not in instead(Precision.parse(plan), True)


# --- a run folder as the model


@pytest.fixture
def run(tmp_path):
    """A finished run whose model needs two keys."""
    keys = {"preset": "bf16", "head": "fp32", "fp32": ["model.layers.0.mlp"], "residual_scale": 0.5}
    tree = {"steps": 1, "precision": keys, "rollout": {"max_tokens": 8, "engine": "vllm"}}
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "model/config.json").write_text("{}")
    Recipe.of(tree).dump(folder / "recipe.toml")
    return str(folder)


def test_a_runs_own_keys_hold_where_no_plan_is_named(run):
    keys = {"head": "fp32", "fp32": ["model.layers.0.mlp"], "residual_scale": 0.5}
    plan = probe_plan.make_plan(run)
    assert plan.precisions == tuple(Precision.parse({"preset": p, **keys}) for p in ("fp16", "bf16"))
    (note,) = plan.notes
    assert "head = 'fp32', fp32 = ['model.layers.0.mlp'], residual_scale = 0.5" in note
    other = probe_plan.make_plan(run, overrides=["precision.residual_scale=0.25"])
    assert {p.residual_scale for p in other.precisions} == {0.25}
    assert {p.head for p in other.precisions} == {"fp32"}
    named = probe_plan.make_plan(run, precision="fp16,fp32")
    assert named.precisions == (Precision.parse("fp16"), Precision.parse("fp32"))
    assert named.notes == probe_plan.make_plan("builtin").notes == []

    judged = make_plan(run, QUICK)
    assert judged.precision == Precision.parse({"preset": "fp16", **keys})
    assert judged.probe.recipe.rollout.engine == "torch"
    assert judged.probe.notes == plan.notes
    assert make_plan(run, QUICK, "bf16").precision == Precision.parse("bf16")


def test_a_probe_that_measured_nothing_names_the_remedy(tmp_path):
    study = Study({"source": None}, 3.0, 0)
    study.left_out["fp16"] = "values are inf or NaN."
    with pytest.raises(ValueError, match=r"inf or NaN\. Try .*`tenbit audit` .*precision.residual_scale"):
        _finish(study, tmp_path, Console(quiet=True))
