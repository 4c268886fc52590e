"""The run log: what is written reads back exactly, survives a kill, and looks right with and without a terminal."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tenbit.console import step_line
from tenbit.precision import Precision
from tenbit.runlog import RunLog, cut_back, mismatch_ratio, pick, read_rows, show_summary
from tenbit.types import Completion, Problem, Rollout


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100, highlight=False)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rollout(place: int, correct: bool, text: str = "4 + 5 = 9") -> Rollout:
    completion = Completion((1, 2), (3, 4, 5), torch.zeros(3), "stop" if correct else "length")
    return Rollout(Problem("What is 4 + 5?", "9", f"sums.jsonl:{place}"), completion, text, float(correct), correct, 0)


def metrics_of(step: int) -> dict[str, float | int | None]:
    """A function of the step alone, so that two runs can be compared byte for byte."""
    chance = random.Random(step)
    return {
        "train/reward": chance.random(),
        "train/accuracy": chance.random(),
        "mismatch/kl_k3": math.exp(chance.gauss(-12, 1)),
        "optim/grad_norm": None if step % 3 == 0 else chance.random(),
        "optim/loss_scale": 65536.0,
        "optim/skipped": int(step % 3 == 0),
        "eval/sums/avg@4": chance.random(),
    }


def write_steps(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.samples(step, [rollout(i, i % 2 == 0, f"step {step}, {i}") for i in range(8)])
        log.log(step, metrics_of(step))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


# --- metrics.jsonl ----------------------------------------------------------------------------------------------


def test_floats_read_back_bit_for_bit_and_ints_stay_ints(tmp_path: Path) -> None:
    chance = random.Random(0)
    values = [0.1, 1 / 3, -0.0, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, math.pi, 1e22]
    while len(values) < 2000:
        value = struct.unpack("<d", chance.randbytes(8))[0]
        if math.isfinite(value):
            values.append(value)
    with RunLog(tmp_path, total_steps=1, console=quiet(), trackers=()) as log:
        log.log(1, {str(i): v for i, v in enumerate(values)} | {"count": 2**60 + 1, "flag": True})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    for i, value in enumerate(values):
        assert struct.pack("<d", row[str(i)]) == struct.pack("<d", value)
    assert row["count"] == 2**60 + 1
    assert row["flag"] == 1
    assert row["step"] == 1


def test_nan_and_infinity_become_null_in_strict_json(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=1, console=quiet()) as log:
        log.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": float(torch.tensor(2.5)), "e": None})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "a": None, "b": None, "c": None, "d": 2.5, "e": None}


def test_a_row_is_in_the_file_when_log_returns(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=3, console=quiet(), trackers=()) as log:
        for step in (1, 2, 3):
            log.log(step, metrics_of(step))
            assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, step + 1))


def test_steps_must_go_up(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=3, console=quiet(), trackers=()) as log:
        log.log(2, {})
        with pytest.raises(AssertionError, match="2 after 2"):
            log.log(2, {})


def test_a_full_disk_is_not_swallowed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path, total_steps=1, console=quiet(), trackers=())
    with pytest.raises(OSError, match="No space left"):
        log.log(1, {"train/reward": 1.0})


# --- resuming ---------------------------------------------------------------------------------------------------

CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
from test_runlog import RunLog, Path, quiet, write_steps
with RunLog(Path(sys.argv[1]), total_steps=100000, console=quiet()) as log:
    write_steps(log, 1, 100000)
"""


def test_killed_and_resumed_files_equal_an_uninterrupted_runs(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(killed), str(Path(__file__).parent)])
    try:
        metrics = killed / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 23):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with metrics.open("ab") as file:
        file.write(b'{"step": 99999, "train/rew')  # what a kill in the middle of a write leaves
    with (killed / "samples.jsonl").open("ab") as file:
        file.write(b'{"step": 9')
    time.sleep(1.1)  # event files are named, and read, in the order of the second they were made in
    with RunLog(killed, total_steps=30, resume_step=20, console=quiet()) as log:
        write_steps(log, 21, 30)
    with RunLog(whole, total_steps=30, console=quiet()) as log:
        write_steps(log, 1, 30)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert events(killed) == events(whole)
    assert not list(killed.glob("*.tmp"))


