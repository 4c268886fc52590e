"""`tenbit evaluate`: avg@k, pass@k and maj@k of a model on the engine that will be deployed, and the deployment gap.

    plan = make_plan("runs/demo", data=["arithmetic_test"], samples=8, both=True)
    result = run(plan, Path("runs/mine"))           the content of evaluation.json

A folder holds what was asked (`recipe.toml`, `settings.json`), one row for each problem and token budget
(`problems.jsonl`, and `problems-train.jsonl` for the training policy), and the scores (`evaluation.json`). Rows are
appended chunk by chunk, each chunk on disk before the next one starts; a run that was killed goes on after its last
whole chunk and ends with the same files, byte for byte: every response has a seed of its own, and the batches, on
whose sizes rounding depends, are the same.

Several token budgets cost one sampling: a response is a function of its seed, so its first tokens are what a smaller
budget would have given (`evaluate.cut`); only what was cut is graded again.

The **deployment gap** (`--both`): training improves pi, the policy that the trainer computes; what is deployed is mu,
the engine's. Both answer the same problems, and the score of pi less the score of mu is what the difference costs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.text import Text

from tenbit.console import default_console, progress_bar
from tenbit.engines import Engine
from tenbit.engines.choose import make_engine
from tenbit.evaluate import Judged, cut, draw, judge
from tenbit.folder import check_same, choose_folder, holds_something, locked, make_folder
from tenbit.models import loading
from tenbit.precision import Precision
from tenbit.prompts import Asked
from tenbit.rollout import Policy
from tenbit.runlog import write_atomic
from tenbit.studies.evaluation_plan import OPTIONS, Plan, fit
from tenbit.studies.evaluation_scores import Rows, show, summarise
from tenbit.studies.gradings import Gradings
from tenbit.studies.options import said_in_options
from tenbit.tasks.grading import open_grader
from tenbit.types import Completion

RESPONSES_A_CHUNK = 512  # about so many, where the plan does not say: few enough to lose, enough to fill an engine


@dataclass(frozen=True)
class Side:
    """A policy that answers: mu, "rollout", as it will be deployed, or pi, "train", as the trainer computes it.

    `other_program` says that pi differs from mu by the program and not by the format.
    """

    name: Literal["rollout", "train"]
    precision: Precision
    other_program: bool = False

    @property
    def file(self) -> str:
        return "problems.jsonl" if self.name == "rollout" else "problems-train.jsonl"

    def words(self, plan: Plan) -> str:
        program = "transformers" if self.other_program else plan.recipe.rollout.engine
        return f"{program} {self.precision.rollout.value}"

    def open(self, plan: Plan, model: loading.Model, longest: int) -> Engine:
        """The engine, with the weights in it. Raises ValueError where it would be the other side once more.

        `longest` is the longest prompt and response together.
        """
        rollout = plan.recipe.rollout
        if self.other_program:
            from tenbit.engines.torch import TorchEngine

            engine: Engine = TorchEngine(
                model.module.config,
                self.precision,
                device=model.device,
                max_batch=rollout.max_batch,
                pad_token_id=model.pad_token_id,
                path="generic",
            )
        else:
            engine = make_engine(rollout, model, self.precision, plan.recipe.seed, longest)
        try:
            if plan.both and self.name == "rollout":
                _refuse_one_program(plan, engine)
            engine.load_weights(self.precision.to_engine(model.module.state_dict().items()), version=0)
        except BaseException:
            engine.close()
            raise
        return engine


def sides(plan: Plan) -> list[Side]:
    """mu, and with `both` pi: in the training format where that is another one, else by the trainer's own program."""
    precision = plan.recipe.precision
    deployed = Side("rollout", precision)
    if not plan.both:
        return [deployed]
    if precision.compute != precision.rollout:
        own = Precision.parse({"preset": precision.compute.value, "head": precision.head})
        return [deployed, Side("train", own)]
    return [deployed, Side("train", precision, other_program=True)]


def _refuse_one_program(plan: Plan, engine: Engine) -> None:
    if plan.recipe.precision.compute == plan.recipe.precision.rollout and getattr(engine, "path", "") == "generic":
        raise ValueError(
            "--both: the built-in engine runs this model through transformers' own forward pass, as the trainer does, "
            "and both formats are equal: the two policies are one. Use --engine vllm, or a pair of formats such as "
            "--precision bf16/fp16"
        )


