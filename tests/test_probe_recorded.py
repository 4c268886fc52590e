"""`tenbit probe --from`: rows as other frameworks record them, with mixed temperatures, versions, holes and labels."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from test_cli import refused, tenbit
from test_probe import ROW, SETTINGS, load, responses

from tenbit.models import loading
from tenbit.precision import Precision
from tenbit.recipe import Recipe
from tenbit.report.probe import _causes
from tenbit.report.probe_words import verdict
from tenbit.scoring import Scored, sample_and_score
from tenbit.studies import probe_measures as pm
from tenbit.studies.probe import Pair, Study, with_one_temperature
from tenbit.studies.probe_rows import read_rows
from tenbit.types import Prompt


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def pair(scored):
    return Pair.of("recorded", scored, 3.0, 0, train="recorded", rollout="recorded")


@pytest.fixture(scope="module")
def genuine(model_folder):
    """24 responses in BF16 at temperature 0.6, as rows."""
    tree = {"steps": 1, "model": {"path": str(model_folder())}, "rollout": {"max_tokens": 24, "temperature": 0.6}}
    recipe = Recipe.of(tree)
    prompts = [Prompt(tuple(range(40 + i, 46 + i)), i) for i in range(24)]
    scored = sample_and_score(recipe, loading.load(recipe.model), Precision.parse("bf16"), prompts)
    return [
        {
            "prompt_ids": s.prompt_ids,
            "response_ids": s.response_ids,
            "logp_rollout": s.logp_rollout.tolist(),
            "logp_train": s.logp_train.tolist(),
            "temperature": 0.6,
            "version": i % 2,
        }
        for i, s in enumerate(scored)
    ]


def test_causes_are_sought_at_the_temperature_of_the_rows_and_once(genuine, model_folder, tmp_path):
    others = [r | {"temperature": 1.1} for r in genuine[:3]]
    write(tmp_path / "r.jsonl", [*genuine, *others])
    done = tenbit("probe", "--from", "r.jsonl", "--model", str(model_folder()), "--precision", "bf16", "--attribute",
                  "--out", "out", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load(tmp_path / "out")
    assert "24 of 27 responses that were sampled at temperature 0.6" in " ".join(found["notes"])
    for causes in found["attribution"].values():
        for row in causes["rows"]:
            if row["name"] == "sampling transform":
                assert (row["share"] or 0) < 0.2, row
    rows = read_rows(tmp_path / "out" / "probe.jsonl.gz").rows
    rescored = [r for r in rows if r.precision == "bf16/recorded"]
    assert [(r.temperature, r.version) for r in rescored] == [
        (r["temperature"], r["version"]) for r in [*genuine, *others]
    ]
    assert not (tmp_path / "out" / ".lock").exists()
    write(tmp_path / "same.jsonl", genuine)
    done = tenbit("probe", "--from", "same.jsonl", "--model", str(model_folder()), "--precision", "bf16",
                  "--attribute", "--out", "same", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(load(tmp_path / "same")["attribution"]) == {"bf16/recorded"}


def test_the_temperature_of_most():
    scored = [Scored((1,), (2,), torch.zeros(1), torch.zeros(1), t) for t in (0.6, None, 0.6, None, None)]
    assert with_one_temperature(scored, 1.0) == (1.0, [scored[1], scored[3], scored[4]])
    assert with_one_temperature(scored, 0.6)[1] == scored


def test_a_pair_without_a_number_does_not_take_the_others_with_it(tmp_path):
    rows = [ROW | {"precision": "fp16"}, ROW | {"precision": "bf16", "logp_train": [None, None]}]
    write(tmp_path / "r.jsonl", rows)
    done = tenbit("probe", "--from", "r.jsonl", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = load(tmp_path / "out")
    assert [p["precision"] for p in found["precisions"]] == ["fp16"]
    assert "not one token" in found["left_out"]["bf16"]
    write(tmp_path / "none.jsonl", rows[1:])
    refused(tenbit("probe", "--from", "none.jsonl", "--out", "none", cwd=tmp_path), "not one token", "rows")


def test_rows_beyond_the_context_are_refused_before_anything_is_written(model_folder, tmp_path):
    long = ROW | {"response_ids": [3] * 600, "logp_rollout": [-1.0] * 600, "logp_train": [-1.0] * 600}
    write(tmp_path / "r.jsonl", [ROW, long])
    done = tenbit("probe", "--from", "r.jsonl", "--model", str(model_folder()), "--attribute", "--out", "out",
                  cwd=tmp_path)  # fmt: skip
    refused(done, "r.jsonl:2", "602 tokens", "context of 512")
    assert not (tmp_path / "out").exists()


def test_infinities_of_both_signs_are_counted(tmp_path):
    write(tmp_path / "r.jsonl", [ROW | {"logp_train": [math.inf, -1.0]}])
    (row,) = read_rows(tmp_path / "r.jsonl").rows
    assert row.scored().measurable.tolist() == [False, True]
    write(tmp_path / "r.jsonl", [ROW | {"logp_train": [10**400, -1.0]}])
    with pytest.raises(ValueError, match="above 0"):
        read_rows(tmp_path / "r.jsonl")


def test_length_is_that_of_the_response():
    mu = torch.full((40,), -1.0)
    pi = mu.clone()
    pi[5:] = math.nan
    (bucket,) = pm.Table.of([Scored((1,), tuple(range(40)), mu, pi)]).by_length((1, 32, 64), 0)
    assert bucket == "32-63"


def test_versions_are_told_apart_within_a_pair():
    scored = [Scored(s.prompt_ids, s.response_ids, s.logp_rollout, s.logp_train, None, i % 2)
              for i, s in enumerate(responses(40))]  # fmt: skip
    found = pair(scored).by_version
    want = pm.Table.of(scored[1::2]).measures(3.0, pm.resamples(20, 0))["kl_k3"]
    assert found["1"] == {"sequences": 20, "tokens": sum(s.length for s in scored[1::2]), "kl_k3": want.as_dict()}


def test_what_was_not_seen_has_no_interval_of_no_width():
    m = pair(responses(30, noise=1e-4)).measures
    for key in ("outside_tenth", "outside_half"):
        assert (m[key].value, m[key].low, m[key].high) == (0, None, None)
    assert (m["seq_above_cap"].low, m["seq_above_cap"].high) == (0, pytest.approx(0.1157, abs=1e-4))  # Clopper-Pearson
    assert pair(responses(19)).measures["seq_logratio_std"].low is None
    assert pair(responses(20)).measures["seq_logratio_std"].low is not None


def test_the_verdict_withholds_what_it_cannot_know():
    study = Study(dict(SETTINGS, source="r.jsonl"), 3.0, 0, [pair(responses(1))])
    said = " ".join(verdict(study))
    assert "1 response cannot show" in said
    assert "usable" not in said
    same = [Scored(s.prompt_ids, s.response_ids, s.logp_train, s.logp_train) for s in responses(40)]
    assert "identical" in " ".join(verdict(Study(dict(SETTINGS, source="r.jsonl"), 3.0, 0, [pair(same)])))


def test_labels_that_name_no_format_are_noted_and_not_markup(tmp_path):
    write(tmp_path / "r.jsonl", [ROW | {"precision": p} for p in ("fp8", "[red]x[/red]", "bf16/fp16")])
    done = tenbit("probe", "--from", "r.jsonl", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (note,) = [n for n in load(tmp_path / "out")["notes"] if "listed under" in n]
    assert "'fp8', '[red]x[/red]'" in note
    assert "bf16/fp16'" not in note
    assert done.stdout.count("[red]x[/red]") >= 4  # heads of two tables, worst tokens, verdict


def test_the_page_folds_causes_that_take_nothing_off():
    def cause(name, share):
        return SimpleNamespace(name=name, what="w", kl_before=1.0, kl_after=1.0, share=share, interval=None,
                               remedy="do it", note="")  # fmt: skip

    rows = [cause("a", 1.3), cause("b", 0.4), cause("c", 0.0), cause("d", -0.2), cause("e", None)]
    found = _causes(SimpleNamespace(rows=rows, verdict="v", total=1.0))
    assert [(r[0], r[4], r[6]) for r in found["rows"]] == [("a", "over 100%", "do it"), ("b", "40%", "do it")]
    assert [(r[0], r[6]) for r in found["others"]] == [("c", ""), ("d", ""), ("e", "")]
