"""`tenbit ablate` and `tenbit sanity` with real runs: cells are the runs they claim to be, and survive being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import refused, tenbit
from test_loop import recipe, rows

from tenbit import train
from tenbit.precision import Precision
from tenbit.studies import ablation_run
from tenbit.studies.ablation_grid import make_grid
from tenbit.studies.ablation_run import Job, run_jobs, side_by_side

GRID = ("--precision", "fp16,bf16/fp32", "--algorithm", "grpo,pg-is", "--seeds", "1")


@pytest.fixture
def small(model_folder, tmp_path):
    """small(steps=3) writes the small recipe and returns its path."""

    def write(**changes) -> Path:
        file = tmp_path / "small.toml"
        recipe(model_folder(), **changes).dump(file)
        return file

    return write


def grid(file: Path, precisions=(), algorithms=(), seeds="1", overrides=()):
    return make_grid(file, overrides, precisions=precisions, algorithms=algorithms, seeds=seeds)


def test_the_grid_has_every_cell_once_with_equal_seeds(small):
    cells = grid(small(seed=4), ["fp16", "bf16", "bf16/fp16"], ["pg-is", "grpo"], "2")
    assert [c.name for c in cells][:3] == ["pg-is-fp16-seed4", "pg-is-bf16-seed4", "pg-is-bf16-fp16-seed4"]
    assert len({c.name for c in cells}) == 12
    assert {(c.recipe.precision.name, c.recipe.algorithm.name, c.recipe.seed) for c in cells} == {
        (p, a, s) for p in ("fp16", "bf16", "bf16/fp16") for a in ("pg-is", "grpo") for s in (4, 5)
    }
    assert [c.seed for c in grid(small(), seeds="7,3")] == [3, 7]
    assert [c.seed for c in grid(small(), seeds="7,")] == [7]


def test_only_what_the_grid_varies_differs_between_cells(small):
    a, b = grid(small(), ["fp16", "fp32"], ["grpo"])
    left, right = a.recipe.tree(), b.recipe.tree()
    assert {k for k in left if left[k] != right.get(k)} == {"name", "precision"}


def test_a_recipes_plan_keeps_what_is_not_a_format(small):
    plan = {"preset": "fp16", "head": "fp32", "reduce": "fp16", "loss_scale": {"initial": 1024.0}}
    coarse = {"preset": "fp16", "rollout_bits": 4, "sync": "fp32"}
    found = [c.recipe.precision for c in grid(small(precision=coarse), ["fp16", "bf16", "fp16/fp16~2"])]
    assert [(p.name, p.sync.value) for p in found] == [
        ("fp16/fp16~4", "fp32"), ("bf16/bf16~4", "fp32"), ("fp16/fp16~2", "fp32"),
    ]  # fmt: skip
    fp16, bf16 = (c.recipe.precision for c in grid(small(precision=plan), ["fp16", "bf16/fp32"]))
    assert fp16 == Precision.parse(plan)
    assert bf16 == Precision.parse({"preset": "bf16/fp32", "head": "fp32", "reduce": "bf16"})


def test_algorithm_keys_belong_to_the_recipes_own_algorithm(small):
    file = small(algorithm__name="grpo-token-tis", algorithm__cap=2.0)
    own, other = (c.recipe.algorithm for c in grid(file, [], ["grpo-token-tis", "pg-is"]))
    assert own.cap == 2.0
    assert other.cap is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--precision", "fp61"), ("--precision fp61", "fp16")),
        (("--precision", "fp16,fp16/fp16"), ("--precision", "twice")),
        (("--algorithm", "grop"), ("--algorithm", "did you mean 'grpo'")),
        (("--seeds", "many"), ("--seeds many",)),
        (("--seeds", "0"), ("--seeds 0", "7,")),
        (("--seeds", "7,7"), ("--seeds", "twice")),
        (("--precision", "FP16"), ("--precision FP16", "no format")),
        (("--algorithm", "gspo", "algorithm.advantage=group-mean"), ("algorithm.advantage", "--algorithm")),
        (("--algorithm", "gspo", "algorithm.name=grpo"), ("algorithm.name", "--algorithm")),
        (("--precision", "fp16", "precision=bf16"), ("precision=bf16", "--precision")),
        (("task.data=nothere.jsonl",), ("nothere.jsonl",)),
        (("--ranks", "1000"), ("--ranks 1000",)),
        (("--jobs", "0"), ("--jobs 0",)),
        (("--ranks", "0"), ("--ranks 0",)),
        (("--algorithm", "dapo", "rollout.samples=1"), ("rollout.samples",)),
    ],
)
def test_bad_options_are_refused_before_anything_runs(small, tmp_path, options, words):
    refused(tenbit("ablate", str(small()), *options, "--out", "a", cwd=tmp_path), *words)
    assert not (tmp_path / "a").exists()


def test_an_ablation_is_the_runs_it_names_and_ends_in_one_report(small, tmp_path):
    done = tenbit("ablate", str(small()), *GRID, "--jobs", "2", "--out", "abl", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = grid(small(), ["fp16", "bf16/fp32"], ["grpo", "pg-is"])
    alone = train(cells[2].recipe, tmp_path / "alone")
    assert rows(tmp_path / "abl" / cells[2].name) == rows(alone)
    listed = json.loads((tmp_path / "abl/ablation.json").read_text())
    assert list(listed) == [c.name for c in cells]
    report = json.loads((tmp_path / "abl/report.json").read_text())
    assert {(c["algorithm"], c["precision"]) for c in report["cells"]} == {(c.algorithm, c.precision) for c in cells}
    for cell in report["cells"]:
        assert cell["outcomes"] == {"failed": 1}  # a random model does no arithmetic
    page = (tmp_path / "abl/report.html").read_text()
    assert all(name in page for name in ("grpo", "pg-is", "bf16/fp32"))
    again = tenbit("ablate", str(small()), *GRID, "--out", "abl", cwd=tmp_path)
    assert "4 finished" in again.stdout


def test_equal_seeds_see_equal_problems_in_equal_order(small, tmp_path):
    cells = grid(small(log_samples=99), ["fp32", "fp16"], ["pg-is", "grpo"])
    seen = {}
    for cell in cells:
        folder = train(cell.recipe, tmp_path / cell.name)
        lines = (folder / "samples.jsonl").read_text().splitlines()
        seen[cell.name] = [(row["step"], row["problem"]) for row in map(json.loads, lines)]
    assert len(seen) == 4
    assert len({tuple(v) for v in seen.values()}) == 1


def test_another_recipe_in_the_same_folder_is_refused(small, tmp_path):
    options = ("--seeds", "1", "--out", "abl")
    assert tenbit("ablate", str(small()), *options, cwd=tmp_path).returncode == 0
    kept = {p: p.read_bytes() for p in (tmp_path / "abl").rglob("*") if p.is_file()}
    refused(tenbit("ablate", str(small(optim__lr=5e-4)), *options, cwd=tmp_path), "optim.lr", "another folder")
    other = ("--precision", "fp16", "--seeds", "5,", "--out", "abl")  # a new cell, and of another recipe
    refused(tenbit("ablate", str(small(optim__lr=5e-4)), *other, cwd=tmp_path), "optim.lr", "another folder")
    refused(tenbit("ablate", str(small(steps=2)), *options, cwd=tmp_path), "3 steps are done")
    assert {p: p.read_bytes() for p in (tmp_path / "abl").rglob("*") if p.is_file()} == kept
    longer = tenbit("ablate", str(small(steps=4)), *options, cwd=tmp_path)
    assert longer.returncode == 0
    assert len(rows(tmp_path / "abl" / "pg-is-fp32-seed0")) == 4


def test_more_cells_join_the_grid_and_its_report(small, tmp_path):
    for precision in ("fp16", "fp32"):
        done = tenbit("ablate", str(small()), "--precision", precision, "--seeds", "1", "--out", "abl", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert list(json.loads((tmp_path / "abl/ablation.json").read_text())) == ["pg-is-fp16-seed0", "pg-is-fp32-seed0"]
    assert {c["precision"] for c in json.loads((tmp_path / "abl/report.json").read_text())["cells"]} == {"fp16", "fp32"}


def test_a_folder_with_something_else_in_it_is_refused(small, tmp_path):
    run = train(grid(small())[0].recipe, tmp_path / "run")
    refused(tenbit("ablate", str(small()), "--seeds", "1", "--out", "run", cwd=tmp_path), "--out run", "no ablation")
    assert not (run / "ablation.json").exists()


def test_gpus_are_shared_out_whole(monkeypatch):
    monkeypatch.setattr(ablation_run, "_gpus", lambda: ["0", "1", "2", "3"])
    assert side_by_side(None, 10, 1) == 4
    assert side_by_side(None, 10, 2) == 2
    seen = [ablation_run._environment(slot, 2, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)]
    assert seen == ["0,1", "2,3"]
    for jobs, ranks in ((2, 3), (1, 5), (3, 2)):
        with pytest.raises(ValueError, match="GPU"):
            side_by_side(jobs, 10, ranks)
    assert ablation_run._environment(5, 8, 1)["CUDA_VISIBLE_DEVICES"] == "1"  # more runs than GPUs share them


def test_a_cell_that_fails_is_named_with_its_cause_and_takes_no_other_with_it(small, tmp_path):
    first, second, third = (c.name for c in grid(small(), ["fp16", "fp32", "bf16"]))
    options = (str(small()), "--seeds", "1", "--out", "abl", "--precision")
    assert tenbit("ablate", *options, "fp16", cwd=tmp_path).returncode == 0
    blocked = tmp_path / "abl" / second
    blocked.mkdir()
    (blocked / "notes.txt").write_text("not a run")
    done = tenbit("ablate", *options, "fp16,fp32,bf16", cwd=tmp_path)
    assert done.returncode == 1
    said = done.stdout.replace("\n", " ")
    assert f"failed    {second}" in said
    assert "holds no run to resume" in said
    assert len(rows(tmp_path / "abl" / first)) == len(rows(tmp_path / "abl" / third)) == 3


def test_a_paused_cell_says_why_and_goes_on(small, tmp_path):
    alarm = ["watch.act=pause", "watch.warmup=2", "watch.window=3", "watch.gap={note=1e-12,warn=2e-12,act=3e-12}"]
    options = (str(small(precision="fp16", steps=8)), *alarm, "--seeds", "1", "--out", "abl")
    first = tenbit("ablate", *options, cwd=tmp_path)
    assert first.returncode == 1
    assert "paused by an alarm at step" in first.stdout
    again = tenbit("ablate", *options, cwd=tmp_path)
    assert again.returncode == 0, again.stdout


def slow(small) -> Path:
    return small(steps=40, rollout__prompts=12, checkpoint__every=5)


def wait_for(condition, seconds=90.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def start(file: Path, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tenbit", "ablate", str(file), "--precision", "fp32,fp16", "--seeds", "1",
               "--jobs", "2", "--out", "abl"]  # fmt: skip
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def running_in(folder: Path) -> list[int]:
    """Processes that train in a folder, by their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "train" in command and str(folder) in command[-3:]:
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_an_ablation_that_is_stopped_stops_its_runs_and_goes_on(small, tmp_path, how):
    cells = grid(slow(small), ["fp32", "fp16"])
    process = start(slow(small), tmp_path)
    folders = [Path("abl") / c.name for c in cells]
    wait_for(lambda: all(lines(tmp_path / f) >= 7 for f in folders))
    process.send_signal(how)
    process.communicate(timeout=90)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    again = start(slow(small), tmp_path)  # at once: after a kill the runs may still be saving, and are waited for
    wait_for(lambda: all("resumes after step" in log.read_text() for log in (tmp_path / "abl/logs").iterdir()))
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert rows(tmp_path / folders[0]) == rows(train(cells[0].recipe, tmp_path / "alone"))


