"""Early warning: the rules on rows with known trends, and real runs with a fault that each action must answer."""

from __future__ import annotations

import io
import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import launch
from rich.console import Console
from safetensors.torch import load_file
from test_cli import tenbit
from test_loop import recipe, rows, saved_tensors

from tenbit import Recipe, run, train
from tenbit.checkpoint import complete
from tenbit.loop import Interrupted
from tenbit.signals import GO_BACK, SIGNALS, WatchSpec
from tenbit.studies.watching import totals, watched
from tenbit.watch import Watch, read_alarms, replay

QUIET = Console(file=io.StringIO())


def spec(**changes) -> WatchSpec:
    return WatchSpec.model_validate(changes)


def row(step: int, **changes) -> dict:
    """A step like a healthy one of the built-in model, with parts changed."""
    usual = {
        "step": step, "train/accuracy": 0.6, "mismatch/kl_k3": 2e-6, "mismatch/prob_diff_min": -0.03,
        "mismatch/prob_diff_max": 0.02, "mismatch/seq_ess": 0.99, "policy/entropy": 0.03, "optim/grad_norm": 0.04,
        "optim/skipped": 0,
    }  # fmt: skip
    return usual | {key.replace("__", "/"): value for key, value in changes.items()}


def series(key: str, values: list) -> list[dict]:
    return [row(i, **{key: value}) for i, value in enumerate(values, 1)]


def found(rows: list[dict], **changes) -> list[tuple[int, str, str]]:
    return [(a.step, a.level, a.signal) for a in replay(rows, spec(**changes))]


# --- the rules -------------------------------------------------------------------------------------------------


def test_a_drift_is_raised_once_a_level_at_the_step_that_the_medians_say():
    """KL grows by a tenth a step. When its median over ten steps passes 2, 3, 5 times that of the first five: numpy."""
    kl = [2e-6 * 1.1**i for i in range(60)]
    usual = np.median(kl[:5])
    ratio = {i: np.median(kl[i - 10 : i]) / usual for i in range(10, 61)}
    expected = [(min(i for i, r in ratio.items() if r >= t), level, "kl")
                for level, t in (("note", 2), ("warn", 3), ("act", 5))]  # fmt: skip
    assert found(series("mismatch__kl_k3", kl)) == expected
    alarms = replay(series("mismatch__kl_k3", kl), spec())
    for alarm in alarms:
        assert alarm.value == pytest.approx(ratio[alarm.step])
        assert alarm.remedy == SIGNALS["kl"].remedy + (GO_BACK if alarm.level == "act" else "")
        assert f"{alarm.value:.3g} times" in alarm.reason
    assert [alarm.action for alarm in alarms] == ["", "", "snapshot"]
    assert [alarm.threshold for alarm in alarms] == [2, 3, 5]


def test_a_step_change_goes_straight_to_its_level():
    """A median of ten sees a change when half of its steps are beyond it, and is the mean of the middle two."""
    kl = [2e-6] * 20 + [2e-6 * 20] * 10
    assert found(series("mismatch__kl_k3", kl)) == [(25, "act", "kl")]  # (1 + 20) / 2 = 10.5 times


@pytest.mark.parametrize(
    ("key", "value"),
    [("mismatch__kl_k3", 1.0), ("mismatch__kl_k3", None), ("mismatch__prob_diff_max", 1.0), ("mismatch__seq_ess", 0.0),
     ("policy__entropy", 9.0), ("optim__grad_norm", 1e9), ("mismatch__prob_diff_min", None)],
)  # fmt: skip
def test_one_step_alone_is_a_note_and_never_more(key, value):
    usual = row(0)[key.replace("__", "/")]
    for outliers in range(1, 4):  # nor are up to four of ten, apart or together
        values = [usual] * 40
        for i in range(outliers):
            values[20 + i] = value
        assert [level for _, level, _ in found(series(key, values))] == ["note"]


