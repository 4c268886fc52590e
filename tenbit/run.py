"""A run's parts, put together and checked before anything is written: folder, model, data, engine, backend, log.

    with open_run(recipe, out, resume) as run: ...

Everything that can be wrong with a recipe, its files or its model is found here, before the folder is made; an
earlier run is never touched. A folder holds one run at a time (a lock file sees to it).
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tenbit import checkpoint
from tenbit.backends.single import SingleBackend
from tenbit.checkpoint import Progress
from tenbit.compare import compare, make_engine
from tenbit.engines import Engine
from tenbit.models import loading
from tenbit.recipe import Recipe
from tenbit.rollout import Asked, Policy, ProblemStream
from tenbit.runlog import RunLog, default_console, write_atomic
from tenbit.tasks.datasets import load_problems, shipped
from tenbit.tasks.grading import open_grader
from tenbit.tasks.templates import encode_prompt
from tenbit.types import Problem

log = logging.getLogger(__name__)
MAY_CHANGE = ("name", "steps", "log_samples", "checkpoint")  # on --resume, without making it another run


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
    progress: Progress

    @property
    def engine(self) -> Engine:
        return self.policy.engine


def choose_folder(recipe: Recipe, out: Path | None, resume: bool) -> Path:
    """`out`, or runs/NAME (runs/NAME-2, ...): a new folder, or the one to go on with. Nothing is made yet."""
    if out is None:
        first = Path("runs", recipe.name)
        others = (Path("runs", f"{recipe.name}-{n}") for n in itertools.count(2))
        taken = list(itertools.takewhile(Path.exists, itertools.chain([first], others)))
        free = Path("runs", f"{recipe.name}-{len(taken) + 1}") if taken else first
        out = taken[-1] if resume and taken else free
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: this is a file. Name a folder")
    if not holds_something(out):
        return out
    if not resume:
        raise ValueError(
            f"--out {out}: the folder is not empty. Add --resume to go on with its run, or name another one"
        )
    if not (out / "recipe.toml").is_file():
        raise ValueError(f"--out {out}: holds no run to resume (recipe.toml is missing). Name the run's folder")
    return out


def holds_something(folder: Path) -> bool:
    """Whether there is more than the lock of a start that came no further."""
    return folder.is_dir() and any(not p.name.startswith((".lock", "recipe.toml.tmp")) for p in folder.iterdir())


def check_same(recipe: Recipe, folder: Path) -> None:
    """A resumed run must be the same run. Raises ValueError naming the keys that differ."""
    if not (folder / "recipe.toml").is_file():
        return
    old, new = Recipe.load(folder / "recipe.toml").tree(), recipe.tree()
    free = MAY_CHANGE if recipe.optim.schedule == "constant" else tuple(k for k in MAY_CHANGE if k != "steps")
    differing = [k for k in sorted(old.keys() | new.keys()) if k not in free and old.get(k) != new.get(k)]
    if differing:
        what = "; ".join(f"{k}: was {old.get(k)}, is {new.get(k)}" for k in differing)
        raise ValueError(
            f"{folder}: --resume goes on with the same recipe, but {what}. Start a new run with another --out"
        )


def ask(source: str, recipe: Recipe, model: loading.Model, longest: int, limit: int | None) -> list[Asked]:
    """Loads problems and tokenises their prompts, once. Raises ValueError for one that does not fit the context."""
    task = recipe.task
    keys = {} if source in shipped() else {"problem_key": task.problem_key, "answer_key": task.answer_key}
    problems = load_problems(source, **keys, split=task.split, limit=limit)
    asked = [Asked(p, _encode(p, task.template, model)) for p in problems]
    room = model.context - longest
    budget = "rollout.max_tokens (eval.max_tokens for an evaluation set)"
    fitting = [a for a in asked if len(a.ids) <= room]
    if len(fitting) < len(asked) and not task.drop_long_prompts:
        worst = max(asked, key=lambda a: len(a.ids))
        raise ValueError(
            f"{worst.problem.id}: the prompt has {len(worst.ids)} tokens and the response up to {longest}; together "
            f"they exceed the model's context of {model.context}. Lower {budget}, or set task.drop_long_prompts = true "
            "to leave such problems out"
        )
    if not fitting:
        raise ValueError(f"{source}: no prompt fits the model's context of {model.context}. Lower {budget}")
    if len(fitting) < len(asked):
        log.warning(
            "%s: %d of %d prompts do not fit the context and are left out",
            source,
            len(asked) - len(fitting),
            len(asked),
        )
    return fitting


def _encode(problem: Problem, template: str, model: loading.Model) -> tuple[int, ...]:
    try:
        problem.prompt.encode()  # half a surrogate pair: JSON can write it and no tokenizer can read it
    except UnicodeEncodeError as error:
        raise ValueError(f"{problem.id}: the problem is not Unicode text: {error.reason}. Correct the row") from None
    return encode_prompt(template, problem.prompt, model.tokenizer)


def ask_evals(recipe: Recipe, model: loading.Model) -> dict[str, list[Asked]]:
    """The evaluation sets by the name that metrics have, or none if there is never an evaluation."""
    spec = recipe.eval
    own = {"problem_key": spec.problem_key, "answer_key": spec.answer_key, "split": spec.split}
    task = recipe.task.model_copy(update={k: v for k, v in own.items() if v is not None})
    recipe = recipe.model_copy(update={"task": task})
    sets: dict[str, list[Asked]] = {}
    for source in spec.data if spec.every else ():
        name = set_name(source)
        if name in sets:
            raise ValueError(f"eval.data: two sets would both be eval/{name} in the metrics. Rename one, or remove it")
        sets[name] = ask(source, recipe, model, spec.max_tokens or recipe.rollout.max_tokens, spec.limit)
    return sets


def set_name(source: str) -> str:
    """``folder/amc.jsonl`` -> ``amc``; ``owner/name:config`` -> ``name:config``."""
    name = source.rstrip("/").rpartition("/")[2]
    return name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".parquet")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder against a second process. Raises ValueError if one has it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is running here. Wait for it, or name another --out") from None
        yield


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
        engine = stack.enter_context(make_engine(recipe, model, recipe.precision))
        make_folder(folder)
        stack.enter_context(locked(folder))
        found = checkpoint.latest(folder / "checkpoints") if resume else None
        start = checkpoint.load_progress(found) if found else Progress()
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
        yield Run(recipe, folder, model, policy, backend, stream, evals, runlog, start)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written ({error.strerror}). Name another folder") from None


def write_comparison(
    recipe: Recipe, model: loading.Model, asked: Sequence[Asked], folder: Path, runlog: RunLog
) -> None:
    """mismatch.json, before training, once: the formats of `compare` on the initial weights."""
    if not recipe.compare.precisions or (folder / "mismatch.json").exists():
        return
    runlog.phase("comparing formats")
    rows = list(compare(recipe, model, asked))
    write_atomic(folder / "mismatch.json", json.dumps(rows, indent=1).encode() + b"\n")
