"""Sampling ahead of training: which weights sample what, what is measured of it, and what happens when something dies.

Most of it runs on `LocalPool`: the built-in engine in this process, behind the pool's own methods (`stage`, `install`,
`version`), so that a run takes a second. That a Ray pool gives the same run bit for bit is tested first.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

pytest.importorskip("ray", reason="pip install 'tenbit[ray]'")

from ranks import launch
from test_loop import saved_tensors

from tenbit import Recipe, mismatch, train
from tenbit import run as run_module
from tenbit.backends.single import SingleBackend
from tenbit.engines.choose import make_engine
from tenbit.engines.ray import RayEngine
from tenbit.loop import Interrupted
from tenbit.sampler import Ahead, _plain, _supply
from tenbit.types import EngineFailed, Overflow

pytestmark = pytest.mark.scaling
STEPS, CHUNK = 6, 6
TREE = {
    "steps": STEPS,
    "precision": "fp32",
    "task": {"data": "arithmetic", "limit": 12, "grader": "even:reward"},
    "rollout": {
        "engine": "ray",
        "prompts": 4,
        "samples": 3,
        "max_tokens": 24,
        "rescored": 5,
        "ray": {"engine": "torch", "engines": 1, "chunk": CHUNK},
    },
    "algorithm": {"name": "grpo-token-tis"},
    "optim": {"lr": 1e-3, "updates": 2, "token_budget": 400},
    "checkpoint": {"every": 1, "keep": 9},
}
GRADER = """
from pathlib import Path

def reward(problem, text):
    if Path(__file__).with_name("broken").exists():
        return float("nan")
    b = text.encode()
    return sum(x % 2 == 0 for x in b) / max(1, len(b))
"""


@pytest.fixture
def grader(monkeypatch, tmp_path):
    """A user's grader that a random model can please; with a file ``broken`` beside it, it breaks its word."""
    (tmp_path / "even.py").write_text(GRADER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def recipe(model_folder, grader):
    """recipe(2, eval__every=1) -> the small run with rollout.ahead = 2 and one key changed."""

    def make(ahead: int, **changes) -> Recipe:
        tree = json.loads(json.dumps(TREE))
        tree["model"] = {"path": str(model_folder())}
        for key, value in {"rollout__ahead": ahead, **changes}.items():
            *path, last = key.split("__")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value
        return Recipe.of(tree)

    return make


class Staged:
    """Weights in this process; `alive` are those that somebody still holds."""

    alive: ClassVar[weakref.WeakSet[Staged]] = weakref.WeakSet()

    def __init__(self, named):
        self.named = [(name, tensor.clone()) for name, tensor in named]
        Staged.alive.add(self)


class LocalPool:
    """The built-in engine, asked chunk by chunk as a pool's engines are. `on_generate(pool, prompts)` may misbehave."""

    wants = "model"

    def __init__(self, engine, on_generate):
        self._engine, self._on_generate = engine, on_generate
        self.version: int | None = None
        self.most_alive = 0
        self.calls = 0
        self.closed = False
        self._asked = threading.Lock()

    def stage(self, named):
        return Staged(named)

    def install(self, staged, version):
        self.load_weights(staged.named, version)

    def load_weights(self, named, version):
        self._engine.load_weights(named, version)
        self.version = version

    def generate(self, prompts, sampling):
        if len(prompts) > 1:  # the canary asks for one
            self.calls += 1
            self._on_generate(self, self.calls)
        self.most_alive = max(self.most_alive, len(Staged.alive))
        chunks = [prompts[i : i + CHUNK] for i in range(0, len(prompts), CHUNK)]
        with self._asked:
            if self.closed:
                raise EngineFailed("the pool of engines is closed")
            return [c for chunk in chunks for c in self._engine.generate(chunk, sampling)]

    def members(self):
        return [self]

    def close(self):
        with self._asked:  # an engine in this process cannot be ended in the middle of its work
            if not self.closed:
                self._engine.close()
            self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __getattr__(self, name):
        return getattr(self._engine, name)


@pytest.fixture
def local(monkeypatch):
    """local(f) makes runs use a `LocalPool` with that `on_generate`; the list gets every pool that was made."""
    made: list[LocalPool] = []

    def use(on_generate=lambda pool, call: None) -> list[LocalPool]:
        def make(rollout, *rest):
            inner = make_engine(rollout.model_copy(update={"engine": "torch"}), *rest)
            made.append(LocalPool(inner, on_generate))
            return made[-1]

        monkeypatch.setattr(run_module, "make_engine", make)
        return made

    return use


@pytest.fixture
def samplers(monkeypatch):
    """Every `Ahead` that a run made."""
    made: list[Ahead] = []

    def make(*args) -> Ahead:
        made.append(Ahead(*args))
        return made[-1]

    monkeypatch.setattr(run_module, "Ahead", make)
    return made


def go(wanted: Recipe, out: Path, **more) -> Path:
    return train(wanted, out, console=Console(file=io.StringIO()), **more)


def rows(folder: Path, without: tuple[str, ...] = ()) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("time/", "perf/", "ahead/", *without)
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in lines]