def test_resume_without_a_checkpoint_starts_over(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=5, console=quiet()) as log:
        log.log(0, {"eval/sums/avg@4": 0.5})
        write_steps(log, 1, 3)
    with RunLog(tmp_path, total_steps=5, resume_step=0, console=quiet()) as log:
        log.log(0, {"eval/sums/avg@4": 0.5})
        write_steps(log, 1, 5)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_a_new_run_does_not_touch_an_old_one(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=2, console=quiet(), trackers=()) as log:
        write_steps(log, 1, 2)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"already holds a run.*--resume"):
        RunLog(tmp_path, total_steps=2, console=quiet(), trackers=())
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_rows_lost_before_the_checkpoint_are_an_error(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=9, console=quiet(), trackers=()) as log:
        write_steps(log, 1, 4)
    with pytest.raises(ValueError, match="ends at step 4, but the checkpoint is of step 6"):
        RunLog(tmp_path, total_steps=9, resume_step=6, console=quiet(), trackers=())


def test_damage_in_the_middle_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .*Remove the line"):
        read_rows(path)
    path.write_bytes(b'{"step": 1}\n{"st')
    assert read_rows(path) == [{"step": 1}]
    path.write_bytes(b'{"step": 1, "a": NaN}')
    assert read_rows(path) == [{"step": 1, "a": None}]
    path.write_bytes(b"")
    assert read_rows(path) == []


