r"""The `math` grader on every shipped set: a reference answer in \boxed{} is right, a different one is wrong.

All rows are tried against themselves. Against a different answer (a later row's, and the same with its first digit
changed) all rows are tried that numerals or text settle, which is every row of the AIME, AMC, GSM8K and ASDiv
sets, and one in `EVERY` of those that need Math-Verify at some 15 ms each. `python -m tenbit.tasks.grading_report`
tries them all, and `docs/data.md` holds what it prints.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tenbit.tasks.datasets import shipped
from tenbit.tasks.grading import MathGrader
from tenbit.tasks.grading_report import Examined, altered, examine, table
from tenbit.tasks.worker_pool import Pool

EVERY = 8

# Pairs of rows whose answers differ in writing and not in meaning.
SAME_IN_TRUTH = {
    ("math500.jsonl:23", "5", "x=5"),
    ("math_perfectible_r1d15b.jsonl:156", "60", r"60^\circ"),
}

# What Math-Verify cannot read, so that only the reference's own spelling counts, and why.
TEXT_ONLY = {
    "minerva.jsonl:28": r"a derivative and solar units: \odot is no symbol to its parser",
    "minerva.jsonl:265": "E_{0}: its parser takes E for Euler's number, which has no subscript",
    "minerva.jsonl:267": "E_{1} and E_{2}, the same",
    "minerva.jsonl:271": "the same",
    "olympiad_bench.jsonl:35": r"\max in a subscript",
    "olympiad_bench.jsonl:74": "an answer with a sentence after it",
    "olympiad_bench.jsonl:97": "t(0,4], which is no LaTeX of anything",
}


@pytest.fixture(scope="module")
def examined() -> dict[str, Examined]:
    pool = Pool({"grader": "math"}, 2, 120.0)
    with MathGrader(workers=2, timeout=10.0) as grader:
        results = {name: examine(name, grader, pool, EVERY) for name in shipped()}
    pool.close()
    return results


def test_every_reference_answer_is_right_against_itself(examined):
    assert {name: result.self_wrong for name, result in examined.items()} == {name: () for name in shipped()}


def test_no_different_answer_is_right(examined):
    mistaken = {pair for result in examined.values() for pair in result.other_right + result.altered_right}
    assert mistaken <= SAME_IN_TRUTH


def test_the_answers_that_count_as_text_alone_are_the_known_ones(examined):
    assert {problem_id for result in examined.values() for problem_id, _ in result.text_only} == set(TEXT_ONLY)


def test_the_table_in_the_documentation_is_of_these_sets(examined):
    """Row by row; where the test takes a sample, the document may know of more."""
    document = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    for line in table(list(examined.values())).splitlines()[2:]:
        name, rows, self_wrong, *mistaken, text_only = (cell.strip() for cell in line.strip("|").split("|"))
        stated = next((d for d in document.splitlines() if d.startswith(f"| {name} | {rows} |")), None)
        assert stated, f"docs/data.md has no row for {name} with {rows} rows: python -m tenbit.tasks.grading_report"
        said = [cell.strip() for cell in stated.strip("|").split("|")][2:]
        assert (said[0], said[3]) == (self_wrong, text_only)
        assert all(int(a) <= int(b) for a, b in zip(mistaken, said[1:3], strict=True))


def test_the_command_prints_the_table():
    command = [sys.executable, "-m", "tenbit.tasks.grading_report", "amc23", "--workers", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| `amc23` | 40 | 0 | 0 | 0 | 0 |" in ran.stdout.splitlines()


def test_altered_changes_the_first_digit_only():
    assert altered(r"\frac{19}{2}") == r"\frac{29}{2}"
    assert altered("9.5") == "0.5"
    assert altered(r"\text{east}") is None
