"""The training loop, to be read in one sitting.

    for every step:   weights -> engine; sample; grade; advantages; batches     (when and how: sampler.py)
                      [score under theta' where the algorithm needs it]
                      for every gradient step: accumulate micro-batches; unscale, clip, update
                      [evaluate]; log; watch (watch.py); [checkpoint]; act on an alarm

It knows neither how the engine samples nor how the backend trains, nor how many ranks there are: each makes the same
batches and takes its share of them, statistics are gathered, and rank 0 writes. The mismatch is measured at the first
gradient step, where theta = theta' and what differs is numerics alone: on the scores that Equations 8 to 10 need
anyway, or on the first forward pass of Equations 5 to 7; it never costs a pass of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text
from torch import Tensor

from tenbit import algorithms, mismatch, routing, world
from tenbit.advantages import ADVANTAGES
from tenbit.algorithms import Algorithm
from tenbit.backends import LossFunction, StepStats
from tenbit.batching import Row, collate, micro_batches, split_evenly, totals
from tenbit.checkpoint import MOST_KEPT, Progress, load, step_of
from tenbit.clock import Clock
from tenbit.evaluate import evaluate
from tenbit.export import export, export_adapter
from tenbit.mismatch import Mismatch
from tenbit.models.experts import Routes, routed, routers
from tenbit.recipe import Recipe
from tenbit.rollout import Collected, rows
from tenbit.run import Run, open_run
from tenbit.runlog import write_atomic
from tenbit.sampler import Supply, apart_and_drift, deliver
from tenbit.types import Batch, EngineFailed, Stats, Totals, merge
from tenbit.watch import Alarm

ECHO = 0.5  # seconds: a terminal and a launcher may both pass on one Ctrl-C
STOPPING = b"\ntenbit: stopping when this step is done and saved; Ctrl-C again stops at once\n"
PATIENCE = b"tenbit: torchrun waits 30 seconds for it, or as many as TORCH_ELASTIC_SHUTDOWN_TIMEOUT said at the start\n"
DEPLOYED_OTHERWISE = (
    "model/ has ordinary weights: precision.fp32 and residual_scale are tenbit's way of computing with them. Other "
    "software that runs them in FP16 may overflow as before; there use BF16 or FP32 (docs/audit.md)"
)
Metrics = dict[str, float | int | None]
Update = tuple[list[Batch], Totals]


class Interrupted(Exception):
    """The user, or an alarm that pauses, asked the run to stop; a checkpoint is on disk. `folder` is the run's."""

    def __init__(self, folder: Path, step: int, why: str = "") -> None:
        super().__init__(f"stopped after step {step}; everything is saved in {folder}")
        self.folder = folder
        self.step = step
        self.why = why


class Halted(Exception):
    """An alarm ended the run for good, as ``watch.act = "stop"`` asks. The folder holds a model and a summary."""

    def __init__(self, folder: Path, step: int, why: str) -> None:
        super().__init__(f"ended after step {step}: {why}")
        self.folder = folder
        self.step = step
        self.why = why


def train(
    recipe: Recipe, out: Path | str | None = None, *, resume: bool = False, console: Console | None = None
) -> Path:
    """Runs a recipe to its end and returns the run folder. Raises ValueError for bad input, Interrupted on Ctrl-C
    and at an alarm that pauses, Halted at one that stops."""
    out = Path(out) if out is not None else None
    with (
        world.joined(),
        open_run(recipe, out, resume, console) as run,
        stop_requested() as stopping,
        saved_if_engine_fails(run),
    ):
        owed = agreed_alarm(run, [run.lookout.owed] if run.lookout and run.lookout.owed else [])
        if owed is not None:  # a run that was killed before it could
            act(run, owed)
        verify_precision(run)
        if run.progress.step == 0 and run.eval_sets:
            run.log.log(0, evaluate_now(run, Clock()))
        while run.progress.step < recipe.steps:
            step, clock = run.progress.step + 1, Clock()
            metrics = train_step(run, step, clock)
            stop = any(world.gather(stopping.is_set()))
            last = step == recipe.steps
            try:
                if run.eval_sets and (last or step % recipe.eval.every == 0):
                    metrics |= evaluate_now(run, clock)
            finally:  # an engine that dies while it evaluates leaves a step that was trained
                alarms = log(run, step, metrics | times(clock))
            alarm = agreed_alarm(run, alarms)
            stop = stop or (alarm is not None and alarm.action != "snapshot")
            if last or stop or (recipe.checkpoint.every and step % recipe.checkpoint.every == 0):
                save(run)
            if alarm is not None:
                act(run, alarm)
            if stop and not last:
                run.checkpoints.wait()
                raise Interrupted(run.folder, step)
        finish(run)
    return run.folder


@contextlib.contextmanager
def saved_if_engine_fails(run: Run) -> Iterator[None]:
    """Keeps what was trained when an engine dies: it works before a step's first update, never after."""
    try:
        yield
    except EngineFailed as error:
        step = run.progress.step
        if step and step != run.checkpoints.newest:
            save(run)
        run.checkpoints.wait()
        if not step:
            raise
        raise type(error)(f"{error}. The run is saved as it was after step {step}") from error