def test_cutting_keeps_the_bytes_of_what_stays(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step":1,  "a": 1e-05}\n{"step": 1}\n{"step": 2}\n{"step": 3')
    cut_back(path, 1)
    assert path.read_bytes() == b'{"step":1,  "a": 1e-05}\n{"step": 1}\n'
    cut_back(tmp_path / "none.jsonl", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


# --- trackers ---------------------------------------------------------------------------------------------------


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def expected_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    out: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name != "step" and value is not None:
                out.setdefault(name, []).append((row["step"], struct.unpack("<f", struct.pack("<f", value))[0]))
    return out


def test_tensorboard_shows_what_metrics_jsonl_says_also_after_a_resume(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=12, console=quiet()) as log:
        write_steps(log, 1, 8)
    assert events(tmp_path) == expected_events(tmp_path)
    with RunLog(tmp_path, total_steps=12, resume_step=5, console=quiet()) as log:
        write_steps(log, 6, 12)
    assert events(tmp_path) == expected_events(tmp_path)
    assert len(expected_events(tmp_path)["train/reward"]) == 12


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tracker_that_fails_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    console = quiet()
    with RunLog(tmp_path, total_steps=9, console=console) as log:
        write_steps(log, 1, 2)
        (event_file,) = (tmp_path / "tensorboard").iterdir()
        event_file.unlink()
        event_file.symlink_to("/dev/full")
        for step in range(3, 10):
            log.log(step, metrics_of(step))
            time.sleep(0.02)
    told = [line for line in output(console).splitlines() if "TensorBoard failed" in line]
    assert len(told) == 1
    assert "No space left" in told[0]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 9


def test_trackers_are_not_imported_before_a_run_starts() -> None:
    code = "import sys, tenbit.runlog; sys.exit('tensorboard' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- samples ----------------------------------------------------------------------------------------------------


def test_samples_show_right_and_wrong_and_hold_any_text(tmp_path: Path) -> None:
    rollouts = [rollout(i, i in (5, 6, 7), "a\ud800b\u2028\x00 日本") for i in range(8)]
    with RunLog(tmp_path, total_steps=1, console=quiet(), trackers=()) as log:
        log.samples(1, rollouts)
        log.samples(2, rollouts[:1])
        log.samples(3, [])
    rows = read_rows(tmp_path / "samples.jsonl")
    assert [(r["problem"], r["correct"]) for r in rows if r["step"] == 1] == [
        ("sums.jsonl:0", False),
        ("sums.jsonl:1", False),
        ("sums.jsonl:5", True),
        ("sums.jsonl:6", True),
    ]
    assert len(rows) == 5
    assert rows[0]["response"] == "a\ud800b\u2028\x00 日本"
    assert {k: rows[-1][k] for k in ("prompt", "reward", "length", "finish")} == {
        "prompt": "What is 4 + 5?",
        "reward": 0.0,
        "length": 3,
        "finish": "length",
    }


@pytest.mark.parametrize(("right", "wrong"), [(0, 9), (9, 0), (1, 9), (9, 1), (2, 1), (0, 0)])
def test_pick_takes_as_many_as_there_are_and_both_kinds(right: int, wrong: int) -> None:
    rollouts = [rollout(i, i < right) for i in range(right + wrong)]
    chosen = pick(rollouts, 4)
    assert len(chosen) == min(4, right + wrong)
    assert sum(r.correct for r in chosen) >= min(right, 1)
    assert sum(not r.correct for r in chosen) >= min(wrong, 1)
    assert pick(rollouts, 0) == []


# --- the console ------------------------------------------------------------------------------------------------


def test_without_a_terminal_lines_are_plain_and_fit_eighty_columns(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    with RunLog(tmp_path, total_steps=60, console=console, trackers=()) as log:
        log.show_plan(Precision.parse("fp16"), {"master": 12, "rollout": 12})
        write_steps(log, 1, 60)
    text = output(console)
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert lines[0].startswith("tenbit  ")  # with the run folder's path, which may be as long as it likes
    assert max(len(line) for line in lines[1:]) <= 80
    assert sum(line.split()[:2] == ["step", "reward"] for line in lines) == 3  # repeated every 25 steps
    assert sum("skipped" in line for line in lines) == 20
    assert json.loads((tmp_path / "precision.json").read_text()) == [list(r) for r in Precision.parse("fp16").rows()]


def test_the_plan_shows_every_part_with_the_tensors_seen(tmp_path: Path) -> None:
    console = quiet()
    with RunLog(tmp_path, total_steps=1, console=console, trackers=()) as log:
        log.show_plan(Precision.parse("bf16/fp32"), {"master": 12, "optimizer": 24, "copy": 13})
    rows = {words[0]: words for line in output(console).splitlines() if (words := line.split())}
    assert rows["master"][:3] == ["master", "fp32", "12"]
    assert rows["optimizer"][:3] == ["optimizer", "fp32", "24"]
    assert rows["compute"][:3] == ["compute", "bf16", "13"]
    assert rows["rollout"][:2] == ["rollout", "fp32"]
    assert rows["loss_scale"][:2] == ["loss_scale", "none"]


def test_on_a_terminal_a_bar_stays_below_the_lines(tmp_path: Path) -> None:
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as terminal:
        console = Console(file=terminal, width=90, highlight=False, force_terminal=True, _environ={"TERM": "xterm"})
        with RunLog(tmp_path, total_steps=8, resume_step=None, console=console, trackers=()) as log:
            log.phase("sampling")
            write_steps(log, 1, 3)
            time.sleep(0.4)
    seen = b""
    while chunk := _read(parent):
        seen += chunk
    text = seen.decode()
    assert "3/8" in text
    assert "sampling" in text
    assert "\x1b[1;31m  skipped" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0  # the cursor is hidden, and given back


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end is closed
        return b""


def test_missing_values_are_dashes_and_brackets_are_not_markup(tmp_path: Path) -> None:
    line = step_line({"step": 3, "train/reward": 0.25, "optim/grad_norm": None, "optim/loss_scale": 3.0})
    assert line is not None
    assert line.plain.split() == ["3", "0.250", "–", "–", "–", "–", "–", "–", "3"]
    console = quiet()
    folder = tmp_path / "[red]run[/blue]"
    with RunLog(folder, total_steps=1, console=console, trackers=()) as log:
        log.log(1, {"eval/[bold]set/avg@2": 0.5})
    assert str(folder) in output(console).replace("\n", "")
    assert "eval [bold]set  avg@2 50.0%" in output(console)


def test_the_summary_ends_with_the_folder_and_the_report(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=2, console=quiet(), trackers=()) as log:
        log.log(0, {"eval/sums/avg@4": 0.5})
        log.log(1, {"train/accuracy": 0.25, "optim/skipped": 1})
        log.log(2, {"train/accuracy": 0.75, "optim/skipped": 0, "eval/sums/avg@4": 0.875})
    table = [{"precision": "fp16", "kl_k3": 2e-6}, {"precision": "bf16", "kl_k3": 1e-4}]
    (tmp_path / "mismatch.json").write_text(json.dumps(table))
    (tmp_path / "report.html").touch()
    console = Console(file=io.StringIO(), width=70, highlight=False)
    show_summary(tmp_path, console)
    text = output(console)
    assert "25.0% → 75.0%" in text
    assert "50.0% → 87.5%" in text
    assert "fp16 2.00e-06" in text
    assert "bf16 1.00e-04" in text
    assert "50 times" in text
    assert "1 of 2 steps" in text
    assert [line.split()[-1] for line in text.splitlines()[-2:]] == [str(tmp_path), str(tmp_path / "report.html")]


def test_the_ratio_is_only_said_where_it_can_be() -> None:
    assert mismatch_ratio([{"precision": "fp16", "kl_k3": 2.0}, {"precision": "bf16", "kl_k3": 5.0}]) == 2.5
    assert mismatch_ratio([{"precision": "fp16", "kl_k3": 0.0}, {"precision": "bf16", "kl_k3": 5.0}]) is None
    assert mismatch_ratio([{"precision": "fp16", "kl_k3": 1.0}]) is None
    assert mismatch_ratio([]) is None
