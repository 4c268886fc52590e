"""Responses with log-probabilities as JSON lines: what `tenbit probe` writes, and what other frameworks can.

One object a line, in `.jsonl` or `.jsonl.gz` (docs/probe.md has the format and examples):

    prompt_ids, response_ids    token ids; T ids of the response
    logp_rollout                T numbers: log mu of each, as the sampler computed them, temperature applied
    logp_train                  optional, T numbers: log pi, as the trainer computed them
    temperature                 optional: what the response was sampled at
    version                     optional: how many weight updates the sampler had received
    precision                   optional: what the row is listed under, such as "bf16/fp16"

Every row is checked; an error names the file, the line, the key and the remedy. NaN and infinities (also written as
null) are let through, for the probe to count and leave out: frameworks do produce them, and that is worth knowing.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenbit.scoring import Scored

FARTHEST = 1e300  # JSON has integers of any length
ROUNDING = 1e-4  # log-softmax in a 16-bit format may end this little above 0
KEYS = ("prompt_ids", "response_ids", "logp_rollout")


@dataclass(frozen=True)
class Recorded:
    """One row. `logp_train` is None if the framework wrote none."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logp_rollout: Tensor
    logp_train: Tensor | None = None
    temperature: float | None = None
    version: int | None = None
    precision: str | None = None
    where: str = ""

    def scored(self, logp_train: Tensor | None = None) -> Scored:
        """With the trainer's log-probabilities as they were recorded, or others."""
        logp = self.logp_train if logp_train is None else logp_train
        assert logp is not None
        return Scored(self.prompt_ids, self.response_ids, self.logp_rollout, logp, self.temperature, self.version)


@dataclass
class Rows:
    """A file's rows, and what a reader should know about them."""

    rows: list[Recorded] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_rows(path: Path, vocabulary: int | None = None, limit: int | None = None) -> Rows:
    """Reads and checks a file. `vocabulary` is the model's number of tokens, where there is a model."""
    if not path.is_file():
        raise ValueError(f"--from {path}: there is no such file. Name a .jsonl or .jsonl.gz file of rollouts")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"--from {path}: the ending is neither .jsonl nor .jsonl.gz. Convert or rename the file")
    out, empty = Rows(), 0
    for number, value in _objects(path, out.notes):
        row = _row(value, f"{path}:{number}", vocabulary)
        if row.response_ids:
            out.rows.append(row)
        else:
            empty += 1
        if limit is not None and len(out.rows) == limit:
            break
    if empty:
        out.notes.append(f"{empty} rows without a response token were left out")
    if not out.rows:
        raise ValueError(f"--from {path}: there are no responses in it. It needs rows with {', '.join(KEYS)}")
    return out


def write_rows(path: Path, scored: Sequence[Scored], precision: str) -> None:
    """Appends to a .jsonl.gz file, each row with its own temperature and version, where they are known.

    Nine digits are enough to read every float32 back unchanged.
    """
    with gzip.open(path, "at", encoding="utf-8", compresslevel=5) as file:
        for s in scored:
            known = {"temperature": s.temperature, "version": s.version}
            head = {"precision": precision} | {k: v for k, v in known.items() if v is not None}
            ids = {"prompt_ids": list(s.prompt_ids), "response_ids": list(s.response_ids)}
            logps = ", ".join(
                f'"{key}": [{", ".join(map(_digits, values.tolist()))}]'
                for key, values in (("logp_rollout", s.logp_rollout), ("logp_train", s.logp_train))
            )
            file.write(f"{json.dumps(head | ids)[:-1]}, {logps}}}\n")


def _digits(value: float) -> str:
    return f"{value:.9g}" if math.isfinite(value) else "null"