@pytest.mark.parametrize("broken", [None, math.nan, math.inf, -math.inf, "text"])
def test_numbers_that_are_none_are_the_worst_there_is(broken):
    alarms = replay(series("mismatch__kl_k3", [2e-6] * 15 + [broken] * 10), spec())
    assert [(a.level, a.signal, a.value) for a in alarms] == [("note", "kl", None), ("act", "kl", None)]
    assert "is not a number" in alarms[1].reason
    json.dumps([a.tree() for a in alarms], allow_nan=False)
    assert replay(series("mismatch__kl_k3", [broken] * 30), spec())[0].level == "act"  # from the start


def test_rows_that_say_nothing_change_nothing():
    """Evaluations before the first step, steps without a group to train on: the same alarms as without them."""
    kl = series("mismatch__kl_k3", [2e-6 * 1.1**i for i in range(60)])
    empty = [{"step": 0, "eval/x/avg@1": 0.5}]
    mixed = empty + [r for k in kl for r in (k, {"step": k["step"], "optim/skipped": 0, "train/accuracy": 0.0})]
    assert found(mixed) == found(kl)
    assert found(empty * 40) == []
    # a grad norm of zero is a step that taught nothing, whose neighbours are no explosion
    assert found(series("optim__grad_norm", [0.0] * 5 + [0.04] * 30)) == []


def test_it_rings_again_only_after_a_window_of_quiet():
    low, high = 2e-6, 2e-5
    steady = [low] * 15 + [high] * 200
    assert [level for _, level, _ in found(series("mismatch__kl_k3", steady))] == ["act"]
    # the median falls at the 6th low step and rises again at the 5th high one: in between are `quiet` - 1 steps
    for quiet, times in ((6, 1), (10, 1), (11, 2), (40, 2)):
        values = [low] * 15 + [high] * 20 + [low] * quiet + [high] * 20
        assert [level for _, level, _ in found(series("mismatch__kl_k3", values))].count("act") == times, quiet


def test_after_a_window_at_warn_act_may_ring_again():
    low = 2e-6
    for between, times in ((8, 1), (25, 2)):
        values = [low] * 15 + [6 * low] * 15 + [4 * low] * between + [6 * low] * 15
        assert [level for _, level, _ in found(series("mismatch__kl_k3", values))] == ["warn"] + ["act"] * times


def test_one_trouble_acts_once_however_many_signals_show_it():
    together = [
        row(i, mismatch__kl_k3=2e-6 if i < 21 else 2e-4, policy__entropy=0.03 if i < 25 else 3.0) for i in range(1, 60)
    ]
    acts = [(a.step, a.signal, a.action) for a in replay(together, spec(act="pause")) if a.level == "act"]
    assert acts == [(25, "kl", "pause"), (29, "entropy", "")]


def test_a_healthy_noisy_run_raises_nothing_above_a_note():
    """Log-normal noise as broad as in recorded runs (a factor of two), under falling KL and entropy, on many seeds."""
    for seed in range(20):
        chance = random.Random(seed)
        healthy = []
        for i in range(1, 400):
            noise = [chance.lognormvariate(0, 0.5) for _ in range(4)]
            fall = math.exp(-i / 150)
            gap = min(0.9, 0.04 * noise[1])
            healthy.append(
                row(i, mismatch__kl_k3=2e-6 * fall * noise[0], mismatch__prob_diff_max=gap,
                    optim__grad_norm=0.04 * noise[2],
                    policy__entropy=0.03 * fall * noise[3] ** 0.5, mismatch__seq_ess=chance.uniform(0.97, 1),
                    optim__skipped=int(i < 5 or chance.random() < 1 / 500))
            )  # fmt: skip
        assert {level for _, level, _ in found(healthy)} <= {"note"}, seed


def test_the_largest_gap_is_judged_by_its_own_size_on_both_sides():
    """Section 4.2: near 1. It needs no first steps to compare with."""
    for key, sign in (("mismatch__prob_diff_max", 1), ("mismatch__prob_diff_min", -1)):
        assert found(series(key, [sign * 0.97] * 12)) == [(10, "act", "gap")]
        assert found(series(key, [sign * 0.85] * 12)) == [(10, "warn", "gap")]
        assert found(series(key, [sign * 0.45] * 12)) == []


