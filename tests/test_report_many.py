"""The page over several runs: grouping, means and bands against numpy, verdicts, PNGs, and all of it in a browser."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import refused, tenbit
from test_report import ATTACK, Page

from tenbit.recipe import Recipe
from tenbit.report import axis, report
from tenbit.report.chart import Figure, Panel, Series, draw
from tenbit.report.many import write_many
from tenbit.report.many_cells import Cell, collect, find_runs, read_cells
from tenbit.report.many_curves import interval, over_seeds
from tenbit.report.many_figures import ENDS, Desk, sections
from tenbit.report.many_table import Summary, alarms, differences, table, verdict
from tenbit.report.png import canvas, colour, png
from tenbit.report.reading import read_run

STEPS = 100
KL = {"bf16": 3e-4, "fp16": 3e-6}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def metrics(precision: str, seed: int, steps: int = STEPS, collapse: int | None = None) -> list[dict]:
    """Accuracy climbs from 30% to 98%; a collapse takes it back to 0 within 20 steps. Noise by seed."""
    chance = np.random.default_rng([seed, len(precision), ord(precision[0])])
    rows: list[dict] = [{"step": 0, "eval/held_out/avg@4": 0.3}]
    for step in range(1, steps + 1):
        accuracy = min(0.98, 0.3 + 0.68 * step / 40) + chance.normal(0, 0.004)
        if collapse is not None and step > collapse:
            accuracy = max(0.0, accuracy - (step - collapse) / 20)
        gap = 0.3 if precision == "bf16" else 0.01
        row = {
            "step": step,
            "train/reward": accuracy,
            "train/accuracy": accuracy,
            "train/response_length": 100.0 + step,
            "mismatch/kl_k3": KL.get(precision, 1e-4) * float(np.exp(chance.normal())),
            "mismatch/prob_diff_max": gap * chance.uniform(0.5, 1),
            "mismatch/prob_diff_min": -gap * chance.uniform(0.5, 1),
            "optim/grad_norm": chance.uniform(0.1, 0.3),
            "policy/entropy": 1 / step,
            "time/step": 4.0 if "fp32" in precision else 2.0,
        }
        if step % 50 == 0:
            row["eval/held_out/avg@4"] = accuracy - 0.1
        rows.append(row)
    return rows


def make(
    root: Path,
    algorithm: str,
    precision: str,
    seed: int,
    rows: list[dict] | None = None,
    name: str = "",
    **keys: object,
) -> Path:
    """A run folder. `keys` are recipe keys with __ for the dot."""
    folder = root / (name or f"{algorithm}-{precision.replace('/', '-')}-{seed}")
    folder.mkdir(parents=True)
    tree: dict = {"seed": seed, "steps": STEPS, "precision": precision, "rollout": {"max_tokens": 64},
                  "algorithm": {"name": algorithm}}  # fmt: skip
    for key, value in keys.items():
        section, _, last = key.rpartition("__")
        (tree.setdefault(section, {}) if section else tree)[last] = value
    Recipe.of(tree).dump(folder / "recipe.toml")
    rows = metrics(precision, seed) if rows is None else rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 algorithms x 2 precisions x 3 seeds, and GRPO in bf16/fp32. GRPO in BF16 collapses with two seeds; one run of
    PG in FP16 is unfinished, and a watch was kept over GRPO in BF16."""
    root = tmp_path_factory.mktemp("study")
    for algorithm in ("pg-is", "grpo", "gspo"):
        for precision in ("bf16", "fp16"):
            for seed in range(3):
                fallen = algorithm == "grpo" and precision == "bf16" and seed < 2
                steps = 30 if (algorithm, precision, seed) == ("pg-is", "fp16", 2) else STEPS
                rows = metrics(precision, seed, steps, 60 + 10 * seed if fallen else None)
                folder = make(root / precision, algorithm, precision, seed, rows)
                if algorithm == "grpo" and precision == "bf16":
                    kinds = [(55, "warn"), (58, "warn"), (66, "act")] if seed == 0 else []
                    told = [{"step": s, "level": k, "signal": "kl", "reason": "r", "remedy": "x"} for s, k in kinds]
                    (folder / "alarms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    make(root, "grpo", "bf16/fp32", 0)
    return root


@pytest.fixture(scope="module")
def page(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many([study], tmp_path_factory.mktemp("out") / "page.html")


def cell(cells: list[Cell], label: str) -> Cell:
    return next(c for c in cells if c.label == label)


# --- which runs, and which belong together ------------------------------------------------------------------------


def test_runs_are_found_at_any_depth_and_once(study: Path) -> None:
    assert len(find_runs([study])) == 19
    assert len(find_runs([study, study / "bf16", study / "bf16" / "grpo-bf16-0", study / "bf16" / ".."])) == 19


def test_a_folder_without_runs_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics\.jsonl here or in any folder below\. Name run folders"):
        read_cells([tmp_path])
    with pytest.raises(ValueError, match="there is no such folder"):
        read_cells([tmp_path / "absent"])


def test_a_copy_of_a_run_is_counted_once(tmp_path: Path) -> None:
    first = make(tmp_path, "grpo", "fp16", 0)
    shutil.copytree(first, tmp_path / "copy")
    (found,) = read_cells([tmp_path])
    assert len(found.members) == 1


def test_runs_that_differ_in_seed_name_and_harmless_keys_are_one_cell(tmp_path: Path) -> None:
    for seed in range(3):
        make(tmp_path, "grpo", "fp16", seed, name=f"run-{seed}", log_samples=seed, checkpoint__every=7 + seed)
    (found,) = read_cells([tmp_path])
    assert found.label == "grpo fp16"
    assert [m.seed for m in found.members] == ["0", "1", "2"]


def test_what_else_differs_sets_cells_apart_and_names_them(tmp_path: Path) -> None:
    for rate in (2e-5, 1e-4, 3e-6):
        for seed in range(2):
            make(tmp_path, "grpo", "fp16", seed, name=f"{rate}-{seed}", optim__lr=rate)
    make(tmp_path, "gspo", "fp16", 0)
    cells = read_cells([tmp_path])
    assert [c.label for c in cells] == ["grpo fp16 lr=3e-06", "grpo fp16 lr=2e-05", "grpo fp16 lr=0.0001", "gspo fp16"]
    assert [len(c.members) for c in cells] == [2, 2, 2, 1]


def test_keys_that_change_together_give_one_name(tmp_path: Path) -> None:
    for rate, warmup in ((2e-5, 5), (1e-4, 9)):
        make(
            tmp_path,
            "grpo",
            "fp16",
            0,
            metrics("fp16", warmup),
            name=f"w{warmup}",
            optim__lr=rate,
            optim__warmup=warmup,
        )
    cells = read_cells([tmp_path])
    assert [c.label for c in cells] == ["grpo fp16 lr=2e-05", "grpo fp16 lr=0.0001"]
    assert {key for key, _ in differences(cells)[0]} == {"optim.lr", "optim.warmup"}


def test_two_runs_of_one_seed_are_compared_by_what_else_they_differ_in(tmp_path: Path) -> None:
    for backend in ("single", "fsdp"):
        make(tmp_path, "grpo", "fp16", 0, metrics("fp16", len(backend)), name=backend, backend__name=backend)
    assert [c.label for c in read_cells([tmp_path])] == ["grpo fp16 name=fsdp", "grpo fp16 name=single"]


def test_compressed_metrics_are_read_and_plain_ones_come_first(tmp_path: Path) -> None:
    folder = make(tmp_path, "grpo", "fp16", 0)
    plain = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl.gz").write_bytes(gzip.compress(b'{"step": 1, "old": 1}\n'))
    assert "old" not in read_run(folder).names()
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl.gz").write_bytes(gzip.compress(plain))
    assert read_run(folder).rows == [json.loads(line) for line in plain.splitlines()]
    assert len(find_runs([tmp_path])) == 1
    (folder / "metrics.jsonl.gz").write_bytes(gzip.compress(plain)[:-20])
    with pytest.raises(ValueError, match=r"metrics\.jsonl\.gz: cannot be unpacked"):
        read_run(folder)


def shown(cells: list[Cell], head: str = "final accuracy") -> tuple[str, str]:
    """What the table says of the first cell."""
    (row, *_) = table([Summary.of(c) for c in cells])["rows"]
    return dict(row["values"])[head]


@pytest.mark.parametrize("finished", ["first", "again", "neither"])
def test_a_rerun_of_a_seed_counts_once_and_is_named(tmp_path: Path, finished: str) -> None:
    """On a CPU a rerun differs in its times alone. The one that finished counts, else the longer one."""
    long = [row | {"time/step": 9.0} for row in metrics("fp16", 0, 60 if finished == "neither" else STEPS)]
    runs = {"first": metrics("fp16", 0), "again": long}
    if finished != "first":
        runs["first"] = runs["first"][:40]
    if finished == "first":
        runs["again"] = runs["again"][:40]
    for name, rows in runs.items():
        make(tmp_path, "grpo", "fp16", 0, rows, name=name)
    make(tmp_path, "grpo", "fp16", 1)
    found = collect([tmp_path])
    (only,) = found.cells
    kept = "first" if finished == "first" else "again"
    left = "again" if finished == "first" else "first"
    assert [m.run.name for m in only.members] == [kept, "grpo-fp16-1"]
    (remark,) = found.remarks
    assert remark == f"{tmp_path / left} is a rerun of seed 0 of {tmp_path / kept} and not counted again"
    page = Page(write_many([tmp_path], tmp_path / "page.html", png=False).read_text())
    assert remark in page.text
    assert "1 run is left out" in page.text
    assert "1 algorithm" not in page.text
    assert "2 runs, grpo, fp16" in page.text


def test_a_single_rerun_gives_no_interval(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(tmp_path, "grpo", "fp16", 0, [r | {"time/step": float(ord(name))} for r in metrics("fp16", 0)], name=name)
    summary = Summary.of(read_cells([tmp_path])[0])
    assert summary.accuracy is not None
    assert summary.accuracy[1:] == (None, 1)


@pytest.mark.parametrize("file", ["metrics.jsonl", "alarms.jsonl", "summary.json"])
def test_a_damaged_run_is_left_out_by_name_and_the_others_are_shown(tmp_path: Path, file: str) -> None:
    make(tmp_path / "runs", "grpo", "fp16", 0)
    bad = make(tmp_path / "runs", "grpo", "fp16", 1)
    (bad / file).write_text("{broken\n" + json.dumps({"step": 1}) + "\n")
    done = tenbit("report", "runs", "--out", "page.html", "--no-png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = Page((tmp_path / "page.html").read_text()).text
    for where in (text, json.loads((tmp_path / "page.json").read_text())["remarks"][0]):
        assert "runs/grpo-fp16-1 is left out" in where
        assert file in where
    assert "1 of 1 run passed" in text
    shutil.rmtree(tmp_path / "runs" / "grpo-fp16-0")
    with pytest.raises(ValueError, match=re.escape(file)):
        write_many([tmp_path / "runs"], tmp_path / "page.html")
    with pytest.raises(ValueError, match=re.escape(file)):
        report([bad])


def test_the_damage_is_said_on_the_screen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "grpo", "fp16", 0)
    (make(tmp_path, "grpo", "fp16", 1) / "alarms.jsonl").write_text("{broken\n{}\n")
    write_many([tmp_path], tmp_path / "page.html", png=False)
    assert "grpo-fp16-1 is left out" in caplog.text


def test_a_number_beyond_every_double_is_a_gap(tmp_path: Path) -> None:
    folder = make(tmp_path, "grpo", "fp16", 0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 101, "train/accuracy": 1e999, "mismatch/kl_k3": -1e999, "time/step": 1' + "0" * 400 + "}\n"
        )
        file.write('{"step": 102, "train/accuracy": 0.98}\n')
    page = Page(write_many([tmp_path], tmp_path / "page.html").read_text())
    reward = page.charts[0]
    assert reward["x"][-2:] == [101, 102]
    assert "1 of 1 run passed" in page.text
    assert report([folder]).is_file()


# --- curves --------------------------------------------------------------------------------------------------------


def test_mean_and_band_are_numpys(study: Path) -> None:
    found = cell(read_cells([study]), "grpo bf16")
    raw = np.array([[row["mismatch/kl_k3"] for row in metrics("bf16", s, STEPS, c)[1:]] for s, c in ((0, 60), (1, 70))])
    raw = np.vstack([raw, [row["mismatch/kl_k3"] for row in metrics("bf16", 2)[1:]]])
    plain = over_seeds(found.runs, "mismatch/kl_k3")
    assert plain.steps == list(range(STEPS + 1))
    assert plain.mean[0] is None
    np.testing.assert_allclose(np.array(plain.mean[1:], float), raw.mean(0), rtol=1e-12)
    np.testing.assert_array_equal(np.array(plain.low[1:], float), raw.min(0))
    np.testing.assert_array_equal(np.array(plain.high[1:], float), raw.max(0))
    smooth = over_seeds(found.runs, "mismatch/kl_k3", reach=2)
    each = np.array([[row[max(0, i - 2) : i + 3].mean() for i in range(STEPS)] for row in raw])
    np.testing.assert_allclose(np.array(smooth.mean[1:], float), each.mean(0), rtol=1e-9)
    np.testing.assert_allclose(np.array(smooth.high[1:], float), each.max(0), rtol=1e-9)


def test_where_only_some_seeds_have_a_value_the_curve_is_of_those(study: Path) -> None:
    found = cell(read_cells([study]), "pg-is fp16")
    curve = over_seeds(found.runs, "train/accuracy")
    assert curve.count[1:] == [3] * 30 + [2] * 70
    ends = [metrics("fp16", seed)[80]["train/accuracy"] for seed in (0, 1)]
    assert curve.low[80] == min(ends)
    assert curve.mean[80] == pytest.approx(sum(ends) / 2)


def test_gaps_and_missing_metrics_stay_gaps(tmp_path: Path) -> None:
    rows = [{"step": s, "optim/grad_norm": None if s in (3, 4) else 1.0} for s in range(1, 8)]
    run = read_run(make(tmp_path, "grpo", "fp16", 0, rows))
    assert over_seeds([run], "optim/grad_norm", 1).mean == [1.0, 1.0, None, None, 1.0, 1.0, 1.0]
    assert set(over_seeds([run], "policy/entropy").mean) == {None}


def test_the_interval_is_students() -> None:
    values = [0.9, 0.95, 0.98]
    mean, half = interval(values)
    assert mean == pytest.approx(np.mean(values))
    assert half == pytest.approx(4.30265273 * np.std(values, ddof=1) / np.sqrt(3))  # t(0.975, 2) from a printed table
    assert interval([0.5]) == (0.5, None)


def test_peaks_are_neither_averaged_over_steps_nor_over_seeds(tmp_path: Path) -> None:
    """The figure is for the one step at which one program all but excludes what the other all but chose."""
    steps = 800
    for seed, peak in ((0, 333), (1, None)):
        rows = [{"step": s, "train/reward": 0.5, "mismatch/prob_diff_max": 0.1 + 0.01 * (s % 3) + seed / 100,
                 "mismatch/prob_diff_min": -0.2} for s in range(1, steps + 1)]  # fmt: skip
        if peak is not None:
            rows[peak - 1] |= {"mismatch/prob_diff_max": 0.998, "mismatch/prob_diff_min": -0.97}
        make(tmp_path, "grpo", "fp16", seed, rows, steps=steps)
    cells = read_cells([tmp_path])
    desk = Desk.of(cells)
    assert desk.reach == 8
    raw = np.array([read_run(tmp_path / f"grpo-fp16-{s}").values("mismatch/prob_diff_max") for s in (0, 1)], float)
    curve = over_seeds(cells[0].runs, "mismatch/prob_diff_max", 8, "largest")
    windows = [raw[:, max(0, i - 8) : i + 9].max() for i in range(steps)]
    np.testing.assert_array_equal(np.array(curve.mean, float), windows)
    high, low = (s.thinned() for s in desk.series(cells[0], ENDS, "", ("plain", False)))
    assert len(high.x) < 400
    assert max(v for v in high.y if v is not None) == 0.998
    assert min(v for v in low.y if v is not None) == -0.97
    assert high.band is low.band is None
    (plot,) = (p for s in sections(desk) for g in s.groups for p in g.plots if "pi-mu" in p.name)
    assert "Each point is the extreme of 2 seeds and 17 steps, not a mean." in plot.caption
    assert "Mean of" not in plot.caption
    text = Page(write_many([tmp_path], tmp_path / "page.html", png=False).read_text()).text
    assert "of π − μ it is the extreme of those steps and of all seeds" in text


# --- verdicts and tables -------------------------------------------------------------------------------------------


def test_the_verdict_counts_every_run_once(study: Path) -> None:
    summaries = [Summary.of(c) for c in read_cells([study])]
    assert verdict(summaries) == (
        "FP16: 8 of 9 runs passed, 1 unfinished; BF16: 7 of 9 runs passed, 2 collapsed; BF16/FP32: 1 of 1 run passed."
    )


def test_a_cells_numbers_are_numpys(study: Path) -> None:
    cells = read_cells([study])
    found = Summary.of(cell(cells, "grpo fp16"))
    runs = [metrics("fp16", seed)[1:] for seed in range(3)]
    finals = [np.mean([row["train/accuracy"] for row in rows[-16:]]) for rows in runs]  # a sixth of 100 steps
    assert found.accuracy is not None
    mean, half, n = found.accuracy
    assert (mean, n) == (pytest.approx(np.mean(finals), abs=1e-6), 3)
    assert half == pytest.approx(4.30265273 * np.std(finals, ddof=1) / np.sqrt(3), rel=1e-3)
    assert found.kl == pytest.approx(np.median([row["mismatch/kl_k3"] for rows in runs for row in rows]))
    ends = [abs(row[f"mismatch/prob_diff_{e}"]) for rows in runs for row in rows for e in ("min", "max")]
    assert found.extreme == max(ends)
    last = np.mean([rows[-1]["eval/held_out/avg@4"] for rows in runs])
    assert found.evaluations == {"eval/held_out/avg@4": (pytest.approx(last), 100)}
    # of PG in FP16 one seed is not done: its accuracy at step 30 is no final one
    partial = Summary.of(cell(cells, "pg-is fp16"))
    assert partial.accuracy is not None
    assert partial.accuracy[2] == 2
    assert partial.accuracy[0] > 0.95


def stopped(root: Path, seed: int, rows: list[dict]) -> Path:
    """A run as `watch.act = "stop"` leaves it."""
    folder = make(root, "grpo", "fp16", seed, rows)
    alarm = {"step": rows[-1]["step"], "level": "act", "signal": "kl", "reason": "KL is 40 times", "remedy": "r"}
    (folder / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    (folder / "summary.json").write_text(json.dumps({"steps": rows[-1]["step"], "stopped": alarm, "model_step": 1}))
    return folder


def test_a_run_that_an_alarm_stopped_is_said_and_has_no_final_accuracy(tmp_path: Path) -> None:
    halted = stopped(tmp_path, 0, metrics("fp16", 0, 30))
    for seed in (1, 2):
        make(tmp_path, "grpo", "fp16", seed)
    cells = read_cells([tmp_path])
    summary = Summary.of(cells[0])
    assert summary.counts == {"passed": 2, "stopped": 1}
    assert verdict([summary]) == "2 of 3 runs passed, 1 stopped by an alarm."
    assert summary.accuracy is not None
    assert summary.accuracy[2] == 2
    assert summary.accuracy[0] > 0.95  # at step 30 of its own it was 74%
    assert shown(cells)[1] == "2 of 3 seeds"
    text = Page(write_many([tmp_path], tmp_path / "page.html", png=False).read_text()).text
    assert "stopped by an alarm at 30 of 100 steps" in text
    assert "Runs that an alarm stopped have no final accuracy." in text
    alone = Page(report([halted]).read_text()).text
    assert "Stopped by an alarm at 30 of 100 steps: KL is 40 times." in alone
    for seed in (1, 2):
        shutil.rmtree(tmp_path / f"grpo-fp16-{seed}")
    assert shown(read_cells([tmp_path]))[1] == "when stopped"


def test_watched_runs_without_an_alarm_are_counted(tmp_path: Path) -> None:
    for seed in range(3):
        (make(tmp_path, "grpo", "fp16", seed) / "alarms.jsonl").write_text("")
    alone = make(tmp_path, "gspo", "fp16", 0)
    (found,) = alarms(read_cells([tmp_path]))
    assert (found["label"], found["seeds"], found["levels"]) == ("grpo fp16", 3, {})
    assert [one["said"] for one in found["first"]] == ["no warn or act"] * 3
    assert "The run was watched: no alarm." in Page(report([tmp_path / "grpo-fp16-0"]).read_text()).text
    assert "Early warning" not in Page(report([alone]).read_text()).text


def test_leads_are_those_of_tenbit_watch(tmp_path: Path) -> None:
    """A note warns nobody; an alarm of level act is one of level warn too; each level has its own lead."""
    for seed, told in ((0, [(20, "note"), (66, "act"), (80, "warn")]), (1, [(30, "note")])):
        folder = make(tmp_path, "grpo", "bf16", seed, metrics("bf16", seed, STEPS, 60))
        rows = [{"step": s, "level": k, "signal": "kl", "reason": "r", "remedy": "x"} for s, k in told]
        (folder / "alarms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = alarms(read_cells([tmp_path]))
    one, other = found["first"]
    at = one["collapsed_at"]
    assert one["steps"] == {"warn": 66, "act": 66}
    assert one["lead"] == {"warn": at - 66, "act": at - 66}
    assert one["said"] == (
        f"warn at 66, act at 66; collapsed at {at}: warn {at - 66} steps before, act {at - 66} steps before"
    )
    assert (other["steps"], other["lead"]) == ({}, {})
    assert other["said"] == f"no warn or act; collapsed at {other['collapsed_at']}"


def flat_run(accuracy: float, steps: int = STEPS) -> list[dict]:
    return [{"step": s, "train/reward": accuracy, "train/accuracy": accuracy} for s in range(1, steps + 1)]


def test_an_interval_ends_where_accuracies_do(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.99, 0.98, 0.2)):
        make(tmp_path, "grpo", "fp16", seed, flat_run(accuracy))
    assert shown(read_cells([tmp_path])) == ("72.3%", "0% to 100%")
    shutil.rmtree(tmp_path / "grpo-fp16-2")
    make(tmp_path, "grpo", "fp16", 2, flat_run(0.97))
    value, remark = shown(read_cells([tmp_path]))
    half = 4.30265273 * 0.01 / np.sqrt(3)
    assert remark == f"{0.98 - half:.0%} to 100%"
    shutil.rmtree(tmp_path / "grpo-fp16-0")
    make(tmp_path, "grpo", "fp16", 0, flat_run(0.96))
    value, remark = shown(read_cells([tmp_path]))
    assert (value, remark) == (f"97.0% ± {half:.1%}", "")


def test_seeds_of_different_lengths_are_remarked(tmp_path: Path) -> None:
    for seed, steps in ((0, 60), (1, 200)):
        make(tmp_path, "grpo", "fp16", seed, flat_run(0.5, steps), steps=steps)
    assert shown(read_cells([tmp_path]))[1] == "60 to 200 steps"


def test_a_finished_run_without_an_accuracy_says_so(tmp_path: Path) -> None:
    folder = make(tmp_path, "grpo", "fp16", 0, [{"step": s, "policy/entropy": 1.0} for s in range(1, STEPS + 1)])
    make(tmp_path, "grpo", "fp16", 1, [{"step": s, "policy/entropy": 1.0} for s in range(1, 51)])
    cells = read_cells([tmp_path])
    assert shown(cells) == ("–", "")
    text = Page(write_many([tmp_path], tmp_path / "page.html", png=False).read_text()).text
    assert "failed, no step has a training accuracy" in text
    assert "unfinished, at step 50 of 100" in text
    assert "Steps: 100, none with a training accuracy." in Page(report([folder]).read_text()).text


def test_differing_keys_are_told_and_equal_ones_folded(study: Path) -> None:
    differing, equal = differences(read_cells([study]))
    keys = dict(differing)
    assert set(keys) == {
        "algorithm.name", "precision.compute", "precision.rollout", "precision.sync", "precision.export",
        *(f"precision.loss_scale.{k}" for k in ("initial", "growth", "backoff", "interval")),
    }  # fmt: skip
    assert dict(keys["precision.compute"]) == {"bf16": "all bf16, all bf16/fp32", "fp16": "all fp16"}
    assert dict(keys["algorithm.name"])["gspo"] == "all gspo"
    assert ("steps", "100") in equal
    assert "seed" not in dict(equal) | keys


def test_most_of_many_are_all_others(tmp_path: Path) -> None:
    for i, rate in enumerate((1e-5, 2e-5, 3e-5, 4e-5)):
        keys = {"optim__lr": rate, "optim__warmup": int(i == 2)}
        make(tmp_path, "grpo", "fp16", 0, metrics("fp16", i, 5), name=f"r{i}", **keys)
    differing = dict(differences(read_cells([tmp_path]))[0])
    assert differing["optim.warmup"] == [("0", "all others"), ("1", "grpo fp16 lr=3e-05")]
    assert len(differing["optim.lr"]) == 4


def test_the_json_beside_the_page_has_the_table(page: Path) -> None:
    tree = json.loads(page.with_suffix(".json").read_text())
    assert tree["verdict"].startswith("FP16: 8 of 9")
    by_label = {c["label"]: c for c in tree["cells"]}
    assert by_label["grpo bf16"]["outcomes"] == {"passed": 1, "collapsed": 2}
    fallen = by_label["grpo bf16"]["runs"][0]
    assert (fallen["kind"], fallen["seed"]) == ("collapsed", 0)
    assert 60 < fallen["collapsed_at"] < 80
    assert by_label["grpo bf16/fp32"]["seconds_relative"] == 2.0
    (watched,) = tree["alarms"]
    assert (watched["label"], watched["levels"], watched["seeds"]) == ("grpo bf16", {"warn": 2, "act": 1}, 3)
    assert watched["first"][0]["steps"] == {"warn": 55, "act": 66}


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_papers_figures_are_there(study: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)(?: <small>(.*?)</small>)?</h2>", text)
    assert titles == [
        ("BF16 beside FP16", "Figures 1 and 6 of the paper"),
        ("Stability and mismatch", "Figure 3 of the paper"),
        ("All algorithms in FP16", "Figure 4 of the paper"),
        ("Pairs of formats", "Figure 5 of the paper"),
        ("Alarms", ""),
        ("What differs between the recipes", ""),
    ]
    names = {p.stem for p in (page.parent / "page-figures").iterdir()}
    for name in (
        "figure-1-reward-grpo", "figure-6-evaluation-held-out-avg@4-gspo", "figure-3-kl-bf16", "figure-3-kl-fp16",
        "figure-3-kl-grpo", "figure-3-pi-mu-fp16", "figure-3-gradient-norm-pg-is", "figure-3-entropy-bf16",
        "figure-4-reward", "figure-5-kl-grpo", "figure-5-seconds-grpo",
    ):  # fmt: skip
        assert name in names
    assert len(names) == len(Page(text).charts)  # a PNG for every plot


def test_the_curves_on_the_page_are_the_means(study: Path, page: Path) -> None:
    desk = Desk.of(read_cells([study]))
    assert desk.width == 3
    plots = [p for s in sections(desk) for g in s.groups for p in g.plots]
    charts = Page(page.read_text(encoding="utf-8")).charts
    chart = charts[[p.name for p in plots].index("figure-6-evaluation-held-out-avg@4-grpo")]
    mean = np.mean([metrics("fp16", seed)[100]["eval/held_out/avg@4"] for seed in range(3)])
    row = next(row for row in chart["rows"] if row["label"] == "fp16")
    assert (chart["x"], row["text"][-1]) == ([0, 50, 100], f"{mean:.1%}")


def test_one_vertical_axis_a_metric_so_that_plots_compare(study: Path) -> None:
    axes: dict[str, set] = {}
    for section in sections(Desk.of(read_cells([study]))):
        for plot in (p for g in section.groups for p in g.plots):
            metric = re.sub(r"^figure-\d-", "", plot.name).split("-")[0]
            axes.setdefault(metric, set()).add(plot.figure.panels[0].axis)
    assert len(axes) >= 6
    assert all(len(found) == 1 for found in axes.values())


def test_every_curve_has_a_colour_of_its_own_that_the_style_sheet_knows(tmp_path: Path) -> None:
    for i, algorithm in enumerate(
        ("pg-is", "pg-tis", "grpo", "grpo-token-tis", "grpo-seq-mis", "gspo", "dapo", "cispo", "rloo", "icepop")
    ):
        make(tmp_path, algorithm, "fp16", i, metrics("fp16", i, 20))
    for i, precision in enumerate(("bf16", "fp32", "bf16/fp16", "bf16/fp32", "fp16/fp16~4", "fp16/fp16~2")):
        make(tmp_path, "grpo", precision, 20 + i, metrics(precision, i, 20))
    style = Page(write_many([tmp_path], tmp_path / "page.html", png=False).read_text()).style
    most = 0
    for section in sections(Desk.of(read_cells([tmp_path]))):
        for plot in (p for g in section.groups for p in g.plots):
            looks = [(s.colour, s.style) for s in plot.figure.panels[0].series if not s.quiet]
            assert len(set(looks)) == len(looks), plot.name
            assert all(colour(name) and f".c-{name} " in style for name, _ in looks)
            most = max(most, len(looks))
    assert most == 10  # more than there are colours: then lines are broken


def test_a_collapse_is_crossed_out_where_it_happened(study: Path) -> None:
    cells = read_cells([study])
    plots = {p.name: p for s in sections(Desk.of(cells)) for g in s.groups for p in g.plots}
    fallen = [m.outcome.collapsed_at for m in cell(cells, "grpo bf16").members if m.outcome.kind == "collapsed"]
    assert len(fallen) == 2
    assert list(plots["figure-3-kl-grpo"].figure.panels[0].marks) == fallen
    assert "Crosses: a run collapsed." in plots["figure-3-kl-grpo"].caption
    assert "Mean of 3 seeds" in plots["figure-3-kl-grpo"].caption
    assert not plots["figure-3-kl-gspo"].figure.panels[0].marks


def test_two_learning_rates_are_compared_without_the_papers_sections(tmp_path: Path) -> None:
    for i, rate in enumerate((2e-5, 1e-4)):
        make(tmp_path, "grpo", "fp16", 0, metrics("fp16", i), name=f"lr-{rate}", optim__lr=rate)
    text = write_many([tmp_path], tmp_path / "page.html", png=False).read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Compared", "What differs between the recipes"]
    assert not (tmp_path / "page-figures").exists()
    labels = {row["label"] for chart in Page(text).charts for row in chart["rows"]}
    assert labels == {"lr=2e-05", "lr=0.0001"}
    assert len(Page(text).charts) == 7  # reward, evaluation, KL, pi - mu, gradient norm, entropy, length


def test_a_single_cell_and_a_run_that_has_only_begun(tmp_path: Path) -> None:
    make(tmp_path, "grpo", "fp16", 0)
    make(tmp_path, "grpo", "fp16", 1, rows=[])
    text = Page(write_many([tmp_path], tmp_path / "page.html", png=False).read_text()).text
    assert "1 of 2 runs passed, 1 unfinished." in text
    assert "Nothing but name and seed." in text
    bare = tmp_path / "bare" / "run"
    bare.mkdir(parents=True)
    (bare / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "run" in Page(write_many([bare.parent], tmp_path / "bare.html").read_text()).text


def test_runs_with_missing_metrics_leave_no_empty_sections(tmp_path: Path) -> None:
    for precision in ("bf16", "fp16"):
        rows = [{"step": s, "train/accuracy": 0.5} for s in range(1, 30)]
        make(tmp_path, "grpo", precision, 0, rows)
    page = Page(write_many([tmp_path], tmp_path / "page.html", png=False).read_text())
    assert len(page.charts) == 1
    assert "Stability" not in page.text


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    rows = [row | {f"eval/{ATTACK}/avg@4": 0.5} for row in metrics("fp16", 0, 5)]
    for seed in (0, 1):
        make(tmp_path / "<b>root", "grpo", "fp16", seed, rows[: 5 - seed], name=f"a<img src=x>{seed}",
             task__template=ATTACK + "{problem}")  # fmt: skip
    other = make(tmp_path / "<b>root", "grpo", "fp16", 2, rows, name="other", task__template="{problem}")
    (other / "alarms.jsonl").write_text(json.dumps({"step": 1, "level": ATTACK, "signal": ATTACK}) + "\n")
    out = write_many([tmp_path / "<b>root"], tmp_path / "page.html")
    page = Page(out.read_text(encoding="utf-8"))
    runnable = [attributes for attributes, _ in page.scripts if attributes.get("type") != "application/json"]
    assert runnable == [{}]
    assert not [tag for tag, _ in page.elements if tag in ("img", "b>root")]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("alert(1)") >= 4
    files = list((tmp_path / "page-figures").iterdir())
    assert len(files) == len(page.charts)
    assert all(re.fullmatch(r"[a-z0-9.@=-]+\.png", f.name) for f in files)


def test_nothing_is_loaded_from_anywhere(page: Path) -> None:
    found = Page(page.read_text(encoding="utf-8"))
    policy = next(a["content"] for tag, a in found.elements if tag == "meta" and "http-equiv" in a) or ""
    assert policy.startswith("default-src 'none'")
    for tag, attributes in found.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name) in (None, "data:,"), (tag, attributes)
    assert "url(" not in found.style


# --- PNGs ----------------------------------------------------------------------------------------------------------


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_every_png_is_twice_the_size_of_its_figure_and_not_blank(page: Path) -> None:
    for file in (page.parent / "page-figures").iterdir():
        picture = opened(file.read_bytes())
        assert picture.shape[1] == 760
        assert 300 < picture.shape[0] < 900
        assert (picture[0, 0] == 255).all()
        assert ((picture != 255).any(axis=2)).mean() > 0.01, file.name


def test_both_axes_of_a_png_are_named(study: Path) -> None:
    cells = read_cells([study])
    across = axis.steps(0, STEPS)
    named = {}
    for plot in (p for s in sections(Desk.of(cells)) for g in s.groups for p in g.plots):
        texts = [text.get_text() for text in canvas(plot.figure, across, plot.title, plot.caption).texts]
        assert texts.count("training step") == 1, plot.name
        named[plot.name] = texts
    for name, unit in (
        ("figure-1-reward-grpo", "share of responses that are right"),
        ("figure-6-evaluation-held-out-avg@4-grpo", "share of responses that are right"),
        ("figure-3-kl-bf16", "nats per token"),
        ("figure-3-entropy-bf16", "nats per token"),
        ("figure-3-pi-mu-bf16", "difference of two probabilities"),
        ("figure-3-gradient-norm-bf16", "norm of the gradient"),
        ("figure-5-seconds-grpo", "seconds"),
    ):
        assert unit in named[name], name


def test_a_curve_of_the_png_lies_where_the_svgs_lies() -> None:
    """The same figure drawn twice: the columns of blue pixels under the curve, against the SVG's own path."""
    x = list(range(0, 101))
    y = [50 + 40 * np.sin(step / 9) for step in x]
    figure = Figure("sine", [Panel([Series("a", x, y, "fp16")], axis.linear([0, 100]))])
    across = axis.steps(0, 100)
    (path,) = re.findall(r'<path d="([^"]*)" class="line', draw(figure, across, "f").svg)
    drawn = {float(a): float(b) for a, b in re.findall(r"([-\d.]+),([-\d.]+)", path)}
    picture = opened(png(figure, across))
    ink = np.array([int(colour("fp16")[i : i + 2], 16) for i in (1, 3, 5)])
    blue = np.abs(picture - ink).sum(axis=2) < 60
    head = 24  # one line of title
    black = (picture < 60).all(axis=2)
    assert black[: 2 * head].any()  # the title is above the plot, and nothing as dark is below it
    assert not black[2 * head :].any()
    for px, py in list(drawn.items())[5:-5:10]:
        rows = np.flatnonzero(blue[:, round(2 * px)])
        assert rows.size, px
        assert abs(rows.mean() / 2 - head - py) < 1.5, px


def test_bands_marks_gaps_and_piles_are_in_the_png() -> None:
    x = [1, 2, 3, 4]
    banded = Series("a", x, [1.0, 2.0, None, 1.0], "bf16", band=([0.5, 1, None, 0.5], [1.5, 3, None, 2]))
    plain = Figure("$x_1$ <b>", [Panel([banded], axis.linear([0, 4]))])
    crossed = Figure("$x_1$ <b>", [Panel([banded], axis.linear([0, 4]), marks=[2])])
    across = axis.steps(1, 4)
    assert (opened(png(plain, across)) != opened(png(crossed, across))).any()
    pile = [Series(str(i), x, [1.0, 2.0, 1.0, 1.0], f"phase{i}") for i in range(2)]
    stacked = Figure("pile", [Panel(pile, axis.linear([0, 4]), stacked=True), Panel([], axis.linear([]), "empty")])
    assert ((opened(png(stacked, across)) != 255).any(axis=2)).mean() > 0.15


# --- the command ---------------------------------------------------------------------------------------------------


def test_one_run_keeps_its_page_and_several_need_a_name(study: Path, tmp_path: Path) -> None:
    run = make(tmp_path, "grpo", "fp16", 0)
    assert report([run]) == run / "report.html"
    assert "Precision plan" not in (run / "report.html").read_text()
    assert "Learning" in (run / "report.html").read_text()
    with pytest.raises(ValueError, match=r"Name it: --out page\.html"):
        report([run, study])
    with pytest.raises(ValueError, match="the page is an HTML file"):
        report([run, study], tmp_path / "page.json")
    done = tenbit("report", str(run), str(study / "bf16"), "--out", "page.html", "--no-png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "page.html"
    assert {p.name for p in tmp_path.iterdir()} == {"grpo-fp16-0", "page.html", "page.json"}
    assert report([tmp_path], png=False) == tmp_path / "report.html"


def test_what_a_page_would_overwrite_or_cannot_be_is_refused(tmp_path: Path) -> None:
    run = make(tmp_path / "abl", "grpo", "fp16", 0)
    make(tmp_path / "abl", "grpo", "fp16", 1)
    precious = {tmp_path / "abl" / "ablation.json": '{"grid": 1}', run / "summary.json": '{"steps": 100}',
                tmp_path / "list.json": "[1]", tmp_path / "text.json": "no JSON"}  # fmt: skip
    for file, text in precious.items():
        file.write_text(text)
        refused(tenbit("report", "abl", "--out", str(file.with_suffix(".html")), "--no-png", cwd=tmp_path),
                str(file), "Name another page", f"{file.stem}-report.html")  # fmt: skip
        assert file.read_text() == text
    for _ in range(2):  # its own it may replace
        assert tenbit("report", "abl", "--out", "page.html", "--no-png", cwd=tmp_path).returncode == 0
    tree = json.loads((tmp_path / "page.json").read_text())
    (tmp_path / "page.json").write_text(json.dumps({k: v for k, v in tree.items() if k != "written_by"}))
    assert tenbit("report", "abl", "--out", "page.html", "--no-png", cwd=tmp_path).returncode == 0  # of a page before


@pytest.mark.parametrize("runs", ["abl", "abl/grpo-fp16-0"])
def test_where_no_page_can_be_is_refused_alike(tmp_path: Path, runs: str) -> None:
    for seed in (0, 1):
        make(tmp_path / "abl", "grpo", "fp16", seed)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for out, words in (
        ("folder", ["--out folder", "folder/report.html"]),
        ("page.png", ["--out page.png", "HTML", "--out page.html"]),
        ("/proc/nowhere/p.html", ["--out /proc/nowhere/p.html", "cannot be written", "Name another"]),
        ("file/p.html", ["--out file/p.html", "cannot be written"]),
    ):
        refused(tenbit("report", runs, "--out", out, "--no-png", cwd=tmp_path), *words)
    assert sorted(tmp_path.rglob("*")) == before


# --- in a browser --------------------------------------------------------------------------------------------------


def browse(url: Path, profile: Path, *options: str, width: int = 1200) -> tuple[str, str]:
    """The page's elements after loading, and what the browser's console said."""
    assert CHROMIUM
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--v=0",
        "--enable-logging=stderr", f"--window-size={width},900", "--virtual-time-budget=4000", *options, url.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


@needs_browser
def test_the_browser_reports_what_goes_wrong(tmp_path: Path) -> None:
    """The test below sees errors at all: of a script, and of the content-security policy."""
    (tmp_path / "bad.html").write_text("<body><script>undefined_function()</script>")
    assert "ReferenceError" in browse(tmp_path / "bad.html", tmp_path / "p", "--dump-dom")[1]
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">"
    (tmp_path / "csp.html").write_text(f"<head>{policy}</head><body><script>1</script>")
    assert "Content Security Policy" in browse(tmp_path / "csp.html", tmp_path / "p", "--dump-dom")[1]


@needs_browser
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_page_loads_in_a_browser_without_a_word_on_the_console(page: Path, tmp_path: Path, mode: str) -> None:
    options = ["--blink-settings=preferredColorScheme=0"] if mode == "dark" else []
    shot = tmp_path / "shot.png"
    _, console = browse(page, tmp_path / "p", f"--screenshot={shot}", *options)
    assert console == ""
    corner = opened(shot.read_bytes())[5, 5]
    assert (corner < 40).all() if mode == "dark" else (corner > 240).all()


@needs_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_its_window_and_follows_the_pointer(page: Path, tmp_path: Path, width: int) -> None:
    """A copy without the policy and with a script that measures, in a frame as wide as a phone."""
    measure = """
    onload = () => {
      document.querySelectorAll("details").forEach((d) => { d.open = true; });
      const svg = document.querySelector("figure svg"), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 9 }));
      const wide = document.documentElement.scrollWidth;
      parent.postMessage([innerWidth, wide, document.querySelector(".at").textContent].join("|"), "*");
    };"""
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    (tmp_path / "copy.html").write_text(copy.replace("</body>", f"<script>{measure}</script></body>"))
    (tmp_path / "frame.html").write_text(
        f'<body><iframe src="copy.html" style="width:{width}px;height:844px;border:0"></iframe><p id="out"></p>'
        '<script>onmessage = (e) => { document.querySelector("#out").textContent = e.data; };</script>'
    )
    dom, console = browse(tmp_path / "frame.html", tmp_path / "p", "--dump-dom", width=1400)
    assert console == ""
    found = re.search(r'id="out">([^<]+)<', dom)
    assert found, dom[-500:]
    inner, wide, at = found.group(1).split("|")
    assert int(inner) == width
    assert int(wide) <= width
    assert re.fullmatch(r"step \d\d", at)
    assert at != "step 100"