def versions(folder: Path) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], set()).add(row["version"])
    return found


def lagging(ahead: int, steps: int = STEPS) -> dict[int, set[int]]:
    return {n: {max(0, n - 1 - ahead)} for n in range(1, steps + 1)}


# --- which weights


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
def test_the_lag_is_exact_and_logged(recipe, local, tmp_path, ahead):
    local()
    out = go(recipe(ahead), tmp_path / "run")
    assert versions(out) == lagging(ahead)
    for row in rows(out):
        lag = min(row["step"] - 1, ahead)
        assert (row.get("staleness/mean"), row.get("staleness/max")) == ((lag, lag) if ahead else (None, None))
        assert any(name.startswith(("drift/", "total/")) for name in row) == bool(ahead)
    if ahead:
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        assert {"time/wait", "time/rescore", "ahead/rollout", "ahead/grade"} <= set(last)


def scored_by_transformers(folder: Path, masters: dict[str, torch.Tensor] | None, completions) -> list[torch.Tensor]:
    """log pi ``[T]`` by Hugging Face's own forward pass in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        if masters is not None:
            p.data = masters[f"master.{name}"].clone()
    model = model.double()
    found = []
    for c in completions:
        ids = torch.tensor([[*c.prompt_ids, *c.response_ids]])
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        found.append(torch.stack([logp[i - 1, ids[0, i]] for i in range(len(c.prompt_ids), ids.shape[1])]))
    return found


def measured(pi: list[torch.Tensor], mu: list[torch.Tensor]) -> dict[str, float]:
    parts = [mismatch.measure(p[None], q[None], torch.ones(1, len(p)).bool()) for p, q in zip(pi, mu, strict=True)]
    return sum(parts, mismatch.Mismatch()).metrics(2.0)


@pytest.mark.parametrize(("ahead", "precision"), [(1, "fp32"), (2, "fp16"), (2, "bf16")])
def test_numerics_and_drift_are_told_apart(recipe, local, tmp_path, ahead, precision):
    """Against Transformers, on the checkpoints of the weights that sampled and of those that were trained next.

    What was sampled for step n lies in the checkpoint of step n - 1. The learning rate is large, so is the drift.
    """
    local()
    wanted = recipe(ahead, precision=precision, rollout__rescored=12)
    out = go(wanted, tmp_path / "run")
    found = {row["step"]: row for row in rows(out)}
    numerics = {"fp32": 1e-9, "fp16": 1e-5, "bf16": 1e-3}[precision]
    assert all(row["mismatch/kl_k3"] < numerics for row in found.values())
    assert all(row["drift/kl_k3"] == row["drift/kl_k1"] == 0.0 for row in found.values() if row["step"] == 1)
    for step in (2, 4, 6):
        saved = {v: saved_tensors(out / "checkpoints" / f"step-{v:06d}") for v in {step - 1, step - 1 - ahead} if v > 0}
        held = torch.load(out / "checkpoints" / f"step-{step - 1:06d}" / "held.pt", weights_only=True)
        every = [r.completion for group in _supply(held[0]).collected.sampled for r in group]
        assert len(every) == 12
        version = max(0, step - 1 - ahead)
        assert {c.version for c in every} == {version}
        folder = Path(wanted.model.path)
        then = scored_by_transformers(folder, saved.get(version), every)
        now = scored_by_transformers(folder, saved.get(step - 1), every)
        mu = [c.logp for c in every]
        row = found[step]
        exact = {"fp32": 1e-4, "fp16": 0.03, "bf16": 0.25}[precision]
        for part, pi, other in (("drift", now, then), ("total", now, mu)):
            truth = measured(pi, other)
            assert truth["kl_k3"] > 20 * numerics
            assert row[f"{part}/kl_k3"] == pytest.approx(truth["kl_k3"], rel=exact)
            if precision != "bf16":
                assert row[f"{part}/logp_abs_max"] == pytest.approx(truth["logp_abs_max"], rel=exact, abs=2e-3)
                assert row[f"{part}/seq_logratio_std"] == pytest.approx(truth["seq_logratio_std"], rel=exact)
        assert row["correction/weight_mean"] != pytest.approx(1.0, abs=1e-6)  # it corrects for both


def test_the_mismatch_is_that_of_the_format_also_ahead(recipe, local, tmp_path):
    """Step 1 is on-policy whatever the lag: the same numbers as without one, drift none."""
    local()
    changes = {"precision": "bf16", "rollout__rescored": 12, "steps": 1}
    (plain,), (ahead,) = (rows(go(recipe(k, **changes), tmp_path / str(k))) for k in (0, 2))
    for name in ("kl_k3", "logp_abs_max", "seq_logratio_std", "pearson"):
        assert ahead[f"mismatch/{name}"] == pytest.approx(plain[f"mismatch/{name}"], rel=1e-3)
        assert ahead[f"total/{name}"] == plain[f"mismatch/{name}"]
    assert ahead["drift/kl_k3"] == 0.0
    common = {k: v for k, v in ahead.items() if k in plain and not k.startswith("mismatch/")}
    assert common == {k: v for k, v in plain.items() if not k.startswith("mismatch/")}


# --- at the same time


def test_sampling_and_training_go_on_at_the_same_time(recipe, local, tmp_path, monkeypatch):
    """Each of them waits, in its middle, for the other to be in its own."""
    training, sampling = threading.Event(), threading.Event()
    met = []

    def on_generate(pool, call):
        if call == 4:  # for step 4, under the weights of version 2
            sampling.set()
            met.append(training.wait(60))

    step = SingleBackend.step

    def slow_step(backend):
        if len(updates) == 4:  # the first update of step 3
            training.set()
            met.append(sampling.wait(60))
        updates.append(None)
        return step(backend)

    updates: list[None] = []
    monkeypatch.setattr(SingleBackend, "step", slow_step)
    local(on_generate)
    go(recipe(1), tmp_path / "run")
    assert met == [True, True]


def test_speed_decides_nothing(recipe, local, tmp_path, monkeypatch):
    local()
    usual = rows(go(recipe(2), tmp_path / "usual"))
    local(lambda pool, call: time.sleep(0.15))
    assert rows(go(recipe(2), tmp_path / "slow pool")) == usual
    local()
    step = SingleBackend.step
    monkeypatch.setattr(SingleBackend, "step", lambda backend: (time.sleep(0.05), step(backend))[1])
    assert rows(go(recipe(2), tmp_path / "slow training")) == usual


@pytest.mark.parametrize("ahead", [1, 2])
def test_an_evaluation_in_between_changes_nothing(recipe, local, tmp_path, ahead):
    local()
    usual = go(recipe(ahead, checkpoint__every=0), tmp_path / "usual")
    evals = {"eval__every": 2, "eval__data": ["arithmetic_test"], "eval__limit": 3, "checkpoint__every": 3}
    seen = go(recipe(ahead, **evals), tmp_path / "seen")
    found = rows(seen)
    assert [row["step"] for row in found if "eval/arithmetic_test/avg@1" in row] == [0, 2, 4, 6]
    assert rows(seen, without=("eval/",))[1:] == rows(usual)
    assert versions(seen) == lagging(ahead)


def test_dynamic_sampling_takes_more_from_the_stream_and_may_find_nothing(recipe, local, tmp_path):
    local()
    wanted = recipe(2, algorithm__name="dapo", task__grader="exact", rollout__max_rounds=3, steps=4)
    found = rows(go(wanted, tmp_path / "dull"))
    assert [(row["train/rounds"], row["train/kept_groups"]) for row in found] == [(3, 0)] * 4
    assert all("optim/grad_norm" not in row and row["mismatch/kl_k3"] < 1e-9 for row in found)


# --- going on


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_run_stopped_after_any_step_goes_on_as_if_it_had_not_been(recipe, local, tmp_path, monkeypatch, ahead):
    local(lambda pool, call: time.sleep(0.02))
    wanted = recipe(ahead, checkpoint__every=0)
    whole = go(wanted, tmp_path / "whole")
    stops = range(1, STEPS) if ahead == 2 else (3,)
    step, updates = SingleBackend.step, []

    def interrupted_step(backend):
        updates.append(None)
        os.kill(os.getpid(), signal.SIGINT)
        return step(backend)

    for stop in stops:
        out = tmp_path / f"stopped-{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(SingleBackend, "step", lambda b, n=stop: (interrupted_step if at_step(b, n) else step)(b))
            with pytest.raises(Interrupted, match=f"after step {stop}"):
                go(wanted, out)
        held = torch.load(out / "checkpoints" / f"step-{stop:06d}" / "held.pt", weights_only=True)
        assert len(held) == min(ahead, STEPS - stop)
        go(wanted, out, resume=True)
        assert rows(out) == rows(whole), stop
        assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert len(updates) == len(stops)


def at_step(backend: SingleBackend, step: int) -> bool:
    """Whether this is the first of the two updates of a step."""
    return backend.state().counts["updates"] == 2 * (step - 1)


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(recipe, local, tmp_path, monkeypatch, ahead):
    local()
    wanted = recipe(ahead, checkpoint__every=2, checkpoint__keep=1)
    whole = go(wanted, tmp_path / "whole")
    step = SingleBackend.step

    def crash(backend):
        raise MemoryError("no more")

    out = tmp_path / "crashed"
    for time_of_death in (2, 5):
        with monkeypatch.context() as patch:
            patch.setattr(SingleBackend, "step", lambda b, n=time_of_death: (crash if at_step(b, n) else step)(b))
            with pytest.raises(MemoryError):
                go(wanted, out, resume=out.exists())
    go(wanted, out, resume=True)
    assert rows(out) == rows(whole)


def test_more_steps_than_were_asked_for_at_first(recipe, local, tmp_path):
    """The first end has nothing sampled ahead, so the lag grows anew, as at the beginning."""
    local()
    go(recipe(2, steps=3), tmp_path / "run")
    go(recipe(2, steps=7), tmp_path / "run", resume=True)
    assert versions(tmp_path / "run") == {**lagging(2, 3), 4: {3}, 5: {3}, 6: {3}, 7: {4}}
    assert [row["staleness/max"] for row in rows(tmp_path / "run")] == [0, 1, 2, 0, 1, 2, 2]


def test_what_is_held_reads_back_as_it_was(recipe, local, samplers, tmp_path):
    """Also under dynamic sampling, where groups that are trained on are some of those that were sampled."""
    local()
    seen = []
    keep = Ahead.held

    def held(sampler):
        found = keep(sampler)
        seen.extend((sampler._ready[step], plain) for step, plain in zip(sorted(sampler._ready), found[0], strict=True))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ahead, "held", held)
        go(recipe(2, algorithm__name="dapo"), tmp_path / "run")
    assert seen
    for supply, plain in seen:
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        buffer.seek(0)
        again = _supply(torch.load(buffer, weights_only=True))
        assert [len(g) for g in again.collected.groups] == [len(g) for g in supply.collected.groups]
        assert all(any(g is s for s in again.collected.sampled) for g in again.collected.groups)
        for a, b in zip(again.collected.sampled, supply.collected.sampled, strict=True):
            for x, y in zip(a, b, strict=True):
                for name in ("problem", "text", "reward", "correct", "group"):
                    assert getattr(x, name) == getattr(y, name)
                assert x.completion.response_ids == y.completion.response_ids
                assert torch.equal(x.completion.logp, y.completion.logp)
        assert again.position == supply.position
        assert str(_plain(again)) == str(plain)


def test_weights_that_nobody_needs_are_let_go_of(recipe, local, samplers, tmp_path, monkeypatch):
    take = Ahead.supply
    snapshots = []

    def supply(sampler, step, clock):
        found = take(sampler, step, clock)
        snapshots.append(len(sampler._snapshots))
        return found

    monkeypatch.setattr(Ahead, "supply", supply)
    for ahead in (1, 2):
        snapshots.clear()
        pools = local(lambda pool, call: time.sleep(0.02))
        go(recipe(ahead, steps=10), tmp_path / str(ahead))
        assert pools[-1].most_alive <= ahead + 1
        assert max(snapshots) <= ahead + 1
        assert len(samplers[-1]._offers) == 0
        assert len(samplers[-1]._ready) == 0
        assert snapshots[-1] <= ahead
        assert not samplers[-1]._thread.is_alive()
    assert len(Staged.alive) == 0


# --- dying


@pytest.mark.parametrize(
    ("error", "caught"),
    [
        (EngineFailed("the pool is gone"), EngineFailed),
        (Overflow("weights of 1e9"), Overflow),
        (ValueError("no such answer"), ValueError),
        (SystemExit("3"), RuntimeError),
    ],
    ids=lambda e: getattr(e, "__name__", type(e).__name__),
)
@pytest.mark.parametrize("call", [1, 4])
def test_what_fails_in_the_thread_is_raised_by_the_run(recipe, local, samplers, tmp_path, error, caught, call):
    """Never a wait without end. What was trained before is there."""

    def on_generate(pool, number):
        if number == call:
            raise error

    local(on_generate)
    wanted = recipe(2)
    with pytest.raises(caught, match=str(error)):
        go(wanted, tmp_path / "run")
    assert not samplers[-1]._thread.is_alive()
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(1, call))
    local()
    go(wanted, tmp_path / "run", resume=True)
    assert rows(tmp_path / "run")[: call - 1] == found
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, STEPS + 1))
    late = versions(tmp_path / "run")  # what could not be sampled then is sampled under newer weights
    assert all(lagging(2)[n] <= late[n] or (call - 1 <= min(late[n]) < n) for n in late)
    for row in rows(tmp_path / "run"):
        assert {row["step"] - 1 - row["staleness/max"]} == late[row["step"]]


def test_a_grader_that_breaks_its_word_is_named(recipe, local, grader, tmp_path):
    def on_generate(pool, number):
        if number == 3:
            (grader / "broken").touch()

    local(on_generate)
    with pytest.raises(ValueError, match=r"even:reward.*finite number"):
        go(recipe(1), tmp_path / "run")


def test_an_engine_that_refuses_weights_ends_the_run_with_a_checkpoint(recipe, local, tmp_path, monkeypatch):
    """`stage` fails in the main thread, while the thread waits for weights: neither may wait for the other."""
    local()
    stage = LocalPool.stage

    def refuse(pool, named):
        if pool.calls == 4:
            raise EngineFailed("the store is full")
        return stage(pool, named)

    monkeypatch.setattr(LocalPool, "stage", refuse)
    with pytest.raises(EngineFailed, match=r"the store is full.*saved as it was after step [23]"):
        go(recipe(1, checkpoint__every=0), tmp_path / "run")
    monkeypatch.setattr(LocalPool, "stage", stage)
    go(recipe(1, checkpoint__every=0), tmp_path / "run", resume=True)
    local()
    go(recipe(1, checkpoint__every=0), tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_an_evaluation_that_fails_leaves_the_step_and_what_was_ahead(recipe, local, tmp_path, monkeypatch):
    local()
    evals = {"eval__every": 2, "eval__data": ["arithmetic_test"], "eval__limit": 3, "checkpoint__every": 0}
    whole = go(recipe(2, **evals), tmp_path / "whole")
    load = LocalPool.load_weights

    def refuse(pool, named, version):
        if version == 4:
            raise EngineFailed("it stopped working")
        load(pool, named, version)

    with monkeypatch.context() as patch:
        patch.setattr(LocalPool, "load_weights", refuse)
        with pytest.raises(EngineFailed, match="saved as it was after step 4"):
            go(recipe(2, **evals), tmp_path / "run")
    go(recipe(2, **evals), tmp_path / "run", resume=True)
    assert rows(tmp_path / "run", ("eval/",)) == rows(whole, ("eval/",))


def test_stopped_at_once_while_it_waits(recipe, local, samplers, tmp_path):
    """The second Ctrl-C: the main thread waits for responses, and the thread is in the middle of drawing them."""
    held_up = threading.Event()

    def on_generate(pool, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGINT)
            held_up.wait(60)

    local(on_generate)
    threading.Timer(2.5, held_up.set).start()  # as a closed Ray pool ends its calls
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        go(recipe(1, rollout__samples=4), tmp_path / "run")
    assert time.monotonic() - before < 20
    assert not samplers[-1]._thread.is_alive()


# --- on Ray


@pytest.fixture
def whole(recipe, local, tmp_path, monkeypatch):
    """The uninterrupted run, by `LocalPool`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "make_engine", lambda rollout, *rest: LocalPool(
            make_engine(rollout.model_copy(update={"engine": "torch"}), *rest), lambda pool, call: None))  # fmt: skip
        return go(recipe(2, rollout__ray__engines=2), tmp_path / "whole")