def test_effective_sample_size_falls_and_entropy_rises():
    assert found(series("mismatch__seq_ess", [0.9] * 12 + [0.4] * 12)) == [(17, "note", "ess"), (18, "warn", "ess")]
    assert found(series("mismatch__seq_ess", [0.4] * 12 + [0.9] * 12)) == []
    assert found(series("policy__entropy", [0.03] * 12 + [0.2] * 12))[-1] == (17, "act", "entropy")
    assert found(series("policy__entropy", [0.3] * 12 + [0.0] * 30)) == []
    assert found(series("policy__entropy", [0.03] * 12 + [0.01] * 31 + [0.0155] * 9)) == [(49, "note", "entropy")]
    assert found(series("policy__entropy", [0.03] * 12 + [0.01] * 31 + [0.021] * 9))[-1] == (49, "act", "entropy")
    assert found(series("policy__entropy", [0.03] * 12 + [0.01] * 12 + [0.021] * 20)) == []  # a short low is luck


def test_skipped_steps_count_by_their_share_and_the_search_at_the_start_does_not():
    assert found(series("optim__skipped", [1] * 5 + [0] * 30)) == []
    assert found(series("optim__skipped", [0] * 20 + [2] * 10)) == [
        (22, "note", "skipped"), (25, "warn", "skipped"), (28, "act", "skipped")
    ]  # fmt: skip
    # BF16 has no scaler: an update with gradients that are not finite has no norm
    broken = [row(i, optim__grad_norm=None if i > 20 else 0.04) for i in range(1, 31)]
    assert found(broken)[-1] == (28, "act", "skipped")


def test_healthy_is_the_last_step_before_anything_warned():
    watch = Watch(spec())
    seen = []
    for r in series("mismatch__kl_k3", [2e-6] * 20 + [2e-4] * 10 + [2e-6] * 10):
        watch.see(r)
        seen.append(watch.healthy)
    assert seen[23] == 24
    assert seen[24:34] == [24] * 10  # from the alarm at 25 until the median is back
    assert seen[-1] == 40


def test_the_same_level_of_noise_in_fp32_is_not_a_rise():
    """Below the floor sampler and trainer agree to rounding; a thousandfold of nothing is nothing."""
    assert found(series("mismatch__kl_k3", [1e-13] * 12 + [1e-9] * 12)) == []


# --- a recipe --------------------------------------------------------------------------------------------------

SMALL = {"steps": 3, "rollout": {"max_tokens": 8}}


def test_thresholds_signals_and_windows_follow_the_recipe():
    kl = series("mismatch__kl_k3", [2e-6] * 10 + [2e-6 * 10] * 10)
    assert found(kl, kl={"note": 20, "warn": 20, "act": 20}) == []
    assert found(kl, signals=["gap"]) == []
    assert found(kl, enabled=False) == []
    assert found(kl, window=4, act="stop") == [(12, "act", "kl")]
    assert [a.action for a in replay(kl, spec(act="stop"))] == ["stop"]
    assert found(kl, warmup=15) == [(15, "act", "kl")]  # ten of the first fifteen say what is usual


@pytest.mark.parametrize(
    ("watch", "words"),
    [
        ({"signals": ["kl", "entropi"]}, ["watch.signals", "did you mean 'entropy'"]),
        ({"grad_nrm": {"warn": 3}}, ["watch.grad_nrm", "did you mean 'grad_norm'"]),
        ({"kl": {"wran": 3}}, ["watch.kl.wran", "did you mean 'warn'"]),
        ({"kl": {"warn": 9}}, ["watch.kl", "must not fall"]),
        ({"act": "explode"}, ["watch.act", "snapshot"]),
        ({"kl": {"warn": -1}}, ["watch.kl.warn"]),
        ({"window": 1}, ["watch.window"]),
    ],
)
def test_what_is_wrong_is_named(watch, words):
    with pytest.raises(ValueError, match="watch") as error:
        Recipe.of({**SMALL, "watch": watch})
    for word in words:
        assert word in str(error.value)


