"""`tenbit probe`: intervals against brute force, rows in and out, the command, and what the documents promise."""

from __future__ import annotations

import gzip
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, small_module
from markupsafe import escape
from test_cli import refused, tenbit

from tenbit.models import loading
from tenbit.precision import Precision
from tenbit.recipe import Recipe
from tenbit.report.probe import render
from tenbit.report.probe_figures import LIGHT, MOST_POINTS, logratios, scatter, thinned
from tenbit.report.probe_words import compact, harmless, verdict
from tenbit.report.words import scientific
from tenbit.scoring import Scored, measured, train_logps
from tenbit.studies import probe_measures as pm
from tenbit.studies.probe import Pair, Study
from tenbit.studies.probe_plan import make_plan, parse_precisions
from tenbit.studies.probe_rows import read_rows, write_rows

DOC = (Path(__file__).parents[1] / "docs" / "probe.md").read_text()
SETTINGS = {"model": "m", "data": "d", "engine": "torch", "source": None, "sampling": None, "device": "cpu"}


def responses(n: int = 30, noise: float = 0.05, seed: int = 0, longest: int = 40) -> list[Scored]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        t = 1 + (i * 7) % longest
        mu = -torch.rand(t, generator=g) * 4
        pi = (mu + noise * torch.randn(t, generator=g)).clamp(max=-1e-6)
        out.append(Scored((1, 2), tuple(range(3, 3 + t)), mu, pi))
    return out


def pair(name: str = "fp16", **kinds) -> Pair:
    return Pair.of(name, responses(**kinds), 3.0, 0, train="fp16", rollout="fp16")


# --- measures and intervals


def test_replicates_are_the_measures_of_the_resampled_sequences():
    scored = responses(noise=0.4)
    table = pm.Table.of(scored)
    chosen = pm.resamples(len(scored), 5)
    got = table.replicates(1.2, chosen)
    for r in (0, 1, 777):
        want = measured([scored[i] for i in chosen[r]]).metrics(1.2)
        assert {k: v[r] for k, v in got.items()} == pytest.approx({k: want[k] for k in got}, rel=1e-9, abs=1e-12)
    assert set(got) | set(pm.EXTREMES) == set(measured(scored).metrics())


def test_intervals_are_the_middle_of_the_replicates_by_brute_force():
    """With a generator of its own, so equal up to the noise of 4000 resamples."""
    scored = responses(60, noise=0.2)
    found = pm.Table.of(scored).measures(3.0, pm.resamples(60, 0))
    rng = np.random.default_rng(99)
    logs = [s.logratio.numpy() for s in scored]
    kl, std = [], []
    for _ in range(4000):
        own = [logs[i] for i in rng.integers(0, 60, 60)]
        l = np.concatenate(own)
        kl.append(np.mean(np.exp(l) - 1 - l))
        std.append(np.std([x.sum() for x in own], ddof=1))
    for key, drawn in (("kl_k3", kl), ("seq_logratio_std", std)):
        width = np.subtract(*np.quantile(drawn, [0.975, 0.025]))
        for end, q in ((found[key].low, 0.025), (found[key].high, 0.975)):
            assert end == pytest.approx(np.quantile(drawn, q), abs=0.08 * width), key
    assert found["kl_k3"].low < found["kl_k3"].value < found["kl_k3"].high
    for key in pm.EXTREMES:
        assert (found[key].low, found[key].high) == (None, None)


def test_the_interval_of_a_mean_is_the_normal_one():
    rng = np.random.default_rng(3)
    scored = [Scored((1,), (2,), torch.tensor([-5.0]), torch.tensor([-5.0 + float(x)])) for x in rng.normal(0, 1, 400)]
    m = pm.Table.of(scored).measures(3.0, pm.resamples(400, 0))["seq_logratio_mean"]
    s = np.array([float(x.logratio) for x in scored])
    half = 1.96 * s.std(ddof=1) / 20
    assert (m.low, m.high) == pytest.approx((s.mean() - half, s.mean() + half), abs=0.08 * half)