def killing(monkeypatch, call: int) -> list[int]:
    """From now on an engine of a Ray pool is killed (SIGKILL) in the middle of the pool's so manieth call."""
    killed: list[int] = []
    generate, calls = RayEngine.generate, []

    def kill(pool):
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for seat in pool._pool.seats:
                if seat.opened and seat.task is not None and seat.task.request == "generate":
                    killed.extend(map(int, re.findall(r"process (\d+)", seat.who)))
                    return os.kill(killed[-1], signal.SIGKILL)

    def then_kill(pool, prompts, sampling):
        calls.append(None)
        if len(calls) == call:
            threading.Thread(target=kill, args=(pool,), daemon=True).start()
        return generate(pool, prompts, sampling)

    monkeypatch.setattr(RayEngine, "generate", then_kill)
    return killed


def test_a_ray_pool_gives_the_same_run_also_when_an_engine_is_killed(cluster, recipe, whole, tmp_path, monkeypatch):
    """It may fill the cluster; so formats are compared by engines in this process, and no second pool is made."""
    killed = killing(monkeypatch, call=3)
    pools, start = [], RayEngine.__init__
    monkeypatch.setattr(RayEngine, "__init__", lambda pool, *args: (pools.append(None), start(pool, *args))[1])
    out = go(recipe(2, rollout__ray__engines=2, compare__precisions=["fp16", "bf16"]), tmp_path / "ray")
    assert [row["precision"] for row in json.loads((out / "mismatch.json").read_text())] == ["fp16", "bf16"]
    assert len(pools) == 1
    assert len(killed) == 1
    assert rows(out) == rows(whole)
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_a_ray_pool_that_is_gone_for_good_leaves_a_run_that_goes_on(cluster, recipe, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed = killing(patch, call=4)
        wanted = recipe(2, rollout__ray__engines=1, rollout__ray__restarts=0, rollout__max_tokens=200)
        with pytest.raises(EngineFailed, match=r"restarts = 0.*SIGKILL.*saved as it was after step \d"):
            go(wanted, tmp_path / "run")
        assert len(killed) == 1
    before = rows(tmp_path / "run")
    go(wanted, tmp_path / "run", resume=True)
    assert rows(tmp_path / "run")[: len(before)] == before
    assert len(rows(tmp_path / "run")) == STEPS


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tenbit", "train", *map(str, arguments)]


@pytest.mark.slow
def test_killed_at_any_moment_a_resumed_run_is_the_uninterrupted_one(recipe, whole, tmp_path):
    """SIGKILL of the whole run, Ray pool and all."""
    recipe(2, rollout__ray__engines=2).dump(tmp_path / "in.toml")
    threads = {"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}
    start: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | threads, "start_new_session": True}
    metrics = tmp_path / "killed" / "metrics.jsonl"
    arguments = [tmp_path / "in.toml", "--out", tmp_path / "killed"]
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **start)
    end = time.monotonic() + 60
    while time.monotonic() < end and (not metrics.exists() or metrics.read_text().count("\n") < 2):
        time.sleep(0.002)
    time.sleep(random.Random(3).uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert len(rows(tmp_path / "killed")) < STEPS, "it was too quick to be killed"
    last = subprocess.run(command(*arguments, "--resume"), capture_output=True, text=True, timeout=100, **start)
    assert last.returncode == 0, last.stderr
    assert rows(tmp_path / "killed") == rows(whole)


@pytest.mark.slow
def test_two_ranks_share_what_the_first_one_samples_ahead(recipe, whole, tmp_path, grader):
    recipe(2, rollout__ray__engines=2, checkpoint__every=3, steps=4).dump(tmp_path / "in.toml")
    path = f"{Path(__file__).parent}{os.pathsep}{grader}"
    arguments = ("-m", "tenbit", "train", tmp_path / "in.toml", "--out", tmp_path / "two")
    done = launch(2, *arguments, timeout=150, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert versions(tmp_path / "two") == lagging(2, 4)
    for one, two in zip(rows(whole), rows(tmp_path / "two"), strict=False):
        assert one["train/reward"] == pytest.approx(two["train/reward"], rel=1e-6)
        assert one["optim/grad_norm"] == pytest.approx(two["optim/grad_norm"], rel=1e-3)
        assert two["mismatch/kl_k3"] < 1e-9
        assert one["drift/kl_k3"] == pytest.approx(two["drift/kl_k3"], rel=1e-3, abs=1e-9)
        assert one["staleness/max"] == two["staleness/max"]
        if one["step"] == 1:
            assert one["optim/loss"] == pytest.approx(two["optim/loss"], rel=1e-4, abs=1e-6)
            assert one["optim/grad_norm"] == pytest.approx(two["optim/grad_norm"], rel=1e-5)
