"""The training loop, to be read in one sitting.

    for every step:   weights -> engine; sample; grade; advantages; batches
                      [score under theta' where the algorithm needs it]
                      for every gradient step: accumulate micro-batches; unscale, clip, update
                      [evaluate]; log; [checkpoint]

It knows neither how the engine samples nor how the backend trains. The mismatch is measured at the first gradient
step, where theta = theta' and what differs is numerics alone: on the scores that Equations 8 to 10 need anyway, or
on the first forward pass of Equations 5 to 7; it never costs a pass of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import Tensor

from tenbit import algorithms, checkpoint, mismatch, world
from tenbit.advantages import ADVANTAGES
from tenbit.algorithms import Algorithm
from tenbit.backends import StepStats
from tenbit.batching import Row, collate, micro_batches, split_evenly, totals
from tenbit.clock import Clock
from tenbit.evaluate import evaluate
from tenbit.mismatch import Mismatch
from tenbit.recipe import Recipe
from tenbit.rollout import collect, rows
from tenbit.run import Run, open_run
from tenbit.runlog import write_atomic
from tenbit.types import Batch, Stats, Totals, merge

Metrics = dict[str, float | int | None]
Update = tuple[list[Batch], Totals]


class Interrupted(Exception):
    """The user asked the run to stop; a checkpoint is on disk. `folder` is the run's."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(f"stopped after step {step}; everything is saved in {folder}")
        self.folder = folder
        self.step = step


def train(
    recipe: Recipe, out: Path | str | None = None, *, resume: bool = False, console: Console | None = None
) -> Path:
    """Runs a recipe to its end and returns the run folder. Raises ValueError for bad input, Interrupted on Ctrl-C."""
    out = Path(out) if out is not None else None
    with open_run(recipe, out, resume, console) as run, stop_requested() as stopping:
        verify_precision(run)
        if run.progress.step == 0 and run.eval_sets:
            first = Clock()
            send_weights(run, first)
            run.log.log(0, evaluate(run.policy, run.eval_sets, recipe, first))
        while run.progress.step < recipe.steps:
            step = run.progress.step + 1
            clock = Clock()
            metrics = train_step(run, step, clock)
            if step == 1:  # now there are moments, too
                recipe.precision.verify([*run.backend.live(), *run.engine.live()])
            if run.eval_sets and (step % recipe.eval.every == 0 or step == recipe.steps):
                send_weights(run, clock)
                run.log.phase("evaluating")
                metrics |= evaluate(run.policy, run.eval_sets, recipe, clock)
            run.progress = replace(run.progress, step=step, position=run.stream.position)
            run.log.log(step, metrics | times(clock))
            due = recipe.checkpoint.every and step % recipe.checkpoint.every == 0
            if due or stopping.is_set() or step == recipe.steps:
                checkpoint.save(run.folder / "checkpoints", run.backend, run.progress, recipe.checkpoint.keep)
            if stopping.is_set() and step < recipe.steps:
                raise Interrupted(run.folder, step)
        finish(run)
    return run.folder


def train_step(run: Run, step: int, clock: Clock) -> Metrics:
    """One policy iteration: sample under theta', then `optim.updates` gradient steps."""
    recipe, algorithm = run.recipe, run.recipe.algorithm.build()
    send_weights(run, clock)
    failed_before = Counter(run.policy.grader.failures)
    run.log.phase("sampling")
    collected = collect(run.policy, run.stream, recipe, step, clock)
    run.log.samples(step, [r for group in collected.sampled for r in group], recipe.log_samples)
    updates = make_updates(rows(collected.groups, ADVANTAGES[algorithm.advantage]), run)
    run.log.phase("training")
    seen = Mismatch()
    if algorithm.needs_old:
        with clock("proximal"):
            updates, seen = score_old(run, updates)
    stats: list[Stats] = []
    steps: list[StepStats] = []
    with clock("update"):
        for i, (batches, total) in enumerate(updates):
            for batch in batches:
                at_theta_old = i == 0 and not algorithm.needs_old
                accumulated, here = accumulate(run, batch, algorithm, total, at_theta_old)
                stats.append(accumulated)
                seen += here
            if i == 0:
                recipe.precision.verify(run.backend.live())  # the gradients; they are gone after the step
            steps.append(run.backend.step())
    sampled_tokens = sum(r.completion.length for group in collected.sampled for r in group)
    return {
        **collected.metrics,
        **{f"mismatch/{k}": v for k, v in seen.metrics(run.recipe.algorithm.cap or 3.0).items()},
        **summarise(merge(stats), steps),
        **{f"grade/{kind}": n for kind, n in (run.policy.grader.failures - failed_before).items()},
        "perf/tokens_per_second": sampled_tokens / clock.total,
    }


