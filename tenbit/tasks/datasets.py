"""Problems and their answers: the sets that come with tenbit, JSON lines, Parquet, and Hugging Face datasets.

    load_problems("math500")                            a shipped set (`shipped()` lists them)
    load_problems("mine.jsonl", problem_key="question")  a file: .jsonl, .jsonl.gz or .parquet
    load_problems("folder/")                            a folder written by `datasets`' `save_to_disk`, or a data folder
    load_problems("openai/gsm8k:main", split="test")    a dataset of the Hugging Face hub, `owner/name[:config]`

A row is an object with a problem (text) and an answer (text or a number). A number becomes the text that stands
in the file: 142.0 stays "142.0". A list of texts, also one written as text ("['2.5', '5/2']", as in Minerva and
OlympiadBench), holds answers of which any is right; they are joined by `answers.ALTERNATIVES`. "[5,10]" holds
no texts and is an interval. Every error names the file and the line, and says what to do.
"""

from __future__ import annotations

import ast
import difflib
import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tenbit.tasks.answers import ALTERNATIVES
from tenbit.types import Problem

DATA = Path(__file__).with_name("data")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

Row = tuple[int, Any]


class _Number(str):
    """A JSON number as the file spells it."""


def shipped() -> dict[str, Path]:
    """The sets that come with tenbit, name -> file."""
    return {_stem(path): path for path in sorted(DATA.iterdir()) if _readable(path)}


def load_problems(
    source: str,
    *,
    problem_key: str = "problem",
    answer_key: str = "answer",
    split: str = "train",
    limit: int | None = None,
) -> list[Problem]:
    """The problems of a source, in its order, at most `limit`. `split` is for Hugging Face datasets.

    Raises ValueError for a source that is not there, cannot be read or is empty, and for every malformed row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"data: limit = {limit}; write a positive number of problems, or leave it out for all of them")
    name, rows = _open(source, split)
    problems = [_problem(row, f"{name}:{number}", problem_key, answer_key) for number, row in islice(rows, limit)]
    if not problems:
        raise ValueError(f"{source}: there is no problem in it; it needs rows with {problem_key!r} and {answer_key!r}")
    return problems


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


def _readable(path: Path) -> bool:
    return path.name.endswith(_SUFFIXES)


def _open(source: str, split: str) -> tuple[str, Iterator[Row]]:
    """The name that ids begin with, and the numbered rows."""
    sets = shipped()
    if source in sets:
        return sets[source].name, _read_lines(sets[source])
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_datasets(str(path), split)
    if path.is_file():
        if path.suffix == ".parquet":
            return path.name, _read_parquet(path)
        if _readable(path):
            return path.name, _read_lines(path)
        raise ValueError(f"{source}: the ending is none of {', '.join(_SUFFIXES)}; convert the file or rename it")
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.endswith((*_SUFFIXES, ".json", ".csv"))
    if "/" in source and not looks_local:
        return _from_datasets(source, split)
    raise ValueError(_missing(source, path, list(sets)))


def _missing(source: str, path: Path, sets: list[str]) -> str:
    near = difflib.get_close_matches(_stem(path), sets, n=2)
    if path.parent.is_dir():
        beside = [p.name for p in path.parent.iterdir() if _readable(p)]
        near += difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return (
        f"there is no data set or file {source!r} (looked in {path.parent.resolve()}).{hint} Shipped sets: "
        f"{', '.join(sets)}. Otherwise give a path to {', '.join(_SUFFIXES)}, or a Hugging Face dataset as "
        "'owner/name'."
    )


def _read_lines(path: Path) -> Iterator[Row]:
    """The objects of a JSON-lines file with their line numbers. Blank lines may only stand at the end."""
    blank = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    blank = blank or number
                    continue
                if blank:
                    raise ValueError(f"{path}:{blank}: the line is empty; remove it or fill it in")
                yield number, _parse(line, f"{path}:{number}")
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}:{number + 1}: cannot be read: {error}; is the file complete?") from error


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), parse_float=_Number, parse_int=_Number)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise ValueError(f"{where}: not a JSON object on one line: {what}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: row {number + 1} cannot be read as Parquet: {error}") from error


def _from_datasets(source: str, split: str) -> tuple[str, Iterator[Row]]:
    """A dataset on disk or on the hub, by Hugging Face's own loader."""
    import datasets

    folder = Path(source)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded: Any = datasets.load_from_disk(source)
        else:
            name, _, config = source.partition(":") if not folder.is_dir() else (source, "", "")
            loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # the library raises a dozen kinds, of which the text is what helps
        raise ValueError(
            f"{source!r} is no file or folder here and could not be loaded as a Hugging Face dataset: "
            f"{type(error).__name__}: {error} Check the name ('owner/name', or 'owner/name:config') and the connection."
        ) from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise ValueError(
                f"{source}: there is no split {split!r}; set split to one of {', '.join(map(repr, loaded))}"
            )
        loaded = loaded[split]
    return source.rstrip("/").rpartition("/")[2], ((n, row) for n, row in enumerate(loaded, 1))


def _problem(row: Any, where: str, problem_key: str, answer_key: str) -> Problem:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: the row is {_kind(row)}, not an object with {problem_key!r} and {answer_key!r}")
    for option, key in (("problem_key", problem_key), ("answer_key", answer_key)):
        if key not in row:
            raise ValueError(
                f"{where}: the row has no {key!r}, only {', '.join(map(repr, row)) or 'nothing'}; "
                f"set {option} to the name it has there"
            )
    prompt, answer = row[problem_key], row[answer_key]
    if not isinstance(prompt, str) or isinstance(prompt, _Number):
        raise ValueError(f"{where}: {problem_key!r} is {_kind(prompt)}; a problem must be text")
    text = _answer(answer, f"{where}: {answer_key!r}")
    for key, value in ((problem_key, prompt), (answer_key, text)):
        if not value.strip():
            raise ValueError(f"{where}: {key!r} is empty; fill it in or remove the row")
    return Problem(prompt, text, where)


def _answer(answer: Any, where: str) -> str:
    """An answer as text. Only texts and numbers have an obvious one; anything else is refused."""
    if isinstance(answer, str):
        several = _written_list(answer)
        return answer if several is None else _joined(several)
    if isinstance(answer, list) and answer and all(isinstance(item, str) for item in answer):
        return _joined(answer)
    # Parquet and Hugging Face hold numbers of their own; a missing value is NaN in many files.
    if isinstance(answer, int | float) and not isinstance(answer, bool) and answer == answer:
        return str(answer)
    raise ValueError(f"{where} is {_kind(answer)}; an answer must be text, a number, or a list of texts")


def _written_list(answer: str) -> list[str] | None:
    """The texts of a list that is written as text, or None when it is no such list."""
    if not answer.lstrip().startswith(("['", '["')):
        return None
    try:
        parsed = ast.literal_eval(answer.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return parsed if isinstance(parsed, list) and all(isinstance(item, str) for item in parsed) else None


def _joined(items: list[str]) -> str:
    """Different spellings once each, in order."""
    return ALTERNATIVES.join(dict.fromkeys(item.strip() for item in items if item.strip()))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, _Number):
        return f"the number {value}"
    return f"{value!r:.60} ({type(value).__name__})"
