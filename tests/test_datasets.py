"""Loading problems: the shipped sets, three file formats, Hugging Face folders, and every way a row can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from tenbit.tasks.answers import ALTERNATIVES, references
from tenbit.tasks.datasets import DATA, load_problems, shipped

# Rows and the beginning of the SHA-256 of each file as it was received: the sets are shipped unchanged.
RECEIVED = {
    "aime24": (30, "09d25c71b6c2a323"),
    "aime25": (30, "e995bec399cc171f"),
    "aime_1983_2024": (975, "6637d2362e2dc1c1"),
    "amc": (83, "32cdc7dba8bfc8ba"),
    "amc23": (40, "2b12a9ec77caa486"),
    "asdiv": (1788, "de71ddb3df10a820"),
    "gsm8k": (8792, "46b955e7bac34870"),
    "math500": (500, "db31cf92e68c16c1"),
    "math_perfectible_r1d15b": (1460, "a49e027cb5306db0"),
    "minerva": (272, "99fc84d8b24eb116"),
    "olympiad_bench": (675, "c7fd611a2c2f5b1d"),
}
GOOD = {"problem": "1+1?", "answer": "2"}


def write(folder: Path, name: str, *rows: object) -> str:
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", RECEIVED)
def test_shipped_set_is_complete_and_unchanged(name):
    rows, checksum = RECEIVED[name]
    path = shipped()[name]
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(checksum)
    problems = load_problems(name)
    assert len(problems) == rows
    assert [p.id for p in problems] == [f"{name}.jsonl:{n}" for n in range(1, rows + 1)]
    assert all(p.prompt.strip() and all(references(p.answer)) for p in problems)


def test_the_readme_beside_the_data_names_every_set_and_its_rows():
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for name, (rows, _) in RECEIVED.items():
        line = next(line for line in readme.splitlines() if line.startswith(f"| `{name}.jsonl`"))
        assert f"| {rows:,} |" in line


def test_answers_stay_as_the_files_spell_them():
    assert load_problems("amc")[0].answer == "142.0"
    assert load_problems("aime24")[1].answer == "025"
    interval = [p for p in load_problems("math_perfectible_r1d15b") if p.answer == "[5,10]"]
    assert len(interval) == 1  # no list of texts: an interval


def test_lists_written_as_text_become_the_answers_in_them():
    minerva = load_problems("minerva")
    assert minerva[0].answer == "9.6"
    assert minerva[10].answer == f"0.01{ALTERNATIVES}0.02"
    assert minerva[22].answer == r"7.5 \times 10^7"  # the same spelling twice counts once
    assert load_problems("olympiad_bench")[1].answer == r"$\frac{1}{2 n+2}$"


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("142.0", "142.0"),
        ("-3", "-3"),
        ("1e400", "1e400"),
        ("0.10000000000000000555", "0.10000000000000000555"),
        ('"007"', "007"),
        ('["a", "b", "a "]', f"a{ALTERNATIVES}b"),
        ("\"['a', 'b']\"", f"a{ALTERNATIVES}b"),
        ('"[5,10]"', "[5,10]"),
        ('"[\'broken"', "['broken"),
    ],
)
def test_an_answer_becomes_text_faithfully(tmp_path, written, text):
    source = write(tmp_path, "a.jsonl", f'{{"problem": "p", "answer": {written}}}')
    assert load_problems(source)[0].answer == text


def test_the_same_rows_from_jsonl_gzip_parquet_and_a_folder(tmp_path):
    rows = [{"problem": f"{n}+{n}?", "answer": str(2 * n)} for n in range(5)]
    plain = load_problems(write(tmp_path, "a.jsonl", *rows))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=made.select([0]), test=made).save_to_disk(str(tmp_path / "two"))

    def said(problems):
        return [(p.prompt, p.answer) for p in problems]

    packed, columns = load_problems(str(tmp_path / "a.jsonl.gz")), load_problems(str(tmp_path / "a.parquet"))
    assert [p.id for p in plain] == [f"a.jsonl:{n}" for n in range(1, 6)]
    assert packed[1].id == "a.jsonl.gz:2"
    assert columns[1].id == "a.parquet:2"
    assert said(plain) == said(packed) == said(columns) == said(load_problems(str(tmp_path / "one")))
    assert said(load_problems(str(tmp_path / "two"), split="test")) == said(plain)
    with pytest.raises(ValueError, match=r"no split 'dev'; set split to one of 'train', 'test'"):
        load_problems(str(tmp_path / "two"), split="dev")


def test_a_folder_of_data_files_is_read_by_datasets(tmp_path, monkeypatch):
    write(tmp_path, "train.jsonl", GOOD)
    assert load_problems(str(tmp_path))[0].answer == "2"


def test_numbers_in_parquet_keep_their_own_spelling(tmp_path):
    table = pa.table({"problem": ["a", "b"], "answer": [142.0, 0.1]})
    pyarrow.parquet.write_table(table, tmp_path / "n.parquet")
    assert [p.answer for p in load_problems(str(tmp_path / "n.parquet"))] == ["142.0", "0.1"]
    whole = pa.table({"problem": ["a"], "answer": [7]})
    pyarrow.parquet.write_table(whole, tmp_path / "i.parquet")
    assert load_problems(str(tmp_path / "i.parquet"))[0].answer == "7"


def test_keys_and_limit(tmp_path):
    source = write(tmp_path, "a.jsonl", *({"question": f"q{n}", "gold": n} for n in range(9)))
    problems = load_problems(source, problem_key="question", answer_key="gold", limit=3)
    assert [(p.prompt, p.answer) for p in problems] == [("q0", "0"), ("q1", "1"), ("q2", "2")]
    with pytest.raises(ValueError, match="limit = 0"):
        load_problems(source, limit=0)


def test_blank_lines_may_end_a_file_and_a_byte_order_mark_may_begin_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n\n")
    assert len(load_problems(str(path))) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{'problem': 'p'}", r"a\.jsonl:2: not a JSON object on one line: .* column 2"),
        ("[1, 2]", r"a\.jsonl:2: the row is .*not an object with 'problem' and 'answer'"),
        ("7", r"a\.jsonl:2: the row is the number 7"),
        ("null", r"a\.jsonl:2: the row is null"),
        ("{}", r"a\.jsonl:2: the row has no 'problem', only nothing; set problem_key"),
        (
            {"question": "p", "answer": "1"},
            r"a\.jsonl:2: the row has no 'problem', only 'question', 'answer'; set problem_key",
        ),
        ({"problem": "p", "solution": "1"}, r"a\.jsonl:2: the row has no 'answer', only .*'solution'; set answer_key"),
        ({"problem": " \n", "answer": "1"}, r"a\.jsonl:2: 'problem' is empty"),
        ({"problem": "p", "answer": ""}, r"a\.jsonl:2: 'answer' is empty"),
        ({"problem": "p", "answer": "['  ']"}, r"a\.jsonl:2: 'answer' is empty"),
        ({"problem": "p", "answer": None}, r"a\.jsonl:2: 'answer' is null"),
        ({"problem": "p", "answer": True}, r"a\.jsonl:2: 'answer' is True \(bool\)"),
        (
            {"problem": "p", "answer": {"value": 1}},
            r"a\.jsonl:2: 'answer' is .*must be text, a number, or a list of texts",
        ),
        ({"problem": 5, "answer": "1"}, r"a\.jsonl:2: 'problem' is the number 5; a problem must be text"),
        ("", r"a\.jsonl:2: the line is empty; remove it"),
        ("[" * 100_000, r"a\.jsonl:2: not a JSON object on one line"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_problems(write(tmp_path, "a.jsonl", GOOD, row, GOOD))


def test_text_that_is_not_utf8_is_refused_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"problem": "caf\xe9", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not UTF-8"):
        load_problems(str(path))


def test_a_cut_gzip_file_and_a_broken_parquet_file_are_refused(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"problem": str(Decimal(n) / 7), "answer": n}) + "\n" for n in range(999))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz:\d+: cannot be read: .*complete"):
        load_problems(str(cut))
    (tmp_path / "no.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"no\.parquet: row 1 cannot be read as Parquet"):
        load_problems(str(tmp_path / "no.parquet"))


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no problem in it"):
        load_problems(write(tmp_path, "a.jsonl"))


def test_a_missing_source_names_its_neighbours_and_the_shipped_sets(tmp_path):
    write(tmp_path, "train.jsonl", GOOD)
    with pytest.raises(ValueError, match=r"Did you mean 'train\.jsonl'\?.*Shipped sets: aime24, .*olympiad_bench"):
        load_problems(str(tmp_path / "trian.jsonl"))
    with pytest.raises(ValueError, match=r"Did you mean 'math500'\?"):
        load_problems("math_500")
    (tmp_path / "a.csv").write_text("problem,answer\n")
    with pytest.raises(ValueError, match=r"the ending is none of \.jsonl, \.jsonl\.gz, \.parquet"):
        load_problems(str(tmp_path / "a.csv"))


def test_a_hub_name_that_cannot_be_reached_is_one_clear_message():
    code = "from tenbit.tasks.datasets import load_problems\nload_problems('nobody/nothing')"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "ValueError: 'nobody/nothing' is no file or folder here and could not be loaded" in ran.stderr
    assert "Check the name" in ran.stderr


def beginnings(name: str) -> set[str]:
    return {"".join(c for c in p.prompt if c.isalnum())[:120] for p in load_problems(name)}


def test_the_overlaps_that_the_readme_states():
    stated = {
        ("amc23", "amc"): 40,
        ("math_perfectible_r1d15b", "aime_1983_2024"): 126,
        ("math500", "aime_1983_2024"): 7,
        ("math500", "math_perfectible_r1d15b"): 1,
    }
    known = {name: beginnings(name) for name in RECEIVED}
    names = sorted(known)
    found = {(a, b): len(known[a] & known[b]) for a in names for b in names if a < b and known[a] & known[b]}
    assert found == {tuple(sorted(pair)): count for pair, count in stated.items()}
