"""`tenbit perfectible`: the problems of a set that a model solves sometimes, section 4 of the paper.

    plan = make_plan("builtin", data="arithmetic", grader="exact")
    summary = run(plan, Path("mine.jsonl"))          mine.jsonl is then a data set for `task.data`
    rows = measure(policy, asked, rule, seed)        the same on an engine that is open already

Every problem gets `--samples` responses at temperature 1, or as many as settle its verdict (`perfectible_rule`). A
response's seed depends on the problem's place and the response's own, so stopping early changes neither the responses
before the stop nor any other problem's: verdicts are those of full sampling (in 16 bits up to rounding that depends on
the batch, as always).

Rows are appended to `mine.all.jsonl` chunk by chunk, each chunk on disk before the next one is sampled. A run that was
killed goes on after its last whole chunk and ends with the same files, byte for byte.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tenbit.clock import Clock
from tenbit.console import default_console, progress_bar
from tenbit.engines.choose import make_engine
from tenbit.folder import flat, locked
from tenbit.models import loading
from tenbit.prompts import Asked
from tenbit.report.perfectible import figure, page
from tenbit.rollout import Policy, seed_of
from tenbit.runlog import write_atomic
from tenbit.studies.evaluation import digest, fingerprint
from tenbit.studies.evaluation_plan import OPTIONS
from tenbit.studies.gradings import Gradings
from tenbit.studies.options import said_in_options
from tenbit.studies.perfectible_plan import ROUND, Files, Plan, fit
from tenbit.studies.perfectible_rule import Rule
from tenbit.studies.perfectible_summary import show, summarise
from tenbit.tasks.grading import open_grader
from tenbit.types import Completion, Prompt

Row = dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """The responses to one problem so far, in the order of their places."""

    right: tuple[bool, ...] = ()
    lengths: tuple[int, ...] = ()
    cut: int = 0  # by the token budget
    failed: int = 0  # to be graded

    def and_then(self, right: bool, completion: Completion, failed: bool) -> Tried:
        lengths = (*self.lengths, completion.length)
        return Tried((*self.right, right), lengths, self.cut + (completion.finish == "length"), self.failed + failed)

    def row(self, asked: Asked, rule: Rule) -> Row:
        """What is kept of a problem whose verdict is settled."""
        p, n, correct = asked.problem, len(self.right), sum(self.right)
        return {
            "id": p.id,
            "problem": p.prompt,
            "answer": p.answer,
            "verdict": rule.settled(n, correct),
            "initial_accuracy": round(correct / n, 4),
            "samples": n,
            "correct": correct,
            "prefix": n < rule.samples,
            "responses": "".join("01"[r] for r in self.right),
            "lengths": list(self.lengths),
            "cut": self.cut,
            "grading_failed": self.failed,
        }


def measure(
    policy: Policy,
    asked: Sequence[Asked],
    rule: Rule,
    seed: tuple[object, ...],
    first: int = 0,
    *,
    least: int = ROUND,
    tick: Callable[[int], None] = lambda settled: None,
    hear: Callable[[Iterable[tuple[str, str | None]]], None] = lambda failures: None,
) -> list[Row]:
    """Samples each problem until its verdict is settled; one row a problem, in order.

    `first` is the first problem's place in its set: it enters the seeds. `least` responses a round; the rule's whole
    number samples everything. `tick` hears how many problems were settled, round by round, and `hear` of every grading
    the problem's id and what went wrong, or None.
    """
    tried = [Tried()] * len(asked)
    counts = [(i, 0, 0) for i in range(len(asked))]  # of the problems that are open: place, sampled, right
    while counts:
        wanted = [(i, place) for i, n, c in counts for place in range(n, n + rule.more(n, c, least))]
        prompts = [Prompt(asked[i].ids, seed_of(*seed, first + i, place)) for i, place in wanted]
        problems = [asked[i].problem for i, _ in wanted]
        responses = policy.respond(list(zip(problems, prompts, strict=True)), Clock())
        hear((problem.id, grade.failure) for problem, (_, _, grade) in zip(problems, responses, strict=True))
        for (i, _), (completion, _, grade) in zip(wanted, responses, strict=True):
            tried[i] = tried[i].and_then(grade.correct, completion, grade.failure is not None)
        now = [(i, len(tried[i].right), sum(tried[i].right)) for i, _, _ in counts]
        still = [(i, n, c) for i, n, c in now if rule.settled(n, c) is None]
        tick(len(counts) - len(still))
        counts = still
    return [t.row(a, rule) for t, a in zip(tried, asked, strict=True)]


def kept_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of a data set: the problems that are kept, with what was measured of them."""
    columns = ("problem", "answer", "initial_accuracy", "samples", "correct", "prefix", "id")
    return [{key: row[key] for key in columns} for row in rows if row["verdict"] == "kept"]