def make_updates(groups: Sequence[list[Row]], run: Run) -> list[Update]:
    """Groups -> gradient steps -> micro-batches of this rank, each with the totals of its gradient step."""
    optim = run.recipe.optim
    updates = []
    for part in split_evenly(len(groups), optim.updates):
        chosen = [row for i in part for row in groups[i]]
        plan = micro_batches([r.length for r in chosen], optim.token_budget, world.size())[world.rank()]
        batches = [collate([chosen[i] for i in indices], run.model.pad_token_id) for indices in plan]
        updates.append((batches, totals(chosen, run.recipe.rollout.max_tokens)))
    return updates


def score_old(run: Run, updates: Sequence[Update]) -> tuple[list[Update], Mismatch]:
    """Adds log pi(y | theta') to every batch before the first gradient step; theta = theta', so it is also measured."""
    seen = Mismatch()
    scored = []
    for batches, total in updates:
        with_old = [batch.with_old(run.backend.logprobs(batch).cpu()) for batch in batches]
        for batch in with_old:
            assert batch.logp_old is not None
            seen += mismatch.measure(batch.logp_old, batch.logp_rollout, batch.mask)
        scored.append((with_old, total))
    return scored, seen


def accumulate(
    run: Run, batch: Batch, algorithm: Algorithm, total: Totals, at_theta_old: bool
) -> tuple[Stats, Mismatch]:
    """One micro-batch's gradient; where the weights are still those that sampled, its mismatch as well."""
    seen = Mismatch()

    def loss(logp: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        nonlocal seen
        if at_theta_old:
            seen = mismatch.measure(logp, batch.logp_rollout, batch.mask)
        return algorithms.loss(algorithm, logp, batch, total)

    return run.backend.accumulate(batch, loss), seen


def summarise(stats: Stats, steps: Sequence[StepStats]) -> Metrics:
    """Statistics of a step's gradient steps -> metrics. Without gradient steps there is nothing to say."""
    if not steps:
        return {"optim/skipped": 0}
    norms = [s.grad_norm for s in steps if s.grad_norm is not None]
    return {
        **{name: stat.mean for name, stat in stats.items() if name != "optim/loss"},
        "optim/loss": stats["optim/loss"].total / len(steps),
        "optim/grad_norm": sum(norms) / len(norms) if norms else None,
        "optim/lr": steps[-1].lr,
        "optim/loss_scale": steps[-1].loss_scale,
        "optim/skipped": sum(s.skipped for s in steps),
    }


def send_weights(run: Run, clock: Clock) -> None:
    """The masters, cast once by the plan, into the engine, under the next version number."""
    with clock("sync"):
        run.progress = replace(run.progress, version=run.progress.version + 1)
        run.engine.load_weights(run.recipe.precision.to_engine(run.backend.weights()), run.progress.version)


def verify_precision(run: Run) -> None:
    """Holds the plan against the tensors of both sides, prints it and stores it."""
    clock = Clock()
    version = run.progress.version
    send_weights(run, clock)
    run.progress = replace(run.progress, version=version)
    seen = run.recipe.precision.verify([*run.backend.live(), *run.engine.live()])
    run.log.show_plan(run.recipe.precision, seen)


def times(clock: Clock) -> Metrics:
    phases = {
        f"time/{name}": clock.seconds.get(name, 0.0) for name in ("rollout", "grade", "proximal", "update", "sync")
    }
    if "eval" in clock.seconds:
        phases["time/eval"] = clock.seconds["eval"]
    return {**phases, "time/step": clock.total}


def finish(run: Run) -> None:
    """The final model and the summary of the run."""
    run.log.phase("exporting")
    checkpoint.export(run.folder / "model", run.model, run.backend, run.recipe.precision)
    done = {"steps": run.progress.step, "precision": run.recipe.precision.name, "algorithm": run.recipe.algorithm.name}
    write_atomic(run.folder / "summary.json", json.dumps(done, indent=1).encode() + b"\n")


@contextlib.contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, and the step is finished first; a second Ctrl-C stops at once."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping  # signals belong to the main thread
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: object) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()
        os.write(2, b"\ntenbit: stopping when this step is done and saved; Ctrl-C again stops at once\n")

    signal.signal(signal.SIGINT, handle)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGINT, before)
