"""Early warning over a run's lives: rules that change on --resume, kills at the wrong moment; runs of the past."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from rich.console import Console
from test_cli import tenbit
from test_loop import recipe, rows
from test_watch import QUIET, drifting, faulty, found, recorded, row, series, spec

from tenbit import Recipe, loop, train
from tenbit.checkpoint import Checkpoints, Progress
from tenbit.loop import Halted, Interrupted
from tenbit.signals import GO_BACK, SIGNALS
from tenbit.studies.watching import totals, watched
from tenbit.types import EngineFailed
from tenbit.watch import Lookout, read_alarms, replay

FIXTURES = (drifting,)
STRICT = {"warmup": 1, "window": 3, "signals": ["gap"], "gap": {"note": 1e-12, "warn": 1e-12, "act": 1e-12}}


def kept(out: Path) -> list[str]:
    return sorted(p.parent.name for p in (out / "checkpoints").glob("*/kept.json"))


def strict(model: Path, grader: str, steps: int, **watch) -> Recipe:
    """A run that is in trouble from step 3 on, by thresholds that any rounding passes."""
    return recipe(model, steps=steps, task__grader=grader, checkpoint__every=2, checkpoint__keep=1, watch=watch)


# --- rules that change on --resume -----------------------------------------------------------------------------


@pytest.mark.parametrize("before", [{}, {"enabled": False}, STRICT | {"act": "nothing"}, STRICT | {"act": "snapshot"}])
def test_stricter_rules_on_resume_raise_and_stop_what_is_still_so(model_folder, tmp_path, grader, before):
    model, out = model_folder(), tmp_path / "run"
    train(strict(model, grader, 4, **before), out, console=QUIET)
    told = read_alarms(out)
    with pytest.raises(Halted):
        train(strict(model, grader, 8, **STRICT, act="stop"), out, resume=True, console=QUIET)
    assert rows(out)[-1]["step"] == 5
    new = read_alarms(out)[len(told) :]
    assert [(a["step"], a["level"], a["signal"], a["action"]) for a in new] == [(5, "act", "gap", "stop")]
    assert json.loads((out / "summary.json").read_text())["stopped"]["step"] == 5


def test_a_pause_is_not_repeated_but_a_stop_goes_further(model_folder, tmp_path, grader):
    model, out = model_folder(), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(strict(model, grader, 8, **STRICT, act="pause"), out, console=QUIET)
    assert rows(out)[-1]["step"] == 3
    # other rules, by which the same trouble begins elsewhere
    slower = STRICT | {"window": 4, "act": "pause"}
    train(strict(model, grader, 5, **slower), out, resume=True, console=QUIET)
    train(strict(model, grader, 6, **STRICT, act="snapshot"), out, resume=True, console=QUIET)
    assert [a["step"] for a in read_alarms(out)] == [3]
    with pytest.raises(Halted):
        train(strict(model, grader, 8, **STRICT, act="stop"), out, resume=True, console=QUIET)
    assert [(a["step"], a["action"]) for a in read_alarms(out)] == [(3, "pause"), (7, "stop")]
    train(strict(model, grader, 9, **STRICT, act="stop"), out, resume=True, console=QUIET)  # the user's to decide
    assert rows(out)[-1]["step"] == 9


# --- killed between an alarm and what it does ------------------------------------------------------------------


class Killed(BaseException):
    """Nothing that is caught on the way."""


def killed(*_, **__):
    raise Killed


@pytest.mark.parametrize("act", ["snapshot", "pause", "stop"])
@pytest.mark.parametrize("where", ["keep", "put down"])
def test_an_action_that_a_kill_cut_off_is_carried_out_on_resume(
    model_folder, tmp_path, grader, drifting, monkeypatch, act, where
):
    wanted, out = faulty(model_folder(), grader, watch__act=act), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(*((Checkpoints, "keep") if where == "keep" else (Lookout, "acted")), killed)
        with pytest.raises(Killed):
            train(wanted, out, console=QUIET)
    told = read_alarms(out)
    (acting,) = [a for a in told if a["action"]]
    assert acting["action"] == act
    if act == "snapshot":
        train(wanted, out, resume=True, console=QUIET)
    else:
        with pytest.raises(Halted if act == "stop" else Interrupted) as end:
            train(wanted, out, resume=True, console=QUIET)
        assert end.value.why == acting["reason"]
        assert rows(out)[-1]["step"] == 10  # nothing was trained first
    assert kept(out) == ["step-000008"]
    assert read_alarms(out)[: len(told)] == told
    assert ((out / "summary.json").exists(), (out / "model").exists()) == (act != "pause",) * 2
    train(wanted, out, resume=True, console=QUIET)  # and only once
    assert rows(out)[-1]["step"] == 12


def test_an_engine_that_dies_in_an_evaluation_does_not_swallow_the_stop(
    model_folder, tmp_path, grader, drifting, monkeypatch
):
    wanted = faulty(model_folder(), grader, watch__act="stop", eval={"every": 5, "data": ["arithmetic"], "limit": 2})
    real = loop.evaluate_now

    def dying(run, clock):
        if run.progress.step == 10:
            raise EngineFailed("the engine is gone")
        return real(run, clock)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_now", dying)
        with pytest.raises(EngineFailed):
            train(wanted, tmp_path / "run", console=QUIET)
    with pytest.raises(Halted):
        train(wanted, tmp_path / "run", resume=True, console=QUIET)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["model_step"]) == (10, 8)


def test_a_ctrl_c_beside_a_snapshot_is_no_pause_by_an_alarm(model_folder, tmp_path, grader, drifting, monkeypatch):
    real = loop.train_step

    def interrupted(run, step, clock):
        if step == 10:
            signal.raise_signal(signal.SIGINT)
        return real(run, step, clock)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(Interrupted) as stop:
        train(faulty(model_folder(), grader), tmp_path / "run", console=QUIET)
    assert (stop.value.step, stop.value.why) == (10, "")
    assert [a["action"] for a in read_alarms(tmp_path / "run") if a["action"]] == ["snapshot"]


# --- files -----------------------------------------------------------------------------------------------------


def test_a_run_that_is_watched_says_so_and_one_that_is_not_does_not(model_folder, tmp_path):
    shown = Console(record=True, width=200, file=QUIET.file)
    short = train(recipe(model_folder(), steps=2), tmp_path / "watched", console=shown)
    assert (short / "alarms.jsonl").read_text() == ""
    assert "2 steps are too few for watch.window = 10" in shown.export_text()
    blind = train(recipe(model_folder(), steps=2, watch__enabled=False), tmp_path / "blind", console=QUIET)
    assert not (blind / "alarms.jsonl").exists()


def test_alarms_of_steps_that_are_taken_back_go_even_where_nobody_watches_any_more(model_folder, tmp_path):
    out = train(recipe(model_folder(), steps=2), tmp_path / "run", console=QUIET)
    alarm = {"step": 3, "level": "act", "signal": "kl", "action": "snapshot"}
    (out / "alarms.jsonl").write_text(json.dumps(alarm | {"step": 2}) + "\n" + json.dumps(alarm) + "\n")
    train(recipe(model_folder(), steps=3, watch__enabled=False), out, resume=True, console=QUIET)
    assert [a["step"] for a in read_alarms(out)] == [2]


class Weights:
    """What a checkpoint asks of a backend."""

    def state(self):
        import torch

        from tenbit.backends import TrainerState

        return TrainerState({"w": torch.zeros(2)}, {})


def test_of_many_kept_checkpoints_the_first_and_the_newest_stay(tmp_path):
    from tenbit.checkpoint import complete

    checkpoints = Checkpoints(tmp_path, keep=1)
    gone = []
    for step in range(1, 13):
        checkpoints.save(Weights(), Progress(step, 0))
        if step % 2 == 0:
            now = checkpoints.keep(step, f"why {step}")
            assert now.path.name == f"step-{step:06d}"
            gone += [p.name for p in now.given_up]
            checkpoints.keep(step, "again")
    checkpoints.wait()
    assert [p.name for p in complete(tmp_path)] == ["step-000002", "step-000010", "step-000012"]
    assert gone == ["step-000004", "step-000006", "step-000008"]
    assert json.loads((tmp_path / "step-000002" / "kept.json").read_text())["reason"] == "why 2"


# --- the rules -------------------------------------------------------------------------------------------------


def test_a_signal_that_goes_silent_ends_its_trouble():
    """KL at act, then rows without it for a window; then another signal, which must act, and a new healthy step."""
    loud = [row(i, mismatch__kl_k3=2e-6 if i < 16 else 2e-4) for i in range(1, 31)]
    silent = [row(i) for i in range(31, 60)]
    for r in silent:
        del r["mismatch/kl_k3"]
    later = [r | {"policy/entropy": 3.0} if r["step"] >= 45 else r for r in silent]
    acts = [(a.step, a.signal, a.action) for a in replay(loud + later, spec(act="pause")) if a.level == "act"]
    assert acts == [(20, "kl", "pause"), (49, "entropy", "pause")]
    short = [r | ({} if r["step"] < 40 else {"mismatch/kl_k3": 2e-4}) for r in silent]  # nine of ten
    assert [level for _, level, _ in found(loud + short) if level != "note"] == ["act"]


@pytest.mark.parametrize("key", ["mismatch__kl_k3", "policy__entropy", "mismatch__seq_ess"])
def test_what_is_usual_comes_from_numbers_alone(key):
    usual = row(0)[key.replace("__", "/")]
    for nulls in range(1, 5):
        healthy = series(key, [None, usual, None, None, usual, None][-nulls - 1 :] + [usual] * 40)
        assert [level for _, level, _ in found(healthy)] in ([], ["note"]), nulls
        worse = usual / 10 if "ess" in key else usual * 10
        changed = series(key, [None, usual, None, None, usual, usual] + [usual] * 10 + [worse] * 20)
        assert found(changed)[-1][1:] == ("act", key.partition("__")[2].replace("kl_k3", "kl").replace("seq_", ""))


@pytest.mark.parametrize("key", ["mismatch__kl_k3", "policy__entropy", "mismatch__seq_ess"])
def test_no_number_for_a_window_is_the_worst_from_the_start_and_later(key):
    usual = row(0)[key.replace("__", "/")]
    assert [(step, level) for step, level, _ in found(series(key, [None] * 30))] == [(10, "act")]
    late = replay(series(key, [usual] * 20 + [None] * 12), spec())
    assert late[-1].level == "act"
    assert late[-1].value is None


def test_the_numbers_in_an_entropy_alarm_divide():
    """The lowest falls in the step of the alarm itself; the text must hold the one that was divided by."""
    alarms = replay(series("policy__entropy", [0.03] * 5 + [0.01] * 19 + [0.05] * 8), spec())
    assert [(a.step, a.level, a.signal) for a in alarms] == [(30, "warn", "entropy"), (31, "act", "entropy")]
    for alarm in alarms:
        value, number, lowest = (float(x) for x in re.findall(r"\d+(?:\.\d+)?", alarm.reason)[:3])
        assert value == pytest.approx(alarm.value, rel=5e-3)
        assert number / lowest == pytest.approx(alarm.value, rel=5e-3)


def test_a_remedy_speaks_of_a_kept_checkpoint_only_where_there_is_one():
    rising = series("mismatch__kl_k3", [2e-6 * 1.1**i for i in range(60)])
    for act in ("snapshot", "nothing"):
        for alarm in replay(rising, spec(act=act)):
            assert alarm.remedy.endswith(GO_BACK) == (alarm.level == "act" and act != "nothing")
    assert not any("kept" in s.remedy or "RUN" in s.remedy for s in SIGNALS.values())


# --- a recipe --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("watch", "words"),
    [
        (True, ["watch = True", "watch.enabled"]),
        ({"signals": []}, ["watch.signals", "watch.enabled = false"]),
        ({"signals": "kl"}, ["watch.signals = 'kl'", "list"]),
        ({"signals": ["kl", 3]}, ["watch.signals", "list of names"]),
        ({"kl": 3}, ["watch.kl = 3", "watch.kl.warn = 3"]),
        ({"gap": {"act": 2.0}}, ["watch.gap", "never above 1", "watch.signals"]),
        ({"skipped": {"warn": 1.5, "act": 2}}, ["watch.skipped", "never above 1"]),
    ],
)
def test_settings_that_would_watch_nothing_are_refused_in_words(watch, words):
    with pytest.raises(ValueError, match="watch") as error:
        Recipe.of({"steps": 3, "rollout": {"max_tokens": 8}, "watch": watch})
    for word in words:
        assert word in str(error.value)
    assert not re.search("WatchSpec|LevelsSpec|tuple", str(error.value))
    assert Recipe.of({"steps": 3, "rollout": {"max_tokens": 8}, "watch": {"enabled": False, "signals": []}})


# --- runs of the past ------------------------------------------------------------------------------------------


def test_only_runs_at_their_end_have_false_alarms(tmp_path):
    early, false = recorded(tmp_path / "early", 150, 100), recorded(tmp_path / "false", None, 50)
    going, stopped = recorded(tmp_path / "going", None, 50), recorded(tmp_path / "stopped", None, 50)
    more = "steps = 300\nrollout.max_tokens = 8\n"
    for folder in (going, stopped):
        (folder / "recipe.toml").write_text(more)
    (stopped / "summary.json").write_text(json.dumps({"stopped": {"reason": "kl"}}))
    runs = [watched(folder) for folder in (early, false, going, stopped)]
    assert [r.outcome.kind for r in runs] == ["collapsed", "failed", "running", "stopped"]
    lines = totals(runs)
    assert "1 not finished and 1 ended by an alarm: not counted" in lines[0]
    assert all("false alarms in 1 of 1 that did not" in line for line in lines[1:])
    assert watched(going / "metrics.jsonl").outcome.kind == "running"


def test_folders_of_runs_globs_and_what_holds_no_run(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    for name in ("a", "b"):
        recorded(runs / name, 150, 100)
    (runs / "new").mkdir()
    (runs / "new" / "metrics.jsonl").write_text("")
    (runs / "ablation.json").write_text(json.dumps({"cells": [1, 2]}, indent=1))
    (runs / "samples.jsonl").write_text("".join(json.dumps({"step": i, "response": "x"}) + "\n" for i in range(3)))
    (runs / "page.png").write_bytes(bytes(range(256)) * 4)
    whole = tenbit("watch", "runs", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "2 runs, 2 of them collapsed" in whole.stdout
    assert "new/metrics.jsonl: holds no step yet" in whole.stdout
    some = sorted(str(p.relative_to(tmp_path)) for p in runs.iterdir())
    glob = tenbit("watch", *some, "runs/a/../a", "runs/a/metrics.jsonl", cwd=tmp_path)
    assert "2 runs, 2 of them collapsed" in glob.stdout, glob.stderr
    for name in ("ablation.json", "samples.jsonl", "page.png"):
        assert f"left out: runs/{name}: holds no metrics" in glob.stdout
        alone = tenbit("watch", f"runs/{name}", cwd=tmp_path)
        assert (alone.returncode, f"{name}: holds no metrics" in alone.stderr) == (2, True)
    lines = tenbit("watch", "runs", "--json", cwd=tmp_path).stdout.splitlines()
    assert [json.loads(line)["run"] for line in lines] == ["runs/a", "runs/b"]
    for wrong, words in ((["runs", "runs/typo"], "typo: there is no such file or folder"),
                         (["runs", "watch.enabled=false"], "judges every run")):  # fmt: skip
        done = tenbit("watch", *wrong, cwd=tmp_path)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr


def test_the_command_to_go_on_is_one_line(model_folder, tmp_path, grader):
    deep = tmp_path / ("a-long-folder-name-" * 6)
    strict(model_folder(), grader, 8, **STRICT, act="pause").dump(tmp_path / "r.toml")
    done = tenbit("train", "r.toml", "--out", str(deep), cwd=tmp_path)
    assert done.returncode == 130, done.stderr
    assert f"  tenbit train r.toml --out {deep} --resume" in done.stdout.splitlines()