@pytest.mark.slow
def test_a_cell_killed_by_sigkill_is_said_and_goes_on_with_the_same_command(small, tmp_path):
    process = start(slow(small), tmp_path)
    cells = grid(slow(small), ["fp32", "fp16"])
    folder = Path("abl") / cells[1].name
    wait_for(lambda: lines(tmp_path / folder) >= 7)
    (pid,) = running_in(folder)
    os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert "killed by SIGKILL" in output
    assert lines(tmp_path / "abl" / cells[0].name) == 40
    again = start(slow(small), tmp_path)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert "1 finished" in output
    assert rows(tmp_path / folder) == rows(train(cells[1].recipe, tmp_path / "alone"))


@pytest.mark.slow
def test_a_cell_of_two_ranks_is_the_run_of_one(small, tmp_path):
    options = ("--seeds", "1", "--jobs", "1", "--ranks", "2", "--out", "abl")
    done = tenbit("ablate", str(small()), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (cell,) = grid(small())
    found, alone = rows(tmp_path / "abl" / cell.name), rows(train(cell.recipe, tmp_path / "alone"))
    for key in ("train/response_length", "optim/grad_norm", "optim/loss"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in alone], rel=1e-4, abs=1e-7)


def test_side_by_side_is_what_there_is_room_for():
    assert side_by_side(3, 10) == 3
    assert side_by_side(8, 2) == 2
    assert side_by_side(None, 100) == min(ablation_run.cores(), int(ablation_run._free_gib() / ablation_run.GIB_A_RUN))


