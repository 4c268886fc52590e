"""The built-in task, against Python's own arithmetic and against what its data files promise."""

from __future__ import annotations

import itertools
import json
import random
import re
import statistics

import pytest

from tenbit.tasks import arithmetic
from tenbit.tasks.arithmetic import Chain, first_wrong_line, generate, is_correct, solution
from tenbit.types import Problem


@pytest.fixture(scope="module")
def chains() -> list[Chain]:
    rng = random.Random(0)
    return [generate(rng) for _ in range(300)]


def test_values_are_pythons(chains):
    for chain in chains:
        assert re.fullmatch(r"[-+*()\d]+", chain.expression)
        assert chain.value == eval(chain.expression)
        assert all(0 <= value <= 99 for value in chain.values)


def test_every_line_of_a_solution_has_the_problems_value(chains):
    for chain in chains:
        *lines, box = solution(chain).split("\n")
        assert len(lines) == len(chain.rest)
        assert {eval(line) for line in lines} == {chain.value}
        assert box == f"\\boxed{{{chain.value}}}"


def test_parentheses_stand_only_where_precedence_needs_them(chains):
    for chain in chains:
        text = chain.expression
        for at in [i for i, c in enumerate(text) if c == "("]:
            depth, end = 1, at
            while depth:
                end += 1
                depth += {"(": 1, ")": -1}.get(text[end], 0)
            # A pair is needed exactly where a product follows a sum inside; values may agree by chance, trees not.
            assert text[end + 1] == "*"
            inside = re.sub(r"\([^()]*(\([^()]*\))*[^()]*\)", "1", text[at + 1 : end])
            assert "+" in inside or "-" in inside


def test_parse_inverts_expression(chains):
    assert [Chain.parse(c.expression) for c in chains] == chains


@pytest.mark.parametrize("text", ["", "(1+2)", "1+(2*3)", "((1+2))*3", "1/2", "a+1", "-1+2", "+1", "1+", "1++2"])
def test_parse_refuses_what_is_no_chain(text):
    with pytest.raises(ValueError, match="not an arithmetic problem"):
        Chain.parse(text)


def test_lengths_are_in_range_and_spread(chains):
    lengths = [len(solution(c)) + 1 for c in chains]
    assert all(60 <= length <= 300 for length in lengths)
    assert statistics.pstdev(lengths) > 30
    assert max(lengths) > 2 * statistics.mean(lengths) * 0.8


def test_the_seed_decides():
    def draw(seed: int) -> list[Chain]:
        rng = random.Random(seed)
        return [generate(rng) for _ in range(20)]

    assert draw(3) == draw(3) != draw(4)


def test_mistakes_happen_at_their_rate_and_are_carried_on(chains):
    rng, slipped, total = random.Random(1), 0, 0
    for chain in chains:
        *lines, box = solution(chain, rng, mistake=0.2).split("\n")
        values = [chain.value, *(eval(line) for line in lines)]
        slipped += sum(a != b for a, b in itertools.pairwise(values))
        total += len(lines)
        # From a slip on, every line is right about the one before it, so the box repeats the last line.
        assert box == f"\\boxed{{{lines[-1]}}}"
        for before, after in zip([chain.expression, *lines], lines, strict=False):
            here, there = Chain.parse(before), Chain.parse(after)
            assert there.rest == here.rest[1:]
            assert abs(there.first - here.values[0]) in (0, 1, 10)
    # A slip whose effect a later "*0" or "-" cannot undo; those that would leave the range are not made.
    assert 0.10 < slipped / total <= 0.22


def test_the_checker_finds_the_first_wrong_line():
    problem = "(1+2)*3-4"
    assert first_wrong_line(problem, "3*3-4\n9-4\n5\n\\boxed{5}") is None
    assert first_wrong_line(problem, "3*3-4\n8-4\n4\n\\boxed{4}") == 2
    assert first_wrong_line(problem, "3*3-4\n9-4\n5\n\\boxed{6}") == 4
    assert first_wrong_line(problem, "3*3-4\n9-4\n5") == 4
    assert first_wrong_line(problem, "") == 1
    assert first_wrong_line(problem, "3*3-4\n__import__('os')\n\\boxed{5}") == 2
    assert first_wrong_line(problem, "(" * 5000) == 1


def test_the_last_box_counts():
    problem = Problem("1+1", "2", "x:1")
    assert is_correct(problem, "\\boxed{3} no, \\boxed{2}")
    assert not is_correct(problem, "\\boxed{2} or \\boxed{3}")
    assert not is_correct(problem, "2")
    assert not is_correct(problem, "\\boxed{22}")


def test_shipped_sets_are_the_seeds_right_and_disjoint():
    sets = arithmetic.problem_sets()
    assert {name: len(chains) for name, chains in sets.items()} == {"arithmetic": 512, "arithmetic_test": 256}
    seen: set[str] = set()
    for name, chains in sets.items():
        problems = arithmetic.load(name)
        assert [p.prompt for p in problems] == [c.expression for c in chains]
        for problem in problems:
            assert eval(problem.prompt) == int(problem.answer)
            assert arithmetic.is_held_out(Chain.parse(problem.prompt))
        assert not seen & {p.prompt for p in problems}
        seen |= {p.prompt for p in problems}
    assert len(seen) == 768


def test_the_perfectible_set_is_a_part_within_20_and_80_percent():
    path = arithmetic.DATA / "arithmetic_perfectible.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = {p.prompt: p.answer for p in arithmetic.load("arithmetic")}
    assert len(rows) >= 256
    assert len({row["problem"] for row in rows}) == len(rows)
    for row in rows:
        assert answers[row["problem"]] == row["answer"]
        assert 0.2 <= row["initial_accuracy"] <= 0.8