def test_sequences_are_resampled_not_tokens():
    """Ten tokens that move together count as one: the interval is that of the sequences."""
    rng = np.random.default_rng(4)
    scored = []
    for x in rng.normal(0, 0.1, 200):
        mu = torch.full((10,), -2.0)
        scored.append(Scored((1,), tuple(range(10)), mu, mu + float(x)))
    m = pm.Table.of(scored).measures(3.0, pm.resamples(200, 0))["kl_k1"]
    assert m.high - m.low == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(200), rel=0.2)


def test_2000_replicates_of_512_sequences_of_300_tokens_take_less_than_a_second():
    table = pm.Table.of([responses(1, longest=1)[0]] * 512)  # the number of tokens does not matter from here on
    table = pm.Table(np.random.rand(512, len(pm.SUMS)), np.full(512, 300.0), np.random.randn(512), table.scored)
    chosen = pm.resamples(512, 0)
    assert chosen.shape == (2000, 512)
    best = math.inf
    for _ in range(3):  # other processes may be busy
        start = time.perf_counter()
        table.replicates(3.0, chosen)
        best = min(best, time.perf_counter() - start)
    assert best < 1.0


def test_ratios_are_paired():
    one = pair(noise=0.05)
    same = pm.ratios(one.table, one.table, (c := pm.resamples(30, 0), c), 3.0, (one.measures, one.measures))
    assert all(m.value == m.low == m.high == pytest.approx(1.0) for m in same.values())
    double = [Scored(s.prompt_ids, s.response_ids, s.logp_rollout, s.logp_rollout + 2 * s.logratio.float()) for s in
              one.table.scored]  # fmt: skip
    two = Pair.of("bf16", double, 3.0, 0, train="bf16", rollout="bf16")
    study = Study(dict(SETTINGS), 3.0, 0, [one, two])
    ((a, b, found),) = study.ratios()
    assert (a.name, b.name) == ("bf16", "fp16")
    assert found["logp_abs_mean"].value == pytest.approx(2, rel=1e-3)
    assert found["logp_abs_mean"].high - found["logp_abs_mean"].low < 0.01
    assert found["kl_k3"].value == pytest.approx(4, rel=0.05)


def test_one_response_has_values_and_no_intervals():
    p = pair(n=1)
    assert p.measures["kl_k3"].low is None
    assert "too narrow" in verdict(Study(dict(SETTINGS), 3.0, 0, [p]))[-1]
    with pytest.raises(ValueError, match="not one token"):
        Pair.of(
            "x", [Scored((1,), (2,), torch.tensor([-math.inf]), torch.tensor([-1.0]))], 3.0, 0, train="", rollout=""
        )


def test_half_ess_tokens_is_where_a_random_walk_has_an_ess_of_a_half():
    g = torch.Generator().manual_seed(0)
    sigma, t = 0.05, 100
    mu = [torch.full((t,), -3.0) for _ in range(400)]
    scored = [Scored((1,), tuple(range(t)), m, m + sigma * torch.randn(t, generator=g)) for m in mu]
    half = pm.Table.of(scored).half_ess_tokens()
    assert half == pytest.approx(math.log(2) / sigma**2, rel=0.15)
    s = torch.randn(400_000, generator=g).double() * sigma * math.sqrt(half)
    assert float(s.exp().sum() ** 2 / (len(s) * (2 * s).exp().sum())) == pytest.approx(0.5, abs=0.06)


def test_the_worst_tokens_are_found_and_told_with_their_context(model_folder):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("the answer is 7 indeed", add_special_tokens=False)
    mu = torch.full((len(ids) - 4,), -1.0)
    pi = mu.clone()
    pi[10], pi[2] = -3.0, -1.5
    p = Pair.of("fp16", [*responses(3, noise=0.01), Scored(tuple(ids[:4]), tuple(ids[4:]), mu, pi)], 3.0, 0,
                train="fp16", rollout="fp16")  # fmt: skip
    first, second, *_ = p.worst(tokenizer)
    assert (first["token"], first["context"], first["position"]) == ("7", "the answer is ", 10)
    assert first["logratio"] == pytest.approx(-2)
    assert first["pi"] == pytest.approx(math.exp(-3))
    assert second["token"] == tokenizer.decode(ids[6])
    assert p.worst(None)[0]["token"] == str(ids[14])