# --- chunks: what is sampled at a time, and written before the next


@dataclass(frozen=True)
class Chunk:
    """Consecutive problems of one set; `first` is the place of the first one."""

    set: str
    first: int
    asked: Sequence[Asked]


def chunks_of(plan: Plan, sets: dict[str, list[Asked]]) -> list[Chunk]:
    size = chunk_size(plan)
    return [
        Chunk(name, first, asked[first : first + size])
        for name, asked in sets.items()
        for first in range(0, len(asked), size)
    ]


def chunk_size(plan: Plan) -> int:
    """Problems that are sampled at a time."""
    return plan.chunk or max(1, RESPONSES_A_CHUNK // plan.recipe.eval.samples)


def answer(plan: Plan, policy: Policy, chunk: Chunk) -> list[dict[str, Any]]:
    """The rows of a chunk: for each problem one a budget, in the order of the budgets."""
    recipe = plan.recipe
    drawn = draw(policy, chunk.asked, recipe.eval.samples, (recipe.seed, "eval", chunk.set), chunk.first)
    full = judge(policy, chunk.asked, drawn)
    judged = {plan.budgets[-1]: full}
    for budget in plan.budgets[:-1]:
        # A problem none of whose responses is cut has nothing new to grade.
        touched = [i for i, group in enumerate(drawn) if any(c.length > budget for c in group)]
        again = judge(policy, [chunk.asked[i] for i in touched], [[cut(c, budget) for c in drawn[i]] for i in touched])
        judged[budget] = list(full)
        for i, group in zip(touched, again, strict=True):
            judged[budget][i] = group
    return [
        _row(chunk.set, a, budget, judged[budget][i], [cut(c, budget) for c in drawn[i]], plan.texts)
        for i, a in enumerate(chunk.asked)
        for budget in plan.budgets
    ]


def _row(
    name: str, asked: Asked, budget: int, group: Sequence[Judged], drawn: Sequence[Completion], texts: bool
) -> dict[str, Any]:
    """`ids` is a checksum of a response's tokens: it shows whether two policies gave the same one."""
    samples = [asdict(j) | {"ids": digest(map(str, c.response_ids))} for j, c in zip(group, drawn, strict=True)]
    if not texts:
        for sample in samples:
            del sample["text"]
    p = asked.problem
    return {"set": name, "problem": p.id, "max_tokens": budget, "prompt": p.prompt, "answer": p.answer} | {
        "samples": samples
    }


def done_chunks(path: Path, plan: Plan, chunks: Sequence[Chunk]) -> int:
    """How many chunks the file holds whole. What a killed run left after them is cut off.

    Raises ValueError for a row that is not this evaluation's.
    """
    if not path.exists():
        return 0
    *lines, _torn = path.read_bytes().split(b"\n")
    expected = [
        (number, chunk.set, asked.problem.id, budget)
        for number, chunk in enumerate(chunks)
        for asked in chunk.asked
        for budget in plan.budgets
    ]
    if len(lines) > len(expected):
        raise ValueError(f"{path}: has more rows than the evaluation. Restore the file, or remove it")
    for n, (line, (_, *key)) in enumerate(zip(lines, expected, strict=False), 1):
        try:
            row = json.loads(line)
            same = [row["set"], row["problem"], row["max_tokens"]] == key
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise ValueError(f"{path}:{n}: not the row of problem {key[1]} of {key[0]}. Restore the file, or remove it")
    whole = expected[len(lines)][0] if len(lines) < len(expected) else len(chunks)
    kept = sum(number < whole for number, *_ in expected)
    write_atomic(path, b"".join(line + b"\n" for line in lines[:kept]))
    return whole


# --- the command


def run(plan: Plan, out: Path | None = None, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Samples, grades, writes and shows an evaluation; returns what is in evaluation.json.

    Raises ValueError with the remedy for bad input, before anything is written.
    """
    console = console or default_console()
    folder = choose_folder(plan.recipe, out, resume)
    with said_in_options(OPTIONS):
        model = loading.load(plan.recipe.model, plan.recipe.rollout.stop_tokens)
    plan, sets = fit(plan, model)
    settings = settings_of(plan, sets, model)
    chunks = chunks_of(plan, sets)
    longest = plan.budgets[-1] + max(len(a.ids) for asked in sets.values() for a in asked)
    task = plan.recipe.task
    grading = open_grader(
        task.grader, workers=task.grade_workers, timeout=task.grade_timeout, failed_reward=task.failed_reward
    )
    with grading as grader, held(folder):
        choose_folder(plan.recipe, folder, resume)  # once more: until now another process could have written here
        if resume:
            check_settings(plan, folder, settings)
        shown = f"{sum(map(len, sets.values()))} problems × {plan.recipe.eval.samples}"
        console.print(Text.assemble(("tenbit", "bold"), f"  {folder}  {shown}"), soft_wrap=True)
        for side in sides(plan):
            done = done_chunks(folder / side.file, plan, chunks) if resume else 0
            if done < len(chunks):
                with side.open(plan, model, longest) as engine:
                    start(folder, plan, settings)
                    policy = Policy(engine, model.tokenizer, grader, plan.recipe.eval_sampling(model.stop_token_ids))
                    sample(plan, side, policy, chunks[done:], folder, console)
        rows = {side.name: read(folder / side.file) for side in sides(plan)}
        result = summarise(plan, rows, {side.name: side.words(plan) for side in sides(plan)})
        write_atomic(folder / "evaluation.json", json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
    show(result, console)
    console.print(Text.assemble(("evaluation  ", "dim"), str(folder / "evaluation.json")), soft_wrap=True)
    return result


def sample(plan: Plan, side: Side, policy: Policy, chunks: Sequence[Chunk], folder: Path, console: Console) -> None:
    """Answers the chunks and appends their rows, each chunk's on disk before the next one is sampled."""
    gradings = Gradings(plan.recipe.task.grader, sum(len(c.asked) for c in chunks))
    with progress_bar(console) as progress, (folder / side.file).open("ab") as file:
        bar = progress.add_task(side.words(plan), total=sum(len(c.asked) for c in chunks))
        for chunk in chunks:
            rows = answer(plan, policy, chunk)
            gradings = gradings.chunk()
            gradings.hear((f"{r['set']}/{r['problem']}", s["failure"]) for r in rows for s in r["samples"])
            # Escapes keep it ASCII: half a surrogate pair in a model's text must not end an evaluation.
            file.write(b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
            progress.advance(bar, len(chunk.asked))


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder, made and locked; made away with again if nothing was written, as when an engine cannot start."""
    make_folder(folder)
    with locked(folder):
        try:
            yield
        finally:
            if not holds_something(folder):
                (folder / ".lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()


def start(folder: Path, plan: Plan, settings: dict[str, Any]) -> None:
    """What was asked, written before the first row; `recipe.toml` first, for it makes the folder one to resume."""
    plan.recipe.dump(folder / "recipe.toml")
    write_atomic(folder / "settings.json", json.dumps(settings, indent=1).encode() + b"\n")


def settings_of(plan: Plan, sets: dict[str, list[Asked]], model: loading.Model) -> dict[str, Any]:
    """What an evaluation is besides its recipe: if any of this differs, its rows would not belong together."""
    return {
        "max_tokens": list(plan.budgets),
        "both": plan.both,
        "texts": plan.texts,
        "chunk": chunk_size(plan),
        "problems": {name: digest(a.problem.answer + repr(a.ids) for a in asked) for name, asked in sets.items()},
        "weights": fingerprint(model),
    }


def check_settings(plan: Plan, folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError naming what differs from the evaluation that is in the folder."""
    path = folder / "settings.json"
    if not path.is_file():
        others = [p.name for p in folder.iterdir() if not p.name.startswith((".lock", "recipe.toml", path.name))]
        if others:
            raise ValueError(f"--out {folder}: holds no evaluation to resume (settings.json is missing). Name another")
        return  # killed before it was written, and so before the first row
    check_same(plan.recipe, folder)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}). Restore the file, or start anew with another --out") from None
    differing = [key for key in settings if before.get(key) != settings[key]]
    if differing:
        what = "; ".join(f"{key}: was {before.get(key)}, is {settings[key]}" for key in differing)
        raise ValueError(
            f"{folder}: --resume goes on with the same evaluation, but {what}. Start a new one with another --out"
        )


def digest(parts: Iterator[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def fingerprint(model: loading.Model) -> str:
    """Of all weights: their bits added up as whole numbers, which is quick, exact and the same on any device."""
    sums = {
        name: int(tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))
        for name, tensor in model.module.state_dict().items()
        if tensor.is_floating_point()
    }
    return digest(f"{name} {total}" for name, total in sorted(sums.items()))