def test_the_resolved_recipe_holds_what_was_changed_and_no_empty_tables(tmp_path):
    made = Recipe.of({**SMALL, "watch": {"act": "pause", "kl": {"warn": 4}}})
    made.dump(tmp_path / "r.toml")
    assert Recipe.load(tmp_path / "r.toml") == made
    text = (tmp_path / "r.toml").read_text()
    assert "[watch.kl]\nwarn = 4.0\n" in text
    assert "[watch.gap]" not in text
    assert made.watch.levels("kl").warn == 4
    assert made.watch.levels("kl").act == SIGNALS["kl"].levels.act


# --- real runs with a fault ------------------------------------------------------------------------------------

FAULT = 8  # weights of this step and later ones are sampled by an engine that drifts away


class Drifting:
    """A real engine whose log-probabilities are off, from `FAULT` on and by more at every step."""

    def __init__(self, engine) -> None:
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def __enter__(self):
        self._engine.__enter__()
        return self

    def __exit__(self, *error):
        return self._engine.__exit__(*error)

    def generate(self, prompts, sampling):
        return [replace(c, logp=c.logp * (1 + 0.01 * max(0, c.version - FAULT + 1)))
                for c in self._engine.generate(prompts, sampling)]  # fmt: skip


@pytest.fixture
def drifting(monkeypatch):
    real = run.make_engine
    monkeypatch.setattr(run, "make_engine", lambda *a: Drifting(real(*a)))


def faulty(model: Path, grader: str, **changes) -> Recipe:
    """Twelve steps; the window of three sees the fault of steps 9 and 10 at step 10."""
    usual = {
        "steps": 12, "task__grader": grader, "watch__warmup": 3, "watch__window": 3, "checkpoint__every": 2,
        "checkpoint__keep": 1, "optim__lr": 1e-5,
    }  # fmt: skip
    return recipe(model, **(usual | changes))


def names(out: Path) -> list[str]:
    return [p.name for p in complete(out / "checkpoints")]


def test_snapshot_keeps_the_last_healthy_checkpoint_and_the_run_goes_on(model_folder, tmp_path, grader, drifting):
    shown = io.StringIO()
    out = train(faulty(model_folder(), grader), tmp_path / "run", console=Console(file=shown, width=400))
    assert rows(out)[-1]["step"] == 12
    assert names(out) == ["step-000008", "step-000012"]  # keep = 1, and the one from before the fault
    why = json.loads((out / "checkpoints" / "step-000008" / "kept.json").read_text())
    assert why["step"] == 8
    alarms = read_alarms(out)
    assert ("act", "kl", 10, "snapshot") in [(a["level"], a["signal"], a["step"], a["action"]) for a in alarms]
    assert [a["step"] for a in alarms] == sorted(a["step"] for a in alarms)
    assert len(alarms) < 6
    text = shown.getvalue()
    for a in alarms:
        assert a["reason"] in text
        assert a["level"] == "note" or a["remedy"] in text
    assert "kept: checkpoints/step-000008, the last before this" in text
    assert replay(rows(out), Recipe.load(out / "recipe.toml").watch)[0].tree() == alarms[0]


def test_without_a_checkpoint_from_before_the_state_of_now_is_kept(model_folder, tmp_path, grader, drifting):
    wanted = faulty(model_folder(), grader, checkpoint__every=0)
    out = train(wanted, tmp_path / "run", console=QUIET)
    assert names(out) == ["step-000010", "step-000012"]  # not those of signals that followed
    assert (out / "checkpoints" / "step-000010" / "kept.json").is_file()