# --- rows


ROW = {"prompt_ids": [1, 2], "response_ids": [3, 4], "logp_rollout": [-1, -2.5], "logp_train": [-1.1, -2.0]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logp_rollout": [-1]}, ("logp_rollout has 1 numbers", "2 tokens")),
        ({"logp_train": [-1, -2, -3]}, ("logp_train has 3",)),
        ({"logp_rollout": [0.3, 0.5]}, ("logp_rollout[0] = 0.3", "above 0", "not probabilities")),
        ({"logp_rollout": ["-1", "-2"]}, ("logp_rollout[0]", "'-1' (str)", "without quotes")),
        ({"logp_rollout": 3}, ("logp_rollout is 3 (int)", "list")),
        ({"logp_rollout": [True, -1]}, ("logp_rollout[0]", "True (bool)")),
        ({"response_ids": [3, 264]}, ("response_ids[1] = 264", "vocabulary of 264", "--model")),
        ({"response_ids": [3, -1]}, ("response_ids[1] = -1", "padding")),
        ({"response_ids": [3, "4"]}, ("response_ids[1]", "whole numbers")),
        ({"response_ids": [3, 4.0]}, ("response_ids[1]", "4.0 (float)")),
        ({"prompt_ids": []}, ("prompt_ids is empty",)),
        ({"prompt_ids": "ab"}, ("prompt_ids is 'ab'", "list of token ids")),
        ({"temperature": 0}, ("temperature is 0",)),
        ({"temperature": "1"}, ("temperature is '1'",)),
        ({"version": 1.5}, ("version is 1.5",)),
        ({"precision": 16}, ("precision is 16",)),
        ({"response_ids": None}, ("response_ids is null",)),
    ],
)
def test_a_wrong_row_is_refused_with_line_key_and_remedy(tmp_path, change, words):
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | change) + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{file}:2: ")) as caught:
        read_rows(file, vocabulary=264)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_key_and_things_that_are_no_rows(tmp_path):
    file = tmp_path / "r.jsonl"
    for text, word in [
        (json.dumps({k: v for k, v in ROW.items() if k != "logp_rollout"}), "has no 'logp_rollout'"),
        ("[1, 2]", "a list of 2, not an object"),
        ("{broken}\n" + json.dumps(ROW), ":1: not a JSON object"),
        ("", "no responses in it"),
        (json.dumps(ROW | {"response_ids": [], "logp_rollout": [], "logp_train": []}), "no responses in it"),
    ]:
        file.write_text(text + "\n")
        with pytest.raises(ValueError, match=re.escape(word)):
            read_rows(file)
    with pytest.raises(ValueError, match="no such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match=r"neither .jsonl nor"):
        read_rows(tmp_path / "x.csv")
    (tmp_path / "y.jsonl.gz").write_text(json.dumps(ROW))
    with pytest.raises(ValueError, match="really gzip"):
        read_rows(tmp_path / "y.jsonl.gz")


def test_a_torn_end_is_left_out_with_a_note(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW)[:40])
    found = read_rows(file)
    assert len(found.rows) == 1
    assert "torn" in found.notes[0]
    packed = tmp_path / "r.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(ROW | {"version": i}) + "\n" for i in range(2000)).encode())
    packed.write_bytes(whole[: len(whole) // 2])
    found = read_rows(packed)
    assert 0 < len(found.rows) < 2000
    assert "torn" in found.notes[0]


def test_values_that_are_not_numbers_are_kept_for_the_probe_to_count(tmp_path):
    file = tmp_path / "r.jsonl"
    text = json.dumps(ROW | {"logp_rollout": [math.nan, -math.inf]}) + "\n"
    file.write_text(text + json.dumps(ROW | {"logp_rollout": [None, -1], "logp_train": [5e-5, -(10**400)]}) + "\n")
    one, two = read_rows(file).rows
    assert one.scored().measurable.tolist() == [False, False]
    assert two.scored().measurable.tolist() == [False, False]  # null, and beyond float32
    assert float(two.logp_train[0]) == 0.0  # rounding above 0


def test_rows_come_back_unchanged(tmp_path):
    file = tmp_path / "p.jsonl.gz"
    scored = [replace(s, temperature=0.8 + i % 2, version=i % 3) for i, s in enumerate(responses(20))]
    write_rows(file, scored[:12], "bf16/fp16")
    write_rows(file, scored[12:], "bf16/fp16")
    back = read_rows(file).rows
    assert {r.precision for r in back} == {"bf16/fp16"}
    assert [(r.temperature, r.version) for r in back] == [(s.temperature, s.version) for s in scored]
    for a, b in zip(scored, back, strict=True):
        assert (a.prompt_ids, a.response_ids) == (b.prompt_ids, b.response_ids)
        assert torch.equal(a.logp_rollout, b.logp_rollout)
        assert torch.equal(a.logp_train, b.logp_train)
    assert len(read_rows(file, limit=3).rows) == 3


# --- the page and the figures


def test_the_page_escapes_what_a_model_wrote():
    tokenizer = byte_tokenizer()
    text = "</pre><script>x</script>\x1b\u202e&{{7}}"  # 40 bytes of context and the last one
    ids = tokenizer.encode(text, add_special_tokens=False)
    mu = torch.full((len(ids),), -1.0)
    pi = mu.clone()
    pi[-1] = -4.0
    p = Pair.of("bf16", [Scored((1,), tuple(ids), mu, pi)], 3.0, 0, train="bf16", rollout="bf16")
    study = Study(dict(SETTINGS, versions={}, model="<img src=x>"), 3.0, 0, [p], tokenizer=tokenizer)
    study.notes.append("<b>note</b>")
    page = render(study, "a<b")
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "<b>note" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "default-src 'none'" in page
    assert page.count("data:image/png;base64,") == 4  # two figures, two themes
    assert "http" not in page.replace("http-equiv", "")
    assert harmless("a\n\x9b", keep="\n") == "a\n\\x9b"


def test_figures_keep_the_extremes_and_are_pictures():
    mu = torch.full((2 * MOST_POINTS,), -1.0)
    pi = mu.clone()
    pi[12345] = -0.2
    p = Pair.of("fp16", [Scored((1,), tuple(range(len(mu))), mu, pi)], 3.0, 0, train="fp16", rollout="fp16")
    x, y, some_left_out = thinned(p)
    assert some_left_out
    assert len(x) <= MOST_POINTS
    assert (y - x).max() == pytest.approx(math.exp(-0.2) - math.exp(-1), rel=1e-6)
    small, large = pair(noise=1e-5), pair("bf16", noise=0.1)
    assert not thinned(small)[2]
    assert len(logratios([small, large]).heights) == 2
    assert len(logratios([small]).heights) == 1
    for panels in (scatter([small, large]), logratios([small, large])):
        assert panels.together([small, large], LIGHT).startswith(b"\x89PNG")
    nothing = Pair.of("fp32", [Scored((1,), (2, 3), mu[:2], mu[:2])], 3.0, 0, train="fp32", rollout="fp32")
    assert logratios([nothing]).single(nothing, LIGHT).startswith(b"\x89PNG")  # no gap at all
    assert scatter([nothing]).single(nothing, LIGHT).startswith(b"\x89PNG")


def test_intervals_on_little_room():
    assert "".join(compact(pm.Measure(5.7e-6, 3.9e-6, 7.7e-6), scientific)) == "5.7 (3.9 to 7.7)·10⁻⁶"
    assert "".join(compact(pm.Measure(-1e-4, -2.35e-3, 1e-3), scientific)) == "−1.0 (−24 to 10)·10⁻⁴"
    assert "".join(compact(pm.Measure(1e-7, -2e-3, 1e-3), scientific)) == "0.0 (−20 to 10)·10⁻⁴"
    assert "".join(compact(pm.Measure(0.5, None, None), scientific)) == "5.0·10⁻¹"


def test_the_verdict_tells_rounding_from_other_causes():
    small, large = pair(noise=1e-4), pair("bf16", noise=8e-4)
    said = " ".join(verdict(Study(dict(SETTINGS), 3.0, 0, [small, large])))
    assert "predicts about 64 and 8" in said
    assert "More than rounding" not in said
    assert "fp16: sequence-level importance weights are usable" in said
    wild = pair(noise=0.8)
    said = " ".join(verdict(Study(dict(SETTINGS), 3.0, 0, [wild])))
    assert "More than rounding" in said
    assert "useless" in said or "noise" in said


# --- the command


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "problems.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(9)))
    return file


@pytest.fixture(scope="module")
def probed(model_folder, problems, tmp_path_factory):
    """A probe of a small model with four pairs of formats."""
    where = tmp_path_factory.mktemp("probe")
    done = tenbit(
        "probe", str(model_folder()), "--data", str(problems), "--precision", "fp16,bf16,fp32,bf16/fp16", "--samples",
        "3", "--prompts", "5", "--max-tokens", "20", "--temperature", "0.9", "--out", "out", cwd=where,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return where, done.stdout


def load(folder: Path) -> dict:
    def no_constants(text: str):
        raise AssertionError(f"{text} is not JSON")

    return json.loads((folder / "probe.json").read_text(), parse_constant=no_constants)


def test_a_probe_leaves_what_it_promises(probed):
    where, said = probed
    found = load(where / "out")
    assert [p["precision"] for p in found["precisions"]] == ["fp16", "bf16", "fp32", "bf16/fp16"]
    kl = {p["precision"]: p["measures"]["kl_k3"]["value"] for p in found["precisions"]}
    assert kl["fp32"] < kl["fp16"] < kl["bf16"]
    assert kl["fp16"] * 4 < kl["bf16/fp16"]
    for p in found["precisions"]:
        assert (p["sequences"], p["left_out_tokens"]) == (15, 0)
        assert sum(b["n"] for b in p["by_length"].values()) == 15
        assert len(p["worst"]) == 20
        sizes = [abs(w["logratio"]) for w in p["worst"]]
        assert sizes == sorted(sizes, reverse=True)
        assert p["measures"]["kl_k3"]["low"] <= p["measures"]["kl_k3"]["value"] <= p["measures"]["kl_k3"]["high"]
    assert [(r["of"], r["to"]) for r in found["ratios"]] == [("bf16", "fp16"), ("bf16/fp16", "fp16"), ("fp16", "fp32")]
    assert found["sampling"] == {"sequences": 15, "prompts": 5, "samples": 3, "max_tokens": 20, "temperature": 0.9,
                                 "seed": 0}  # fmt: skip
    assert Recipe.of(found["recipe"]).rollout.temperature == 0.9
    files = {p.name for p in (where / "out" / "figures").iterdir()}
    assert files == {f"{kind}-{theme}.png" for kind in ("scatter", "logratio") for theme in ("light", "dark")}
    assert "effective sample size" in said
    assert "probe.json" in said


def test_equal_rollout_formats_share_their_samples(probed):
    rows = read_rows(probed[0] / "out" / "probe.jsonl.gz").rows
    by = {name: [r for r in rows if r.precision == name] for name in ("fp16", "bf16/fp16")}
    for a, b in zip(by["fp16"], by["bf16/fp16"], strict=True):
        assert a.response_ids == b.response_ids
        assert torch.equal(a.logp_rollout, b.logp_rollout)
        assert not torch.equal(a.logp_train, b.logp_train)


def test_what_was_kept_gives_the_same_numbers_again(probed, model_folder):
    where, _ = probed
    done = tenbit("probe", "--from", "out/probe.jsonl.gz", "--out", "again", cwd=where)
    assert done.returncode == 0, done.stderr
    first, second = load(where / "out"), load(where / "again")
    theirs = {p["precision"]: p for p in second["precisions"]}
    for p in first["precisions"]:
        q = theirs[p["precision"]]
        assert (p["measures"], p["by_length"]) == (q["measures"], q["by_length"])
        assert [w["token_id"] for w in p["worst"]] == [w["token_id"] for w in q["worst"]]
    assert second["engine"] == "recorded"


def test_rows_are_scored_by_the_model_where_the_trainer_is_missing(probed, model_folder):
    where, _ = probed
    rows = [r for r in read_rows(where / "out" / "probe.jsonl.gz").rows if r.precision == "fp16"]
    with (where / "mine.jsonl").open("w") as file:
        for i, r in enumerate(rows):
            row = {"prompt_ids": r.prompt_ids, "response_ids": r.response_ids, "logp_rollout": r.logp_rollout.tolist()}
            file.write(json.dumps(row | ({"temperature": 0.9} if i % 2 else {})) + "\n")
    refused(tenbit("probe", "--from", "mine.jsonl", "--out", "x", cwd=where), "15 of 15 rows", "logp_train", "--model")
    done = tenbit(
        "probe", "--from", "mine.jsonl", "--model", str(model_folder()), "--precision", "fp16,fp16/bf16,fp32",
        "--temperature", "0.9", "--out", "mine", cwd=where,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load(where / "mine")
    assert [p["precision"] for p in found["precisions"]] == ["fp16/recorded", "fp32/recorded"]
    want = {p["precision"]: p for p in load(where / "out")["precisions"]}["fp16"]["measures"]
    got = found["precisions"][0]["measures"]
    assert got["kl_k3"]["value"] == pytest.approx(want["kl_k3"]["value"], rel=1e-6)
    # in FP32 it is the distance of the FP16 sampler from the exact numbers
    recipe = Recipe.of({"steps": 1, "rollout": {"max_tokens": 20, "temperature": 0.9}})
    model = loading.load(recipe.model.model_copy(update={"path": str(model_folder())}))
    exact = train_logps(model, Precision.parse("fp32"), recipe, [(r.prompt_ids, r.response_ids) for r in rows])
    l = torch.cat([e.double() - r.logp_rollout.double() for e, r in zip(exact, rows, strict=True)])
    assert found["precisions"][1]["measures"]["kl_k3"]["value"] == pytest.approx(
        float((l.expm1() - l).mean()), rel=1e-6
    )


def test_recorded_rows_with_holes_and_versions_are_noted(tmp_path):
    rows = [ROW | {"version": i // 4, "temperature": 1.0} for i in range(12)]
    rows[3] = rows[3] | {"logp_rollout": [-1.0, None]}
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"prompt_ids": [1')
    done = tenbit("probe", "--from", "r.jsonl", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = load(tmp_path / "out")
    (p,) = found["precisions"]
    assert (p["precision"], p["left_out_tokens"], p["tokens"]) == ("recorded", 1, 23)
    notes = " ".join(found["notes"])
    assert "torn" in notes
    assert "3 versions" in notes
    assert "1 tokens have a log-probability that is NaN" in notes
    assert set(p["by_version"]) == {"0", "1", "2"}
    for note in found["notes"]:
        assert str(escape(note)) in (tmp_path / "out" / "report.html").read_text()


def test_a_format_that_overflows_is_left_out_and_said(problems, tmp_path):
    module = small_module("llama")
    with torch.no_grad():
        module.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(1e7)
    module.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    command = ["probe", "./m", "--data", str(problems), "--samples", "1", "--prompts", "3", "--max-tokens", "6"]
    done = tenbit(*command, "--precision", "fp16,bf16,fp16/bf16", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = load(tmp_path / "out")
    assert [p["precision"] for p in found["precisions"]] == ["bf16"]
    assert set(found["left_out"]) == {"fp16", "fp16/bf16"}
    assert "fp16" in found["left_out"]["fp16"]
    refused(tenbit(*command, "--precision", "fp16", "--out", "none", cwd=tmp_path), "no precision could be measured")


def test_bad_input_is_refused_before_anything_is_written(model_folder, problems, tmp_path):
    model, data = str(model_folder()), ["--data", str(problems)]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in [
        ([model], ("--data", "math500")),
        ([], ("MODEL", "--from")),
        (["./nowhere", *data], ("MODEL", "nowhere")),
        ([model, *data, "--precision", "fp8"], ("--precision fp8", "'fp8'")),
        ([model, *data, "--precision", ","], ("--precision", "at least one")),
        ([model, *data, "--samples", "0"], ("--samples", "1")),
        ([model, *data, "--engine", "sglang"], ("--engine", "vllm")),
        ([model, *data, "--max-tokens", "100000"], ("--max-tokens", "context of 512")),
        ([model, *data, "--out", "full"], ("--out full", "not empty")),
        ([model, *data, "rollout.top_p=0.9"], ("top_p",)),
        ([model, *data, "rolout.x=1"], ("did you mean 'rollout'",)),
        ([model, *data, "--template", "nonsense"], ("nonsense",)),
        (["--from", "nowhere.jsonl"], ("--from nowhere.jsonl", "no such file")),
        (["--from", "rows.jsonl", *data], ("--data", "--from")),
        (["--from", "rows.jsonl", "--precision", "fp16"], ("--precision", "--model")),
        (["--from", "rows.jsonl", "--limit", "0"], ("--limit 0",)),
        (["--from", "rows.jsonl", "--attribute"], ("--attribute", "--model")),
    ]:
        refused(tenbit("probe", *arguments, cwd=tmp_path), *words)
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_a_run_folder_brings_its_settings(model_folder, problems, tmp_path):
    run = tmp_path / "run"
    recipe = Recipe.of({
        "steps": 3, "seed": 7, "model": {"path": "elsewhere"},
        "task": {"data": str(problems), "template": "Q {problem}"},
        "rollout": {"max_tokens": 9, "temperature": 0.8, "prompts": 64},
    })  # fmt: skip
    run.mkdir()
    recipe.dump(run / "recipe.toml")
    with pytest.raises(ValueError, match="no model/ yet"):
        make_plan(str(run))
    (run / "model").symlink_to(model_folder())
    plan = make_plan(str(run), samples=2)
    assert plan.recipe.model.path == str(run / "model")
    assert (plan.recipe.task.template, plan.recipe.task.data) == ("Q {problem}", str(problems))
    assert (plan.recipe.rollout.max_tokens, plan.recipe.rollout.temperature, plan.recipe.seed) == (9, 0.8, 7)
    assert (plan.recipe.rollout.samples, plan.recipe.rollout.prompts) == (2, 32)
    assert make_plan(str(run), temperature=1.0, max_tokens=5).recipe.rollout.temperature == 1.0


def test_precisions_are_pairs_each_once():
    assert [p.name for p in parse_precisions("fp16, bf16/bf16,bf16,bf16/fp16")] == ["fp16", "bf16", "bf16/fp16"]


# --- docs/probe.md


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)


def test_the_schema_in_the_document_is_the_one_that_is_written(probed):
    (text,) = re.findall(r"```json\n(.*?)```", DOC, re.DOTALL)
    shown, found = json.loads(text), load(probed[0] / "out")
    assert shown.keys() == found.keys()
    (a, *_), b = shown["precisions"], found["precisions"][0]
    assert a.keys() == b.keys()
    assert a["worst"][0].keys() == b["worst"][0].keys()
    assert next(iter(a["by_length"].values())).keys() == next(iter(b["by_length"].values())).keys()
    for key in b["measures"]:
        short = key.replace("seq_logratio", "")
        assert f"`{key}`" in DOC or f"`{short}`" in DOC, key
    assert shown["sampling"].keys() == found["sampling"].keys()


def test_the_example_for_verl_writes_rows_that_are_read(tmp_path):
    space: dict = {}
    exec(snippets()[1], space)
    b = {
        "prompts": torch.tensor([[0, 0, 5, 6], [0, 7, 8, 9]]),
        "responses": torch.tensor([[11, 12, 0], [13, 14, 15]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1]]),
        "response_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "rollout_log_probs": -torch.rand(2, 3),
        "old_log_probs": -torch.rand(2, 3).bfloat16(),
    }
    space["dump"](SimpleNamespace(batch=b), tmp_path / "r.jsonl", 1.0, 3)
    one, two = read_rows(tmp_path / "r.jsonl").rows
    assert (one.prompt_ids, one.response_ids, one.version) == ((5, 6), (11, 12), 3)
    assert (two.prompt_ids, two.response_ids) == ((7, 8, 9), (13, 14, 15))
    assert torch.equal(two.logp_rollout, b["rollout_log_probs"][1])


@pytest.mark.slow
def test_the_example_for_trl_writes_rows_that_are_read(model_folder, tmp_path, monkeypatch):
    """A real GRPOTrainer, two steps; transformers samples and fills the fields that vLLM would."""
    trl = pytest.importorskip("trl")
    import datasets

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.chdir(tmp_path)
    module, tokenizer = small_module(), byte_tokenizer()
    tokenizer.padding_side = "left"

    def sampled(prompts, trainer):
        ids = [tokenizer(p)["input_ids"] for p in prompts]
        out, logps = [], []
        for prompt in ids:
            with torch.no_grad():
                drawn = module.generate(
                    torch.tensor([prompt]), max_new_tokens=12, do_sample=True, output_logits=True,
                    return_dict_in_generate=True, top_k=0, eos_token_id=256, pad_token_id=257,
                )  # fmt: skip
            response = drawn.sequences[0, len(prompt) :]
            logp = torch.stack(drawn.logits, 1)[0].float().log_softmax(-1).gather(1, response[:, None])[:, 0]
            out.append(response.tolist())
            logps.append(logp.tolist())
        return {"prompt_ids": ids, "completion_ids": out, "logprobs": logps}

    space: dict = {}
    exec(snippets()[0], space)
    config = trl.GRPOConfig(
        output_dir="trl", max_steps=2, per_device_train_batch_size=4, num_generations=4, steps_per_generation=2,
        gradient_accumulation_steps=1, max_completion_length=12, report_to=[], use_cpu=True, save_strategy="no",
        logging_strategy="no", bf16=False, gradient_checkpointing=False, disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    trainer = space["DumpingTrainer"](
        module,
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(8)]),
        processing_class=tokenizer,
        rollout_func=sampled,
    )
    trainer.train()
    rows = read_rows(tmp_path / "rollouts.jsonl").rows
    assert len(rows) == 8
    assert all(r.logp_train is not None and r.temperature == 1.0 for r in rows)
    done = tenbit("probe", "--from", "rollouts.jsonl", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # the same FP32 weights on both sides: only rounding is left
    assert load(tmp_path / "out")["precisions"][0]["measures"]["logp_abs_max"]["value"] < 1e-4


@pytest.mark.slow
def test_the_causes_are_split_and_shown(problems, model_folder, tmp_path):
    done = tenbit(
        "probe", str(model_folder()), "--data", str(problems), "--precision", "bf16", "--samples", "2", "--prompts",
        "4", "--max-tokens", "24", "--attribute", "--out", "out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load(tmp_path / "out")["attribution"]["bf16"]
    names = {row["name"] for row in found["rows"]}
    assert len(names) >= 5
    page = (tmp_path / "out" / "report.html").read_text()
    for name in names:
        assert name in page
        assert name in done.stdout


def test_commands_in_the_document_are_understood():
    from typer.testing import CliRunner

    from tenbit.cli import app

    text = re.sub(r"\x1b\[[0-9;]*m", "", CliRunner().invoke(app, ["probe", "--help"]).output)
    (block, *_) = re.findall(r"```\n(.*?)```", DOC, re.DOTALL)
    lines = block.strip().splitlines()
    assert len(lines) == 3
    for option in set(re.findall(r"--[a-z-]+", block)) | {"--attribute", "--limit", "--prompts", "--max-tokens"}:
        assert option in text
