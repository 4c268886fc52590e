"""A run's parts, put together and checked before anything is written: folder, model, data, engine, backend, log.

    with open_run(recipe, out, resume) as run: ...

Everything that can be wrong with a recipe, its files or its model is found here, before the folder is made; an
earlier run is never touched. A folder holds one run at a time (a lock file sees to it). On several ranks all have a
`Run`; rank 0 alone touches the folder, and what goes wrong on one rank is raised on all.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tenbit import checkpoint, world
from tenbit.backends import Backend
from tenbit.backends.choose import check_backend, make_backend
from tenbit.canary import Canary
from tenbit.checkpoint import Checkpoints, Progress, step_of
from tenbit.compare import compare
from tenbit.engines import Engine
from tenbit.engines.choose import make_engine
from tenbit.engines.spread import pool_of, spread, team_of
from tenbit.folder import check_same, choose_folder, locked, make_folder
from tenbit.models import loading
from tenbit.models.experts import refuse_replay, unseen
from tenbit.models.lora import Adapter, described
from tenbit.prompts import Asked, ask, ask_evals
from tenbit.recipe import Recipe
from tenbit.rollout import Policy, ProblemStream
from tenbit.runlog import Log, NoLog, RunLog, default_console, write_atomic
from tenbit.sampler import Ahead, OnPolicy, Sampler
from tenbit.tasks.grading import Grader, open_grader
from tenbit.types import Overflow
from tenbit.watch import Lookout, cut_alarms

NO_CHECKPOINT = "no checkpoint to resume from; starting at the beginning"


@dataclass
class Run:
    """What the loop works with. `progress` is the only thing in it that changes."""

    recipe: Recipe
    folder: Path
    model: loading.Model
    policy: Policy
    backend: Backend
    sampler: Sampler
    eval_sets: dict[str, list[Asked]]
    log: Log
    canary: Canary
    checkpoints: Checkpoints
    progress: Progress
    lookout: Lookout | None = None  # on rank 0, if the recipe wants one

    @property
    def engine(self) -> Engine:
        return self.policy.engine


@contextlib.contextmanager
def open_run(recipe: Recipe, out: Path | None, resume: bool, console: Console | None = None) -> Iterator[Run]:
    """Checks everything, then makes or reopens the run folder. Raises ValueError with the remedy, on all ranks."""
    world.together(lambda: _refuse(recipe))
    folder = world.first(lambda: find_folder(recipe, out, resume))
    console = console or default_console()
    shared = world.size() > 1
    model = loading.load(recipe.model, recipe.rollout.stop_tokens, shared=shared, adapter=Adapter.of(recipe))
    world.together(lambda: refuse_replay(model.module) if recipe.rollout.replay else None)
    if resume:
        world.first(lambda: _refuse_other_base(recipe, folder, model.base))
    limit, longest = recipe.task.limit, recipe.rollout.max_tokens
    train = world.together(lambda: ask(recipe.task.data, recipe, model, longest, limit))
    evals = world.together(lambda: ask_evals(recipe, model))
    with contextlib.ExitStack() as stack:
        grader = stack.enter_context(world.together(lambda: make_grader(recipe)))
        longest = longest_asked(recipe, train, evals)
        engine = stack.enter_context(make_run_engine(recipe, model, longest))
        world.first(lambda: _take_folder(folder, stack))
        world.together(lambda: _see_folder(folder))
        start, found = world.first(lambda: _start(recipe, folder, resume, console))
        runlog = stack.enter_context(world.together(lambda: _open_log(recipe, folder, resume, start, console)))
        on_gpu_vllm = recipe.rollout.engine != "torch" and model.device.type == "cuda" and not recipe.rollout.replay
        if why := unseen(model.module, on_gpu_vllm):
            runlog.console.print(Text(f"routing/: not compared: {why}", style="dim"), soft_wrap=True)
        lookout = world.together(lambda: _open_lookout(recipe, folder, resume, start, console))
        world.first(lambda: write_comparison(recipe, model, train, folder, runlog))
        if recipe.lora is not None:
            about = Text(f"adapter  {described(model.module, recipe.lora)}", style="dim")
            world.first(lambda: console.print(about, soft_wrap=True))
        updates = recipe.steps * recipe.optim.updates
        temperature = recipe.rollout.temperature
        backend = make_backend(model, recipe.precision, recipe.optim, temperature, updates, recipe.backend)
        if found:
            checkpoint.load(found, backend)
        sampling = recipe.sampling(model.stop_token_ids)
        policy = Policy(engine, model.tokenizer, grader, sampling)
        stream = ProblemStream(train, recipe.seed, start.position)
        canary = Canary.of(train, model, recipe.precision, sampling, longest)
        sampler: Sampler = OnPolicy(policy, stream, recipe, backend, canary)
        if recipe.rollout.ahead:
            pool = pool_of(engine)
            alone = Policy(pool, model.tokenizer, grader, sampling, divided=False) if pool is not None else None
            held = checkpoint.load_held(found) if found and world.is_first() else None
            ahead = Ahead(alone, stream, recipe, backend, canary, model, start, held)
            sampler = stack.enter_context(contextlib.closing(ahead))
        newest = step_of(found) if found else None
        checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoint.keep, newest, model.base)
        yield Run(recipe, folder, model, policy, backend, sampler, evals, runlog, canary, checkpoints, start, lookout)
        checkpoints.wait()


def find_folder(recipe: Recipe, out: Path | None, resume: bool) -> Path:
    """The folder of a run. Raises ValueError for one that it may not have. Nothing is made yet."""
    try:
        folder = choose_folder(recipe, out, resume)
    except OSError as error:  # a name that is too long, a folder above it that may not be looked into
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}). Name another folder") from None
    if resume:
        check_same(recipe, folder)
    return folder


def _refuse(recipe: Recipe) -> None:
    """What this many ranks cannot do, before anything is loaded."""
    check_backend(recipe.backend, recipe.precision, loading.resolve_device(recipe.model.device))
    refuse_comparison(recipe)


def refuse_comparison(recipe: Recipe) -> None:
    if team_of(recipe.rollout) > 1 and recipe.compare.precisions:
        raise ValueError(
            "compare.precisions: formats are compared by an engine of rank 0's own, but this run's engines are spread "
            "over several ranks. Set compare.precisions = [], or start the recipe once in one process for it"
        )


def _take_folder(folder: Path, stack: contextlib.ExitStack) -> None:
    make_folder(folder)
    stack.enter_context(locked(folder))


def _see_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(
            f"--out {folder}: {socket.gethostname()} does not see the folder that rank 0 made. All nodes of a run "
            "need it under the same path, on a file system that they share"
        )


def _refuse_other_base(recipe: Recipe, folder: Path, base: str | None) -> None:
    _, found = find_start(recipe, folder, resume=True)
    if found:
        checkpoint.refuse_other_base(found, base, recipe.model.path)


def find_start(recipe: Recipe, folder: Path, resume: bool) -> tuple[Progress, Path | None]:
    """Where the run begins, and the checkpoint it goes on from. Raises ValueError where it cannot. Reads only."""
    found = checkpoint.latest(folder / "checkpoints") if resume else None
    start = checkpoint.load_progress(found) if found else Progress()
    if start.step > recipe.steps:
        raise ValueError(f"{folder}: {start.step} steps are done already, more than steps = {recipe.steps}. Raise it")
    return start, found


def _start(recipe: Recipe, folder: Path, resume: bool, console: Console) -> tuple[Progress, Path | None]:
    """Makes the folder that of this run."""
    start, found = find_start(recipe, folder, resume)
    if resume and not found:
        console.print(f"{folder}: {NO_CHECKPOINT}", soft_wrap=True)
    recipe.dump(folder / "recipe.toml")  # first of all: it makes a folder one that can be resumed
    (folder / "summary.json").unlink(missing_ok=True)  # it says that a run is finished
    return start, found


def _open_log(recipe: Recipe, folder: Path, resume: bool, start: Progress, console: Console) -> Log:
    if not world.is_first():
        return NoLog(console)
    return RunLog(folder, total_steps=recipe.steps, resume_step=start.step if resume else None, console=console)


def _open_lookout(recipe: Recipe, folder: Path, resume: bool, start: Progress, console: Console) -> Lookout | None:
    if not world.is_first():
        return None
    if resume:
        cut_alarms(folder, start.step)  # also of a run that is watched no more
    spec = recipe.watch
    if not spec.enabled:
        return None
    if recipe.steps < max(spec.window, spec.warmup):
        few = f"watch: {recipe.steps} steps are too few for watch.window = {spec.window}, watch.warmup = {spec.warmup}"
        console.print(Text(f"{few}; lower these for early warning in a run this short", style="dim"), soft_wrap=True)
    return Lookout.open(spec, folder, resume, console)


def make_grader(recipe: Recipe) -> Grader:
    task = recipe.task
    return open_grader(
        task.grader, workers=task.grade_workers, timeout=task.grade_timeout, failed_reward=task.failed_reward
    )


def make_run_engine(recipe: Recipe, model: loading.Model, longest: int) -> Engine:
    """The engine of a recipe, for all ranks together."""
    rollout = recipe.rollout
    return spread(
        lambda: make_engine(rollout, model, recipe.precision, recipe.seed, longest),
        pool=rollout.engine == "ray",
        team=team_of(rollout),
    )


def longest_asked(recipe: Recipe, train: Sequence[Asked], evals: Mapping[str, Sequence[Asked]]) -> int:
    """Tokens of the longest prompt and its longest response together: what an engine must have room for."""
    most = {"": recipe.rollout.max_tokens} | dict.fromkeys(evals, recipe.eval.max_tokens or recipe.rollout.max_tokens)
    return max(len(a.ids) + most[name] for name, asked in {"": train, **evals}.items() for a in asked)


def write_comparison(recipe: Recipe, model: loading.Model, asked: Sequence[Asked], folder: Path, runlog: Log) -> None:
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