def test_pause_ends_saved_and_the_resumed_run_is_the_one_that_was_never_watched(
    model_folder, tmp_path, grader, drifting
):
    wanted = faulty(model_folder(), grader, watch__act="pause")
    with pytest.raises(Interrupted, match="step 10") as stop:
        train(wanted, tmp_path / "run", console=QUIET)
    assert "the mismatch" in stop.value.why
    assert names(tmp_path / "run") == ["step-000008", "step-000010"]
    before = read_alarms(tmp_path / "run")
    out = train(wanted, tmp_path / "run", resume=True, console=QUIET)  # the alarm that it is told of already
    assert read_alarms(out)[: len(before)] == before
    assert not [a for a in read_alarms(out)[len(before) :] if a["signal"] == "kl"]
    blind = train(faulty(model_folder(), grader, watch__enabled=False), tmp_path / "blind", console=QUIET)
    assert rows(out) == rows(blind)
    assert not (blind / "alarms.jsonl").exists()


def test_stop_ends_for_good_with_the_model_from_before(model_folder, tmp_path, grader, drifting):
    faulty(model_folder(), grader, watch__act="stop", precision="fp32").dump(tmp_path / "r.toml")
    done = tenbit("train", "r.toml", "--out", "run", cwd=tmp_path)
    out = tmp_path / "run"
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Ended for good after step 10 by an alarm: the mismatch" in done.stdout.replace("\n", " ")
    assert "alarms" in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["model_step"], summary["stopped"]["action"]) == (10, 8, "stop")
    assert summary["stopped"]["remedy"] == SIGNALS["kl"].remedy + GO_BACK
    assert (out / "report.html").is_file()
    model, masters = load_file(out / "model" / "model.safetensors"), saved_tensors(out / "checkpoints" / "step-000008")
    now = saved_tensors(out / "checkpoints" / "step-000010")
    assert all(torch.equal(p, masters[f"master.{name}"]) for name, p in model.items())
    assert any(not torch.equal(p, now[f"master.{name}"]) for name, p in model.items())
    train(Recipe.load(tmp_path / "r.toml"), out, resume=True, console=QUIET)  # going on is the user's to decide
    assert rows(out)[-1]["step"] == 12
    assert "stopped" not in json.loads((out / "summary.json").read_text())


def test_nothing_means_nothing_but_alarms(model_folder, tmp_path, grader, drifting):
    out = train(faulty(model_folder(), grader, watch__act="nothing"), tmp_path / "run", console=QUIET)
    assert names(out) == ["step-000012"]
    assert any(a["level"] == "act" for a in read_alarms(out))


@pytest.mark.parametrize("until", [2, 6, 10, 11])
def test_a_resumed_run_raises_the_alarms_of_the_uninterrupted_one(model_folder, tmp_path, grader, drifting, until):
    """Ended before the first steps are over, before the fault, at the alarm, after it; and with rows to be cut back."""
    model = model_folder()
    whole = train(faulty(model, grader), tmp_path / "whole", console=QUIET)
    part = train(faulty(model, grader, steps=until), tmp_path / "part", console=QUIET)
    with (part / "metrics.jsonl").open("a") as file:  # a step that was killed before its checkpoint
        file.write(json.dumps({"step": until + 1, "mismatch/kl_k3": 9.0}) + "\n")
    with (part / "alarms.jsonl").open("a") as file:
        file.write(json.dumps({"step": until + 1, "level": "act"}) + "\n")
    train(faulty(model, grader), part, resume=True, console=QUIET)
    assert read_alarms(part) == read_alarms(whole)
    assert rows(part) == rows(whole)


def test_a_kept_checkpoint_becomes_a_model_and_a_run_of_its_own(model_folder, tmp_path, grader, drifting):
    """As docs/watch.md says: a copy of the run with that checkpoint as its last, ended where it is."""
    wanted = faulty(model_folder(), grader)
    out = train(wanted, tmp_path / "run", console=QUIET)
    back = tmp_path / "back"
    shutil.copytree(out / "checkpoints" / "step-000008", back / "checkpoints" / "step-000008")
    for file in (out / "recipe.toml", *out.glob("*.jsonl")):
        shutil.copy(file, back)
    done = tenbit("train", "back/recipe.toml", "steps=8", "--out", "back", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in rows(back)] == list(range(1, 9))
    assert read_alarms(back) == []
    masters = saved_tensors(back / "checkpoints" / "step-000008")
    model = load_file(back / "model" / "model.safetensors")
    assert all(torch.equal(p, masters[f"master.{name}"]) for name, p in model.items())