def save(run: Run) -> None:
    """A checkpoint of what is trained, and of what was sampled ahead of it."""
    with contextlib.suppress(Exception):  # of what is sampled ahead; what needs it will raise it
        run.sampler.settle()
    held, position = run.sampler.held()
    progress = run.progress if position is None else replace(run.progress, position=position)
    watched = run.lookout is not None and run.recipe.watch.act != "nothing"
    run.checkpoints.save(run.backend, progress, held, run.lookout.watch.healthy if run.lookout and watched else None)


def log(run: Run, step: int, metrics: Metrics) -> list[Alarm]:
    """A step's row, and the alarms it raises on rank 0. Waits for no other rank."""
    run.log.log(step, metrics)
    return run.lookout.see({"step": step, **metrics}) if run.lookout else []


def agreed_alarm(run: Run, alarms: Sequence[Alarm]) -> Alarm | None:
    """The alarm that all ranks act on: rank 0's."""
    if not run.recipe.watch.enabled or run.recipe.watch.act == "nothing":
        return None
    return world.first(lambda: next((alarm for alarm in alarms if alarm.action), None))


def act(run: Run, alarm: Alarm) -> None:
    """Keeps the newest checkpoint from before the trouble, or else one of now; and ends the run if that is asked.

    That it is done is put down last, so that a run killed on the way does it when it is resumed.
    """
    step, lookout = run.progress.step, run.lookout
    healthy = world.first(lambda: lookout.watch.healthy if lookout else 0)
    kept = run.checkpoints.keep(healthy, alarm.reason)
    when = "the last before this"
    if kept is None:
        when = "there is none from before this"
        if run.checkpoints.newest != step:
            save(run)
        kept = run.checkpoints.keep(step, alarm.reason)
        assert kept is not None  # it was just written
    gone = f"; no more: {', '.join(p.name for p in kept.given_up)} ({MOST_KEPT} at most)" if kept.given_up else ""
    run.log.console.print(f"{'':13}kept: {kept.path.relative_to(run.folder)}, {when}{gone}", soft_wrap=True)
    action = alarm.action if step < run.recipe.steps else "snapshot"
    if action == "stop":
        finish(run, kept.path, alarm)
    if lookout is not None:
        lookout.acted(alarm, action, step_of(kept.path))
    if action == "stop":
        raise Halted(run.folder, step, alarm.reason)
    if action == "pause":
        raise Interrupted(run.folder, step, alarm.reason)


def train_step(run: Run, step: int, clock: Clock) -> Metrics:
    """One policy iteration: sample under theta', then `optim.updates` gradient steps."""
    recipe, algorithm = run.recipe, run.recipe.algorithm.build()
    run.log.phase("sampling")
    supply = run.sampler.supply(step, clock)
    collected = supply.collected
    world.together(lambda: refuse_unknown_routes(run, collected))
    run.log.samples(step, [r for group in collected.sampled for r in group], recipe.log_samples)
    updates = make_updates(rows(collected.groups, ADVANTAGES[algorithm.advantage]), run)
    run.log.phase("training")
    measured: list[Mismatch] = []
    if algorithm.needs_old:
        with clock("proximal"):
            updates = score_old(run, updates, measured)
    stats: list[Stats] = []
    steps: list[StepStats] = []
    with clock("update"):
        for i, (batches, total) in enumerate(updates):
            at_theta_old = i == 0 and not algorithm.needs_old
            loss = loss_of(algorithm, total, measured if at_theta_old else None)
            for batch in batches:
                with routes_of(run, batch) as routes:
                    stats.append(run.backend.accumulate(batch, loss))
                if i == 0 and routes.chosen is not None and batch.experts is not None:  # at theta', as the mismatch
                    stats.append(routing.compare(routes.chosen.cpu(), batch.experts))
            if step == 1 and i == 0:
                recipe.precision.verify(run.backend.live())  # gradients; they are gone after the step
            steps.append(run.backend.step())
    if step == 1:
        recipe.precision.verify(run.backend.live())  # AdamW's moments; there were none before
    run.progress = Progress(step, supply.position)
    sampled_tokens = sum(r.completion.length for group in collected.sampled for r in group)
    return {
        **collected.metrics,
        **mismatch_metrics(supply, gathered(measured), step, algorithm),
        **summarise(merge(world.gather(merge(stats))), steps),
        **{f"grade/{kind}": n for kind, n in supply.failures.items()},
        **{f"ahead/{name}": seconds for name, seconds in supply.seconds.items()},
        "perf/tokens_per_second": sampled_tokens / clock.total,
    }


def gathered(measured: Sequence[Mismatch]) -> Mismatch:
    """What was measured on all ranks."""
    return sum(world.gather(sum(measured, Mismatch())), Mismatch())