# --- the command


def run(plan: Plan, out: Path | None, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Samples, grades, writes and shows; returns what is in the summary.

    Raises ValueError with the remedy for bad input, before anything is written.
    """
    console = console or default_console()
    files = Files.of(out)
    with held(files):
        refuse_taken(files, resume)
        with said_in_options(OPTIONS):
            model = loading.load(plan.recipe.model, plan.recipe.rollout.stop_tokens)
        plan, name, asked = fit(plan, model)
        settings = settings_of(plan, asked, model)
        if resume and files.summary.exists():
            check_settings(files, settings)
        summary = write(plan, model, name, asked, settings, files, console)
    show(summary, console)
    for what, path in (("kept", files.kept), ("page", files.page)):
        console.print(Text.assemble((f"{what}  ", "dim"), str(path)), soft_wrap=True)
    return summary


def write(
    plan: Plan,
    model: loading.Model,
    name: str,
    asked: Sequence[Asked],
    settings: dict[str, Any],
    files: Files,
    console: Console,
) -> dict[str, Any]:
    """Samples what is not there yet, and writes all files; returns what is in the summary."""
    task = plan.recipe.task
    grading = open_grader(
        task.grader, workers=task.grade_workers, timeout=task.grade_timeout, failed_reward=task.failed_reward
    )
    with grading as grader:
        shown = f"{len(asked)} problems × {'' if plan.full else 'up to '}{plan.rule.samples}"
        console.print(Text.assemble(("tenbit", "bold"), f"  {files.kept}  {shown}"), soft_wrap=True)
        done = done_rows(files, plan, asked)
        if done < len(asked):
            longest = plan.recipe.rollout.max_tokens + max(len(a.ids) for a in asked)
            precision = plan.recipe.precision
            with make_engine(plan.recipe.rollout, model, precision, plan.recipe.seed, longest) as engine:
                engine.load_weights(precision.to_engine(model.module.state_dict().items()), version=0)
                if not files.summary.exists():
                    write_atomic(files.summary, _json({"finished": False, "settings": settings}))
                policy = Policy(engine, model.tokenizer, grader, plan.recipe.eval_sampling(model.stop_token_ids))
                sample(plan, policy, name, asked, done, files, console)
    rows = [json.loads(line) for line in files.all.read_bytes().splitlines()]
    summary = summarise(plan, rows) | {"settings": settings}
    drawn = figure(summary)
    write_atomic(files.kept, b"".join(json.dumps(row).encode() + b"\n" for row in kept_rows(rows)))
    write_atomic(files.figure, drawn.encode())
    write_atomic(files.page, page(files.kept.stem, summary).encode("utf-8", "replace"))
    write_atomic(files.summary, _json(summary))
    return summary


def sample(
    plan: Plan, policy: Policy, name: str, asked: Sequence[Asked], done: int, files: Files, console: Console
) -> None:
    """Measures the problems from place `done` on and appends their rows, each chunk's on disk before the next."""
    recipe = plan.recipe
    gradings = Gradings(recipe.task.grader, len(asked) - done)
    with progress_bar(console) as progress, files.all.open("ab") as file:
        bar = progress.add_task(f"{recipe.rollout.engine} {recipe.precision.rollout.value}", total=len(asked))
        progress.advance(bar, done)
        for first in range(done, len(asked), plan.chunk):
            chunk = asked[first : first + plan.chunk]
            gradings = gradings.chunk()
            rows = measure(
                policy, chunk, plan.rule, (recipe.seed, "perfectible", name), first,
                least=plan.round, tick=lambda settled: progress.advance(bar, settled),
                hear=gradings.hear,
            )  # fmt: skip
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())


