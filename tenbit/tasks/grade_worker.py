r"""The process in which answers are graded that might hang or crash: Math-Verify's, or a user's own function's.

`tenbit.tasks.worker_pool` starts this file by its path, so nothing of tenbit, and above all no torch, is imported
here: a worker is ready in half a second and small. It can be killed at any moment; it ends by itself when its
parent is gone.

Speech, one JSON object a line. Parent, on standard input: first the job, ``{"grader": "math"}`` or
``{"grader": "module:function", "path": [...]}``, then the items. Worker, on the descriptor given as argument:
``{"ready": true}`` or ``{"refused": why}``, then for each item ``{"reward": x}``, ``{"error": message}`` or
``{"invalid": repr}`` for a reward that is no finite number. Standard input is taken away from graders, their
standard output goes to the terminal and their standard error to the parent, which quotes it when a worker dies.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import json
import math
import os
import queue
import re
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

SMALL = 1e-3  # below this, numbers that Math-Verify finds equal must also agree to this relative accuracy
MEMORY_LIMIT = 4 << 30  # bytes of address space for Math-Verify, which needs a tenth of it


@dataclass(frozen=True)
class Problem:
    """What a user's function is given: the fields of `tenbit.types.Problem`, which would import torch."""

    prompt: str
    answer: str
    id: str


Job = Callable[[dict[str, Any]], Any]

# What stands in real answers and Math-Verify's parser does not take.
_TIDY = [
    (re.compile(r"(?<!\\)\$"), ""),
    (re.compile(r"\\!|[\s.]+$"), ""),
    (re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?:,\d{3}|\{,\}\d{3})*\})"), ""),  # 20,000 inside braces
    (re.compile(r"(?<![\w\\])(\d+(?:\.\d+)?)[eE]([+-]?\d+)\b"), r"\1 \\times 10^{\2}"),
    (re.compile(r"\\[dtc]?frac\s*(\\[a-z]+)\s*(\w)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\s+"), " "),  # its patterns do not cross line breaks
]


def tidy(answer: str) -> str:
    for pattern, written in _TIDY:
        answer = pattern.sub(written, answer)
    return answer


def math_job() -> Job:
    """Compares ``{"reference", "candidate"}`` with Math-Verify; its own SIGALRM limits are off (they fail in
    threads and cannot stop C code), the parent's clock takes their place."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its limits are off
    normal = LatexExtractionConfig(boxed_match_priority=0)
    unitless = replace(normal, normalization_config=replace(normal.normalization_config, units=False))

    def read(answer: str) -> list[Any]:
        # A box is the one form in which Math-Verify takes everything as LaTeX, up to the last brace.
        boxed = rf"\boxed{{{tidy(answer)}}}"
        parsed = parse(boxed, extraction_config=[normal], parsing_timeout=None)  # type: ignore[arg-type]
        if parsed and isinstance(parsed[0], str):  # it takes the c of a + b + c for a unit
            again = parse(boxed, extraction_config=[unitless], parsing_timeout=None)  # type: ignore[arg-type]
            parsed = again if again and not isinstance(again[0], str) else parsed
        return parsed

    read_reference = lru_cache(maxsize=1024)(read)  # every response of a group has the same reference

    def tiny_and_different(gold: Any, target: Any) -> bool:
        """Math-Verify rounds to six decimals and drops what is below 1e-15: small numbers all look alike to it."""
        if not all(getattr(value, "is_number", False) for value in (gold, target)):
            return False
        size = abs(gold.evalf(30))
        return bool(0 < size < SMALL) and bool(abs((gold.doit() - target.doit()).evalf(30)) > SMALL * size)

    def grade(item: dict[str, Any]) -> float:
        gold = read_reference(item["reference"])
        if "candidate" not in item:  # does Math-Verify read the reference at all?
            return float(not isinstance(gold[0], str))
        target = read(item["candidate"])
        equal = verify(gold, target, timeout_seconds=None)
        if equal and "%" not in item["reference"] + item["candidate"]:  # 0.05% may be written as 0.05
            equal = not tiny_and_different(gold[0], target[0])
        return float(equal)

    with contextlib.suppress(ValueError, OSError):  # not every system has the limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    grade({"reference": r"\frac{1}{2}", "candidate": "0.5"})  # the parser's tables are built on first use
    return grade


def user_job(name: str, path: list[str]) -> Job:
    """Calls ``module:function`` (or ``file.py:function``) as ``function(problem, text)``."""
    module_name, _, attribute = name.rpartition(":")
    sys.path[:] = [str(Path.cwd()), *path]
    if module_name.endswith(".py"):
        where = Path(module_name).resolve()
        spec = importlib.util.spec_from_file_location(where.stem, where)
        if not where.is_file() or spec is None or spec.loader is None:
            raise ImportError(f"there is no file {where}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[where.stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    function: Any = module
    for part in attribute.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise TypeError(f"{attribute!r} is a {type(function).__name__}, not a function")
    # A module that has imported tenbit's types, and torch with them, gets the real thing.
    kind = getattr(sys.modules.get("tenbit.types"), "Problem", Problem)
    return lambda item: function(kind(item["prompt"], item["answer"], item["id"]), item["text"])


def describe(error: BaseException) -> str:
    """One line: the exception and the line of code that raised it."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # an exception whose own message cannot be made
        text = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return " ".join(text.split())[:500] + where


def reply_to(job: Job, item: dict[str, Any]) -> dict[str, Any]:
    try:
        value = job(item)
    except BaseException as error:  # SystemExit too: a grader must not end its worker politely
        return {"error": describe(error)}
    try:
        if isinstance(value, str | bytes | bytearray):
            raise TypeError("text is no number")
        reward = float(value)
        if math.isfinite(reward):
            return {"reward": reward}
    except Exception:  # whatever float() makes of a stranger's object, it was no number
        pass
    try:
        return {"invalid": repr(value)[:200]}
    except Exception:
        return {"invalid": f"an object of type {type(value).__name__}"}


def listen(requests: BinaryIO, inbox: queue.SimpleQueue[bytes]) -> None:
    """Reads in a thread of its own, so that the parent's end is noticed even while an item is being graded."""
    for line in requests:
        inbox.put(line)
    os._exit(0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    faulthandler.enable()
    with contextlib.suppress(OSError):  # out of memory, the kernel should take this process and not the trainer
        Path("/proc/self/oom_score_adj").write_text("1000")
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(int(sys.argv[1]), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    first = json.loads(requests.readline() or os._exit(0))
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(requests, inbox), daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        try:
            replies.write(json.dumps(message).encode() + b"\n")
        except BrokenPipeError:  # the parent is gone
            os._exit(0)

    try:
        job = math_job() if first["grader"] == "math" else user_job(first["grader"], first["path"])
    except BaseException as error:
        send({"refused": describe(error)})
        return
    send({"ready": True})
    # A last resort for code that never lets the listening thread run, once nobody is left to kill it: the kernel
    # ends the process when one item has used this much processor time.
    budget = (first["timeout"] + 10.0) * (os.cpu_count() or 1)
    while True:
        item = json.loads(inbox.get())
        signal.setitimer(signal.ITIMER_PROF, budget)
        answer = reply_to(job, item)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        send(answer)


if __name__ == "__main__":
    main()