def mismatch_metrics(supply: Supply, measured: Mismatch, step: int, algorithm: Algorithm) -> Metrics:
    """``mismatch/``: numerics alone. Ahead of training it is the small sample's, scored under the weights that sampled
    it; ``drift/`` is what the policy moved since, ``total/`` both at once, which is what corrections see.
    """
    two = apart_and_drift(supply)
    parts = {"mismatch": measured} if two is None else {"mismatch": two[0], "drift": two[1], "total": measured}
    lags = [step - 1 - r.completion.version for group in supply.collected.sampled for r in group]
    staleness = {} if two is None else {"staleness/mean": sum(lags) / len(lags), "staleness/max": max(lags)}
    named = {f"{part}/{k}": v for part, m in parts.items() for k, v in m.metrics(algorithm.cap).items()}
    return {**named, **staleness}


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


def refuse_unknown_routes(run: Run, collected: Collected) -> None:
    """Raises EngineFailed, on all ranks and before a step's first update, if there is nothing to replay."""
    if not run.recipe.rollout.replay:
        return
    known = [r.completion.experts for group in collected.groups for r in group]
    if any(experts is None or bool((experts[0] < 0).any()) for experts in known):  # of the first token
        raise EngineFailed(
            f"rollout.replay = true, but rollout.engine = {run.recipe.rollout.engine!r} did not say which experts it "
            "chose. Set rollout.replay = false, or rollout.engine = 'torch'"
        )


def routes_of(run: Run, batch: Batch) -> AbstractContextManager[Routes]:
    """A mixture's routing during a pass over this batch: seen, and replayed where the recipe says so."""
    return routed(routers(run.model.module), batch.experts if run.recipe.rollout.replay else None)


def score_old(run: Run, updates: Sequence[Update], measured: list[Mismatch]) -> list[Update]:
    """Adds log pi(y | theta') to every batch, before the first gradient step; so it is also what is measured."""
    scored = []
    for batches, total in updates:
        old = []
        for batch in batches:
            with routes_of(run, batch):
                old.append(run.backend.logprobs(batch).cpu())
        measured += [mismatch.measure(o, b.logp_rollout, b.mask) for o, b in zip(old, batches, strict=True)]
        scored.append(([b.with_old(o) for o, b in zip(old, batches, strict=True)], total))
    return scored


def loss_of(algorithm: Algorithm, total: Totals, measured: list[Mismatch] | None) -> LossFunction:
    """The loss of one gradient step's micro-batches; with a list, each one's mismatch is added to it on the way."""

    def loss(logp: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        if measured is not None:
            measured.append(mismatch.measure(logp, batch.logp_rollout, batch.mask))
        return algorithms.loss(algorithm, logp, batch, total)

    return loss


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
    """The current weights into the engine, with proof."""
    with clock("sync"):
        run.sampler.settle()
        deliver(run.engine, run.backend, run.recipe, run.canary, run.progress.step)


def evaluate_now(run: Run, clock: Clock) -> Metrics:
    """The evaluation sets under the current weights."""
    run.log.phase("evaluating")
    send_weights(run, clock)
    return {**evaluate(run.policy, run.eval_sets, run.recipe, clock)}


def verify_precision(run: Run) -> None:
    """Holds the plan against the weights of both sides, prints it and stores it."""
    send_weights(run, Clock())
    seen = run.recipe.precision.verify([*run.backend.live(), *run.engine.live()])
    run.log.show_plan(run.recipe.precision, seen)


def times(clock: Clock) -> Metrics:
    phases = {
        f"time/{name}": clock.seconds.get(name, 0.0) for name in ("rollout", "grade", "proximal", "update", "sync")
    }
    for name in ("eval", "wait", "rescore"):
        if name in clock.seconds:
            phases[f"time/{name}"] = clock.seconds[name]
    return {**phases, "time/step": clock.total}


def finish(run: Run, kept: Path | None = None, alarm: Alarm | None = None) -> None:
    """The final model and the summary of the run. Of a run that an alarm ended, the model is that of `kept`."""
    run.log.phase("exporting")
    stopped = {}
    if kept is not None and alarm is not None:
        if step_of(kept) != run.progress.step:
            load(kept, run.backend)
        stopped = {"stopped": alarm.tree(), "model_step": step_of(kept)}
    export(run.folder / "model", run.model, run.backend, run.recipe.precision)
    if run.model.adapter is not None:
        export_adapter(run.folder / "adapter", run.model, run.backend, run.recipe.model.path)
    if run.recipe.precision.alters:
        run.log.console.print(Text(DEPLOYED_OTHERWISE, style="dim"), soft_wrap=True)
    run.checkpoints.wait()  # a summary says that the run is finished
    done = {"steps": run.progress.step, "precision": run.recipe.precision.name, "algorithm": run.recipe.algorithm.name}
    done |= stopped
    if world.is_first():
        write_atomic(run.folder / "summary.json", json.dumps(done, indent=1).encode() + b"\n")


@contextlib.contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, and the step is finished first; a second Ctrl-C stops at once."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping  # signals belong to the main thread
        return
    before, first = signal.getsignal(signal.SIGINT), world.is_first()
    asked: list[float] = []

    def handle(number: int, frame: object) -> None:
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > ECHO:
            raise KeyboardInterrupt
        stopping.set()
        if len(asked) == 1 and first:
            os.write(2, STOPPING + (PATIENCE if world.size() > 1 else b""))

    signal.signal(signal.SIGINT, handle)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGINT, before)