def test_finished_runs_are_not_started(tmp_path):
    (tmp_path / "done").mkdir()
    (tmp_path / "done/summary.json").write_text('{"steps": 5}')
    job = Job("done", tmp_path / "there-is-none.toml", tmp_path / "done", 5)
    from rich.console import Console

    assert run_jobs([job], tmp_path / "logs", None, Console(quiet=True)) == {}
    assert not Job("done", job.recipe, job.folder, 6).finished  # more steps are wanted now


# --- sanity


def test_sanity_judges_a_run_it_trains_and_one_that_is_there(small, tmp_path):
    done = tenbit("sanity", str(small()), "--out", "run", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout
    record = json.loads((tmp_path / "run/sanity.json").read_text())
    assert record["verdict"] == "failed"
    assert record["steps"] == 3
    assert record["evidence"]["prob_diff"] >= 0
    assert "Sanity test: failed" in (tmp_path / "run/report.html").read_text()
    again = tenbit("sanity", "run", cwd=tmp_path)
    assert again.returncode == 1
    assert json.loads((tmp_path / "run/sanity.json").read_text()) == record


def test_sanity_passes_a_run_that_converged_and_says_when_one_collapsed(tmp_path):
    def run(name, values):
        (tmp_path / name).mkdir()
        kept = [{"step": i, "train/accuracy": v, "mismatch/kl_k3": 1e-6 * i, "mismatch/prob_diff_max": i / 200,
                 "mismatch/prob_diff_min": -0.1} for i, v in enumerate(values, 1)]  # fmt: skip
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        return tenbit("sanity", name, cwd=tmp_path)

    good = run("good", [0.6] * 50 + [0.98] * 100)
    assert good.returncode == 0, good.stderr
    assert "PASSED" in good.stdout
    bad = run("bad", [0.6] * 50 + [0.9] * 50 + [0.2] * 50)
    assert bad.returncode == 1
    assert "COLLAPSED" in bad.stdout
    page = (tmp_path / "bad/report.html").read_text()
    assert all(words in page for words in ("Sanity test: collapsed", "at the collapse", "peaked at 90.0%", "was 0.75"))
    record = json.loads((tmp_path / "bad/sanity.json").read_text())
    assert record["collapsed_at"] == 105  # of 20 steps 5 at 0.2: the first mean more than 15 points below
    assert record["peak_step"] == 70  # the first full window of equals
    assert record["evidence"]["kl_k3"] == pytest.approx({"start": 10.5e-6, "peak": 60.5e-6, "end": 95.5e-6})
    assert (record["evidence"]["prob_diff"], record["evidence"]["prob_diff_step"]) == (0.75, 150)


def test_sanity_judges_a_run_that_an_alarm_stopped(small, tmp_path):
    alarm = ["watch.act=stop", "watch.warmup=2", "watch.window=3", "watch.gap={note=1e-12,warn=2e-12,act=3e-12}"]
    done = tenbit("sanity", str(small(precision="fp16", steps=8)), *alarm, "--out", "run", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    record = json.loads((tmp_path / "run/sanity.json").read_text())
    assert record["verdict"] == "stopped"
    assert record["steps"] < 8


def test_an_alarm_that_stops_a_cell_finishes_it(small, tmp_path):
    alarm = ["watch.act=stop", "watch.warmup=2", "watch.window=3", "watch.gap={note=1e-12,warn=2e-12,act=3e-12}"]
    options = (*alarm, "--seeds", "1", "--out", "abl")
    for _ in range(2):
        done = tenbit("ablate", str(small(precision="fp16", steps=8)), *options, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "1 finished" in done.stdout


def test_sanity_refuses_what_is_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tenbit("sanity", "empty", cwd=tmp_path), "metrics.jsonl", "recipe")
    refused(tenbit("sanity", "empty", "steps=3", cwd=tmp_path), "steps=3")
