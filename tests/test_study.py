"""The committed study: its figures follow from the committed metrics, and the documents hold those figures."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import study  # noqa: E402

FOUND = json.loads((study.RESULTS / "study.json").read_text())


def metrics(part: str, cell: str) -> list[dict]:
    text = gzip.decompress((study.STUDY / part / cell / "metrics.jsonl.gz").read_bytes())
    return [row for row in map(json.loads, text.splitlines()) if "train/accuracy" in row]


@pytest.fixture(scope="module")
def claims():
    return study.claims()


def test_the_committed_figures_are_those_of_the_committed_metrics(claims):
    assert {k: v for k, v in FOUND.items() if k != "machine"} == json.loads(json.dumps(claims))


def test_the_documents_hold_the_committed_figures(claims):
    for document in study.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert study.written(text, study.tables(claims)) == text, document
    assert all(line in study.DOCUMENTS[0].read_text() for line in study.cells_table(claims))


def test_the_grid_of_the_study_is_whole_and_of_equal_seeds():
    for algorithm in study.ALGORITHMS:
        for precision in ("fp16", "bf16"):
            for seed in study.SEEDS:
                assert len(metrics("builtin", f"{algorithm}-{precision}-seed{seed}")) == 120
    firsts = {
        seed: {metrics("builtin", f"{a}-fp16-seed{seed}")[0]["train/accuracy"] for a in study.ALGORITHMS}
        for seed in (0, 1, 2)
    }
    assert all(len(found) == 1 for found in firsts.values())  # before the first update every algorithm samples alike


def test_a_difference_by_hand(claims):
    """FP16 less BF16 of grpo, by Student's t of two degrees of freedom from a printed table."""
    last = {
        p: [fmean(r["train/accuracy"] for r in metrics("builtin", f"grpo-{p}-seed{s}")[-20:]) for s in (0, 1, 2)]
        for p in ("fp16", "bf16")
    }
    pairs = [a - b for a, b in zip(last["fp16"], last["bf16"], strict=True)]
    found = claims["by_algorithm"]["grpo"]["accuracy"]
    assert found["mean"] == pytest.approx(fmean(pairs))
    assert found["half_width_95"] == pytest.approx(4.302653 * stdev(pairs) / 3**0.5, rel=1e-6)


def test_seeds_that_settings_were_chosen_on_are_in_no_figure():
    pilots = list((study.STUDY / study.PILOTS).glob("*/recipe.toml"))
    assert pilots
    seeds = {line for file in pilots for line in file.read_text().splitlines() if line.startswith("seed = ")}
    assert seeds <= {"seed = 100", "seed = 101"}
    assert study.PILOTS not in {c["part"] for c in FOUND["cells"]} | set(FOUND["watch"])


def test_the_page_on_fp8_shows_its_result():
    """docs/fp8.md is written from benchmarks/results/fp8.json."""
    import fp8

    text = (ROOT / "docs" / "fp8.md").read_text()
    for lines in fp8.tables(json.loads((ROOT / "benchmarks" / "results" / "fp8.json").read_text())).values():
        assert "\n".join(lines) in text