def refuse_taken(files: Files, resume: bool) -> None:
    """Raises ValueError where something would be overwritten, or there is nothing to go on with."""
    existing = files.existing()
    if existing and not resume:
        raise ValueError(
            f"--out {files.kept}: {', '.join(p.name for p in existing)} exist{'s' * (len(existing) == 1)} already. "
            "Add --resume to go on with it, remove it, or name another file"
        )
    if existing and not files.summary.exists():
        raise ValueError(
            f"--out {files.kept}: nothing here to resume ({files.summary.name} is missing, and "
            f"{', '.join(p.name for p in existing)} would be overwritten). Name another file"
        )


def done_rows(files: Files, plan: Plan, asked: Sequence[Asked]) -> int:
    """How many problems have their row, in whole chunks. What a killed run left after them is cut off.

    Raises ValueError for a row that is not this run's.
    """
    if not files.all.exists():
        return 0
    *lines, _torn = files.all.read_bytes().split(b"\n")
    if len(lines) > len(asked):
        raise ValueError(f"{files.all}: has more rows than there are problems. Restore the file, or remove it")
    for n, (line, a) in enumerate(zip(lines, asked, strict=False), 1):
        try:
            same = json.loads(line)["id"] == a.problem.id
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise ValueError(f"{files.all}:{n}: not the row of {a.problem.id}. Restore the file, or remove it")
    whole = len(lines) if len(lines) == len(asked) else len(lines) // plan.chunk * plan.chunk
    write_atomic(files.all, b"".join(line + b"\n" for line in lines[:whole]))
    return whole


@contextlib.contextmanager
def held(files: Files) -> Iterator[None]:
    """The files' names, locked, so that what is checked stays so; no trace is left if nothing was written."""
    folder = files.kept.parent
    new = [above for above in (folder, *folder.parents) if not above.exists()]
    fresh = not (folder / files.lock).exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / files.lock).touch()
    except OSError as error:
        raise ValueError(f"--out {files.kept}: cannot be written ({error.strerror}). Name another file") from None
    with locked(folder, files.lock):
        before = files.existing()
        try:
            yield
        finally:
            if files.existing() == before and (fresh or not before):
                (folder / files.lock).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    for made in new:
                        made.rmdir()


def settings_of(plan: Plan, asked: Sequence[Asked], model: loading.Model) -> dict[str, Any]:
    """What decides the rows: if any of this differs, they would not belong together."""
    own = {"low": plan.low, "high": plan.high, "round": plan.round, "chunk": plan.chunk}
    prints = {
        "problems": digest(a.problem.answer + repr(a.ids) for a in asked),
        "weights": fingerprint(model),
    }
    return json.loads(json.dumps(own | prints | flat(plan.recipe.tree())))


def check_settings(files: Files, settings: dict[str, Any]) -> None:
    """Raises ValueError naming what differs from the run that wrote the files."""
    try:
        before = json.loads(files.summary.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{files.summary}: not a summary ({error}). Restore it, or name another --out") from None
    differing = [key for key in sorted(before.keys() | settings.keys()) if before.get(key) != settings.get(key)]
    if differing:
        what = "; ".join(f"{key}: was {before.get(key)}, is {settings.get(key)}" for key in differing)
        raise ValueError(f"{files.kept}: --resume goes on with the same settings, but {what}. Name another --out")


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"