def _objects(path: Path, notes: list[str]) -> Iterator[tuple[int, Any]]:
    """Numbered objects. A last line that broke off (a run still writes, or was killed) is left out with a note."""
    number, broken = 0, ""
    with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if broken:
                    raise ValueError(broken)
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode("utf-8-sig"))
                except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                    what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    broken = f"{path}:{number}: not a JSON object on one line: {what}. Correct or remove the line"
                    if line.endswith(b"\n"):
                        raise ValueError(broken) from None
                    continue
                yield number, value
        except EOFError:
            broken = f"{path}:{number + 1}: the compressed file ends too early"
        except OSError as error:  # gzip's own, of a damaged or misnamed file
            raise ValueError(
                f"{path}:{number + 1}: cannot be read: {error}. Is the file whole, and really gzip?"
            ) from None
    if broken:
        notes.append(f"{path.name}: the end of the file is torn; its last line was left out")


def _row(value: Any, where: str, vocabulary: int | None) -> Recorded:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: the row is {_kind(value)}, not an object with {', '.join(KEYS)}")
    for key in KEYS:
        if key not in value:
            there = ", ".join(map(repr, value)) or "nothing"
            raise ValueError(f"{where}: the row has no {key!r}, only {there}. Add it, or rename the key")
    prompt = _ids(value["prompt_ids"], f"{where}: prompt_ids", vocabulary)
    response = _ids(value["response_ids"], f"{where}: response_ids", vocabulary)
    if not prompt:
        raise ValueError(
            f"{where}: prompt_ids is empty, so the first response token has nothing to follow. Put at least the "
            "beginning-of-sequence token there"
        )
    train = value.get("logp_train")
    temperature, version, precision = (value.get(k) for k in ("temperature", "version", "precision"))
    if temperature is not None and not (_is_number(temperature) and 0 < temperature < math.inf):
        raise ValueError(f"{where}: temperature is {_kind(temperature)}. Write a number above 0, or leave it out")
    if version is not None and not (isinstance(version, int) and not isinstance(version, bool)):
        raise ValueError(f"{where}: version is {_kind(version)}. Write a whole number, or leave it out")
    if precision is not None and not (isinstance(precision, str) and precision):
        raise ValueError(f"{where}: precision is {_kind(precision)}. Write a name, or leave it out")
    return Recorded(
        prompt,
        response,
        _logps(value["logp_rollout"], f"{where}: logp_rollout", len(response)),
        None if train is None else _logps(train, f"{where}: logp_train", len(response)),
        None if temperature is None else float(temperature),
        version,
        precision,
        where,
    )


def _ids(values: Any, where: str, vocabulary: int | None) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{where} is {_kind(values)}. Write a list of token ids")
    for i, v in enumerate(values):
        if not isinstance(v, int) or isinstance(v, bool):
            raise ValueError(f"{where}[{i}] is {_kind(v)}. Token ids are whole numbers, written without quotes")
        if v < 0 or (vocabulary is not None and v >= vocabulary):
            of = f"of the model's vocabulary of {vocabulary}" if vocabulary is not None else "of any vocabulary"
            raise ValueError(
                f"{where}[{i}] = {v} is outside {of}. Leave out padding, and check that --model is the model that "
                "was sampled from"
            )
    return tuple(values)


def _logps(values: Any, where: str, length: int) -> Tensor:
    if not isinstance(values, list):
        raise ValueError(f"{where} is {_kind(values)}. Write a list with a number for each response token")
    if len(values) != length:
        raise ValueError(
            f"{where} has {len(values)} numbers, but response_ids has {length} tokens. Write one for each response "
            "token and none for the prompt or for padding"
        )
    found = []
    for i, v in enumerate(values):
        if v is None:
            v = math.nan
        if not _is_number(v):
            raise ValueError(f"{where}[{i}] is {_kind(v)}. Log-probabilities are numbers, written without quotes")
        if v > ROUNDING and v != math.inf:  # infinities are counted and left out, whatever their sign
            raise ValueError(
                f"{where}[{i}] = {v!s:.20} is above 0, which no log-probability is. Write log-probabilities: not "
                "probabilities, and not their negative"
            )
        found.append(v if v != v or v == math.inf else min(float(max(v, -FARTHEST)), 0.0))
    return torch.tensor(found, dtype=torch.float32)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "null" if value is None else f"{value!r:.60} ({type(value).__name__})"