@pytest.mark.slow
def test_two_ranks_do_the_same(model_folder, tmp_path, grader):
    """Thresholds that any rounding passes, on real ranks: both pause, both stop."""
    tiny = {"note": 1e-12, "warn": 1e-12, "act": 1e-12}
    wanted = recipe(
        model_folder(), steps=6, task__grader=grader, checkpoint__every=2, checkpoint__keep=1,
        watch={"warmup": 1, "window": 3, "signals": ["gap"], "gap": tiny, "act": "pause"},
    )  # fmt: skip
    wanted.dump(tmp_path / "r.toml")
    command = ("-m", "tenbit", "train", tmp_path / "r.toml", "--out", tmp_path / "run")
    done = launch(2, *command, timeout=120)
    assert done.stdout.count("Stopped after step 3 by an alarm") == 1, done.stdout + done.stderr
    assert names(tmp_path / "run") == ["step-000002", "step-000003"]
    command = (*command[:-1], tmp_path / "stopped", "watch.act=stop")
    done = launch(2, *command, timeout=120)
    assert done.returncode != 0
    assert done.stdout.count("Ended for good after step 3") == 1, done.stdout + done.stderr
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert (summary["model_step"], summary["steps"]) == (2, 3)
    assert (tmp_path / "stopped" / "model" / "model.safetensors").is_file()


# --- runs of the past ------------------------------------------------------------------------------------------


def recorded(folder: Path, fall_at: int | None, drift_at: int | None) -> Path:
    """A metrics file: accuracy falls for good at one step, KL rises a hundredfold at another."""
    folder.mkdir()
    lines = []
    for i in range(1, 201):
        lines.append(row(i))
        if fall_at is not None and i >= fall_at:
            lines[-1]["train/accuracy"] = 0.0
        if drift_at is not None and i >= drift_at:
            lines[-1]["mismatch/kl_k3"] = 2e-4
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_lead_and_false_alarms_of_runs_of_the_past(tmp_path):
    early, late = recorded(tmp_path / "early", 150, 100), recorded(tmp_path / "late", 100, 150)
    calm, false = recorded(tmp_path / "calm", None, None), recorded(tmp_path / "false", None, 50)
    runs = [watched(folder) for folder in (early, late, calm, false)]
    # outcome.judge: accuracy 0.6 over twenty steps is below 0.45 with six of them at zero
    assert [r.outcome.collapsed_at for r in runs] == [155, 105, None, None]
    assert [r.lead for r in runs] == [{"note": n + 4, "warn": n, "act": n} for n in (51, -49)] + [{}, {}]
    assert [r.first.get("act") for r in runs] == [104, 154, None, 54]
    assert totals(runs)[2] == (
        "warn   in 2 of 2 that collapsed, before it in 1, median lead 1 steps; false alarms in 1 of 2 that did not"
    )


def test_the_command(tmp_path):
    recorded(tmp_path / "a", 150, 100)
    recorded(tmp_path / "b", None, None)
    done = tenbit("watch", "a", "b/metrics.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "collapsed at step 155; first warn: 51 steps before the collapse" in done.stdout.replace("\n", " ")
    assert "no alarm" in done.stdout
    assert "2 runs, 1 of them collapsed" in done.stdout
    quieter = "watch.kl={note=1000, warn=1000, act=1000}"
    done = tenbit("watch", "a", "--json", quieter, cwd=tmp_path)
    tree = json.loads(done.stdout)
    assert (tree["alarms"], tree["outcome"]["collapsed_at"]) == ([], 155)
    for wrong, words in ((["nowhere"], "no such file or folder"), (["a", "optim.lr=1"], "only keys of [watch]"),
                         (["a", "watch.entrop.warn=1"], "did you mean 'entropy'")):  # fmt: skip
        done = tenbit("watch", *wrong, cwd=tmp_path)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
