"""A run's parts, put together and checked before anything is written: folder, model, data, engine, backend, log.

    with open_run(recipe, out, resume) as run: ...

Everything that can be wrong with a recipe, its files or its model is found here, before the folder is made; an
earlier run is never touched. A folder holds one run at a time (a lock file sees to it).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tenbit import checkpoint
from tenbit.backends.single import SingleBackend
from tenbit.canary import Canary
from tenbit.checkpoint import Progress
from tenbit.compare import compare
from tenbit.engines import Engine
from tenbit.engines.choose import make_engine
from tenbit.folder import check_same, choose_folder, locked, make_folder
from tenbit.models import loading
from tenbit.prompts import Asked, ask, ask_evals
from tenbit.recipe import Recipe
from tenbit.rollout import Policy, ProblemStream
from tenbit.runlog import RunLog, default_console, write_atomic
from tenbit.tasks.grading import open_grader
from tenbit.types import Overflow


@dataclass
class Run:
    """What the loop works with. `progress` is the only thing in it that changes."""

    recipe: Recipe
    folder: Path
    model: loading.Model
    policy: Policy
    backend: SingleBackend
    stream: ProblemStream
    eval_sets: dict[str, list[Asked]]
    log: RunLog
    canary: Canary
    progress: Progress

    @property
    def engine(self) -> Engine:
        return self.policy.engine


@contextlib.contextmanager
def open_run(recipe: Recipe, out: Path | None, resume: bool, console: Console | None = None) -> Iterator[Run]:
    """Checks everything, then makes or reopens the run folder. Raises ValueError with the remedy."""
    folder = choose_folder(recipe, out, resume)
    if resume:
        check_same(recipe, folder)
    console = console or default_console()
    model = loading.load(recipe.model, recipe.rollout.stop_tokens)
    train = ask(recipe.task.data, recipe, model, recipe.rollout.max_tokens, recipe.task.limit)
    evals = ask_evals(recipe, model)
    with contextlib.ExitStack() as stack:
        task = recipe.task
        grader = stack.enter_context(
            open_grader(
                task.grader, workers=task.grade_workers, timeout=task.grade_timeout, failed_reward=task.failed_reward
            )
        )
        longest = longest_asked(recipe, train, evals)
        engine = stack.enter_context(make_engine(recipe.rollout, model, recipe.precision, recipe.seed, longest))
        make_folder(folder)
        stack.enter_context(locked(folder))
        found = checkpoint.latest(folder / "checkpoints") if resume else None
        start = checkpoint.load_progress(found) if found else Progress()
        if resume and not found:
            console.print(f"{folder}: no checkpoint to resume from; starting at the beginning", soft_wrap=True)
        if start.step > recipe.steps:
            raise ValueError(
                f"{folder}: {start.step} steps are done already, more than steps = {recipe.steps}. Raise it"
            )
        recipe.dump(folder / "recipe.toml")  # first of all: it makes a folder one that can be resumed
        runlog = RunLog(folder, total_steps=recipe.steps, resume_step=start.step if resume else None, console=console)
        stack.enter_context(runlog)
        (folder / "summary.json").unlink(missing_ok=True)  # it says that a run is finished
        write_comparison(recipe, model, train, folder, runlog)
        backend = SingleBackend(
            model, recipe.precision, recipe.optim, recipe.rollout.temperature, recipe.steps * recipe.optim.updates
        )
        if found:
            backend.load(found)
        sampling = recipe.sampling(model.stop_token_ids)
        policy = Policy(engine, model.tokenizer, grader, sampling)
        stream = ProblemStream(train, recipe.seed, start.position)
        canary = Canary.of(train, model, recipe.precision, sampling, longest)
        yield Run(recipe, folder, model, policy, backend, stream, evals, runlog, canary, start)


def longest_asked(recipe: Recipe, train: Sequence[Asked], evals: Mapping[str, Sequence[Asked]]) -> int:
    """Tokens of the longest prompt and its longest response together: what an engine must have room for."""
    most = {"": recipe.rollout.max_tokens} | dict.fromkeys(evals, recipe.eval.max_tokens or recipe.rollout.max_tokens)
    return max(len(a.ids) + most[name] for name, asked in {"": train, **evals}.items() for a in asked)


def write_comparison(
    recipe: Recipe, model: loading.Model, asked: Sequence[Asked], folder: Path, runlog: RunLog
) -> None:
    """mismatch.json, before training, once: the formats of `compare` on the initial weights."""
    if not recipe.compare.precisions or (folder / "mismatch.json").exists():
        return
    runlog.phase("comparing formats")
    rows = []
    for name in recipe.compare.precisions:
        try:
            rows.append(compare(recipe, model, asked, name))
        except Overflow as error:  # of a format that the run itself may not use
            runlog.console.print(f"compare: {name} left out: {error}", soft_wrap=True)
    write_atomic(folder / "mismatch.json", json.dumps(rows, indent=1, allow_nan=False).encode() + b"\n")
