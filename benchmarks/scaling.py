"""What several ranks cost and give, on this machine's cores: ``python benchmarks/scaling.py``.

    weak scaling        the same work per process: alone, two processes that know nothing of each other, two FSDP2
                        ranks, two ZeRO-2 ranks, one thread each. Two strangers share the machine's memory and caches as
                        two ranks do, so what the ranks need beyond them is communication
    loss scale          `step` with the scale's agreement and without it, on the same masters
    weight update       bytes on the wire while every rank gathers all weights (the loopback device's own counter), and
                        the most memory that it takes besides what was there
    kill and resume     a rank of a real run is killed by SIGKILL: until the job has ended, until the resumed one has
                        done a step

Within one run all contestants take turns in the same processes; figures are medians of ratios within a round.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import EOS, PAD, small_qwen2, write
from transformers import Qwen2Config, Qwen2ForCausalLM

from tenbit import algorithms, world
from tenbit.algorithms import ALGORITHMS
from tenbit.backends import Backend
from tenbit.backends.choose import make_backend
from tenbit.backends.single import SingleBackend
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.recipe import BackendSpec, OptimSpec
from tenbit.types import Batch, Totals

RANKS, ROUNDS = 2, 9
ROWS, LENGTH, MICRO = 8, 256, 2  # sequences in a micro-batch, their tokens, micro-batches in a gradient step
ROOT = Path(__file__).parent.parent


def model_on(rank_zero_only: bool, module: Any = None) -> Model:
    module = (module or small_qwen2()).train()
    if rank_zero_only and not world.is_first():
        module.to("meta")
        module.tie_weights()
    tokenizer: Any = None  # nothing is decoded here
    return Model(module, tokenizer, (EOS,), PAD, LENGTH, torch.device("cpu"))


def backend_of(name: str, precision: str, module: Any = None, **spec: Any) -> Backend:
    plan, optim = Precision.parse(precision), OptimSpec.model_validate({"lr": 1e-6})
    if name == "single":
        return SingleBackend(model_on(False, module), plan, optim, 1.0, 1000)
    how = BackendSpec.model_validate({"name": name, **spec})
    return make_backend(model_on(True, module), plan, optim, 1.0, 1000, how)


def batch_of(seed: int) -> Batch:
    chance = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 2048, (ROWS, LENGTH), generator=chance)
    prompt = LENGTH // 4
    mask = torch.ones(ROWS, LENGTH - prompt, dtype=torch.bool)
    logp = torch.full(mask.shape, -7.6)
    return Batch(tokens, torch.full((ROWS,), prompt), mask, logp, torch.randn(ROWS, generator=chance))


def gradients(backend: Backend, micro: int = MICRO) -> None:
    """The backward passes of one gradient step."""
    how, total = ALGORITHMS["pg-is"], Totals(ROWS * micro * RANKS, ROWS * micro * RANKS * LENGTH, LENGTH)
    for i in range(micro):
        batch = batch_of(10 * world.rank() + i)
        backend.accumulate(batch, lambda logp, b: algorithms.loss(how, logp, b, total))


def seconds(act: Callable[[], object]) -> float:
    """Of the slowest rank; all begin together."""
    dist.barrier()
    start = time.perf_counter()
    act()
    return max(world.gather(time.perf_counter() - start))


def whole_step(backend: Backend) -> None:
    gradients(backend)
    backend.step()


def weak_scaling() -> dict[str, Any]:
    alone = backend_of("single", "fp16")
    strangers, fsdp = backend_of("single", "fp16"), backend_of("fsdp", "fp16")
    kept = backend_of("fsdp", "fp16", reshard=False)
    contestants: dict[str, Callable[[], object]] = {
        "one process": lambda: whole_step(alone) if world.is_first() else None,
        "two strangers": lambda: whole_step(strangers),
        "two ranks, fsdp": lambda: whole_step(fsdp),
        "two ranks, fsdp, weights kept until the step": lambda: whole_step(kept),
    }
    with contextlib.suppress(ValueError):  # not installed
        zero = backend_of("deepspeed", "fp16")
        contestants["two ranks, deepspeed stage 2"] = lambda: whole_step(zero)
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for act in contestants.values():
        act()
    for _ in range(ROUNDS):
        for name, act in contestants.items():
            taken[name].append(seconds(act))
    result: dict[str, Any] = {"milliseconds": {n: 1e3 * statistics.median(t) for n, t in taken.items()}}
    for name in [n for n in taken if n.startswith("two ranks")]:
        pairs = list(zip(taken[name], taken["two strangers"], taken["one process"], strict=True))
        result[name] = {
            "throughput of two ranks / one process": statistics.median(2 * one / t for t, _, one in pairs),
            "communication share": statistics.median(1 - apart / t for t, apart, _ in pairs),
        }
    return result


def loss_scale() -> dict[str, Any]:
    scaled, plain = backend_of("fsdp", "fp16"), backend_of("fsdp", "bf16")
    with_scale, without, backward = [], [], []
    for _ in range(4 * ROUNDS):
        backward.append(seconds(lambda: gradients(scaled, 1)))
        gradients(plain, 1)
        with_scale.append(seconds(scaled.step))
        without.append(seconds(plain.step))
    extra = [a - b for a, b in zip(with_scale, without, strict=True)]
    share = [e / (f + s) for e, f, s in zip(extra, backward, with_scale, strict=True)]
    return {
        "milliseconds of step": 1e3 * statistics.median(with_scale),
        "of which the scale": 1e3 * statistics.median(extra),
        "share of a gradient step of one micro-batch": statistics.median(share),
    }


def loopback() -> int:
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def resident(peak: bool) -> int:
    key = "VmHWM" if peak else "VmRSS"
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def weight_update() -> dict[str, Any]:
    config = Qwen2Config(
        vocab_size=32000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    backend = backend_of("fsdp", "fp16", Qwen2ForCausalLM(config))
    found: dict[str, Any] = {}
    for name in ("fp16", "fp32"):
        dtype = Precision.parse(name).sync.dtype
        sizes = {n: t.numel() * t.element_size() for n, t in backend.weights(dtype) if n != "lm_head.weight"}
        dist.barrier()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would serve unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, sent = resident(peak=False), loopback()
        took = seconds(lambda dtype=dtype: [None for _ in backend.weights(dtype)])
        dist.barrier()
        wire, extra = loopback() - sent, resident(peak=True) - before
        model = sum(sizes.values())
        found[name] = {
            "bytes of the weights": model,
            "bytes on the wire / (weights x (ranks - 1))": wire / (model * (RANKS - 1)),
            "largest tensor": max(sizes.values()),
            "peak extra memory / largest tensor": max(world.gather(extra)) / max(sizes.values()),
            "milliseconds": 1e3 * took,
        }
    return found


def on_ranks() -> None:
    torch.set_num_threads(1)
    with world.joined():
        found = {"weak scaling": weak_scaling(), "loss scale": loss_scale(), "weight update": weight_update()}
        if world.is_first():
            Path(sys.argv[2]).write_text(json.dumps(found))


# --- kill and resume


def ranks_of(parent: int) -> dict[int, int]:
    found = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes())
                if rank:
                    found[int(rank[1])] = int(folder.name)
    return found


def kill_and_resume() -> dict[str, float]:
    """The demo's recipe on two ranks; a checkpoint after every step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        metrics = out / "metrics.jsonl"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m"]
        train = ["tenbit", "train", "recipes/demo.toml", "steps=40", "checkpoint.every=1", "eval.every=0"]
        less = ["rollout.prompts=8", "rollout.samples=4", "compare.precisions=[]", "--out", str(out)]

        def start(*more: str) -> subprocess.Popen[bytes]:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen([*launch, *train, *less, *more], cwd=ROOT, env=env,
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

        def until(rows: int, process: subprocess.Popen[bytes]) -> float:
            begin = time.perf_counter()
            while not metrics.exists() or metrics.read_text().count("\n") < rows:
                assert process.poll() is None
                time.sleep(0.005)
            return time.perf_counter() - begin

        process = start()
        first = until(1, process)
        until(6, process)
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        killed = time.perf_counter()
        process.wait()
        ended = time.perf_counter() - killed
        done = metrics.read_text().count("\n")
        again = start("--resume")
        resumed = until(done + 1, again)
        again.kill()
        for pid in ranks_of(again.pid).values():
            os.kill(pid, signal.SIGKILL)
    return {
        "seconds from launch to the first step of a new run": first,
        "seconds from SIGKILL to the end of the job": ended,
        "seconds from launch to the first new step of the resumed run": resumed,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run([*launch, __file__, "ranks", str(out)], env=env, check=True)
        result = json.loads(out.read_text())
    result["kill and resume"] = kill_and_resume()
    print(json.dumps(result, indent=1))
    print(write("scaling", {"ranks": RANKS, "rows": ROWS, "tokens": LENGTH, "micro_batches": MICRO, **result}))


if __name__ == "__main__":
    on_ranks() if sys.argv[1:2] == ["ranks"] else main()
