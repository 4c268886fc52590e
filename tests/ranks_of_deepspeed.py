"""Run by torchrun: everything `test_backend_deepspeed.py` asks of N ranks, in one launch, for a launch takes seconds.

Its argument is a file with a state that SingleBackend was in, to go on from.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ranks
import torch
from common_training import fixed_rows, fresh_backend, one_step, trajectory

from tenbit import world
from tenbit.backends import Backend
from tenbit.backends.masters import MAX_SKIPS_IN_A_ROW
from tenbit.batching import collate
from tenbit.precision import Precision
from tenbit.types import Overflow

STAGES = (1, 2, 3)
BUDGET = 64
GROWS = {"preset": "fp16", "loss_scale": {"initial": 256.0, "interval": 2}}


def deepspeed(plan: Any, stage: int, **how: Any) -> Backend:
    return fresh_backend(plan, name="deepspeed", stage=stage, **how)


def masters(backend: Backend) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in backend.weights()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def merged_state(backend: Backend) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """All ranks' tensors together; that two ranks hold the same one would be waste."""
    state = backend.state()
    parts = world.gather({k: t.clone() for k, t in state.tensors.items()})
    assert sum(map(len, parts)) == len(set().union(*parts))
    return {k: t for part in parts for k, t in part.items()}, state.counts


def reader(tensors: dict[str, torch.Tensor]):
    def read(wanted: dict[str, torch.Tensor]) -> None:
        for name, place in wanted.items():
            assert place.shape == tensors[name].shape
            place.copy_(tensors[name])

    return read


def go_on(backend: Backend, start: int, stop: int) -> list[Any]:
    return [one_step(backend, fixed_rows(seed=i), BUDGET)[1] for i in range(start, stop)]


def overflows(backend: Backend, first: Any) -> dict[str, Any]:
    """After one clean step: spoilt on the last rank alone, clean."""
    before, (moments, counts) = masters(backend), merged_state(backend)
    last = world.rank() == world.size() - 1
    bad = one_step(backend, fixed_rows(seed=1), BUDGET, spoil=lambda i: last and i == 0)[1]
    after, (moments_after, counts_after) = masters(backend), merged_state(backend)
    steps = [first, bad, *go_on(backend, 1, 2)]
    return {
        "steps": steps,
        "unmoved": same(before, after) and same(moments, moments_after),
        "counts": (counts, counts_after),
        "moved": not same(after, masters(backend)),
    }


def never_clean(backend: Backend) -> dict[str, Any]:
    """A scale of 2 goes below 1, where DeepSpeed's own would end the run, and after 50 skips the run does end."""
    tensors, counts = merged_state(backend)
    few = {"loss_scale": 2.0, "clean_steps": 0, "skips_in_a_row": MAX_SKIPS_IN_A_ROW - 4}
    backend.restore({**counts, **few}, reader(tensors))
    scales, said = [], ""
    try:
        for _ in range(5):
            scales.append(one_step(backend, fixed_rows(), BUDGET, spoil=lambda i: True)[1].loss_scale)
    except Overflow as error:
        said = str(error)
    return {"scales": scales, "said": said}


def resumes(plan: Any, stage: int, file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two steps, a state, two more; then the same from the state, in a backend that had taken other steps.

    Those are two that go on from the state of one process, before any step of its own.
    """
    whole, other = deepspeed(plan, stage), deepspeed(plan, stage)
    go_on(whole, 0, 2)
    tensors, counts = merged_state(whole)
    steps = go_on(whole, 2, 4)
    over = takes_over(other, file)
    other.restore(counts, reader(tensors))
    again = go_on(other, 2, 4)
    bitwise = same(masters(whole), masters(other)) and steps == again
    return {"bitwise": bitwise, "tensors": tensors, "counts": counts, "weights": masters(whole)}, over


def takes_over(backend: Backend, file: str) -> dict[str, Any]:
    saved = torch.load(file)
    backend.restore(saved["counts"], reader(saved["tensors"]))
    at_once = masters(backend)
    copies = dict(backend.weights(Precision.parse(GROWS).compute.dtype))
    rounded = all(torch.equal(copies[n], at_once[n].to(copies[n].dtype)) for n in at_once)
    steps = go_on(backend, 2, 4)
    return {"at_once": at_once, "copies_follow": rounded, "steps": steps, "weights": masters(backend)}


def holds(backend: Any, precision: Precision) -> tuple[dict[str, Any], Any]:
    """What is alive, in which formats, and whether tied, buffered and cast tensors are what they should be."""
    found: dict[str, Any] = {"start": precision.verify(backend.live()), "weights at start": masters(backend)}
    one_step_without_update(backend, fixed_rows())
    found["before the step"] = precision.verify(backend.live())
    found["gradients"] = {n: t.clone().flatten() for part, n, t in backend.live() if part == "gradient"}
    first = backend.step()
    found["after the step"] = precision.verify(backend.live())
    full = masters(backend)
    found["names"] = set(full) == set(backend._module.state_dict())
    found["tied"] = torch.equal(full["lm_head.weight"], full["model.embed_tokens.weight"])
    found["tied still"] = backend._module.lm_head.weight is backend._module.model.embed_tokens.weight
    cast = {n: t.clone() for n, t in backend.weights(precision.compute.dtype)}
    found["cast"] = all(torch.equal(cast[n], t.to(cast[n].dtype)) for n, t in full.items())
    found["dtypes"] = {t.dtype for t in full.values()}
    found["buffers"] = {n: b.clone() for n, b in backend._module.named_buffers()}
    return found, first


def one_step_without_update(backend: Backend, rows: list[Any]) -> None:
    step, backend.step = backend.step, lambda: None  # type: ignore[method-assign]
    one_step(backend, rows, BUDGET)
    backend.step = step  # type: ignore[method-assign]


def snapshots(backend: Backend) -> dict[str, bool]:
    batch = collate(fixed_rows(), 257)
    old, kept = backend.logprobs(batch), backend.snapshot()
    go_on(backend, 0, 2)
    new, weights = backend.logprobs(batch), masters(backend)
    with backend.at(kept):
        then = backend.logprobs(batch)
    now = backend.logprobs(batch)
    found = {"then": torch.equal(then, old), "now": torch.equal(now, new), "moved": not torch.equal(new, old)}
    found["masters"] = same(weights, masters(backend))
    return found


def everything(file: str) -> dict[str, Any]:
    found: dict[str, Any] = {"trajectory": {}}
    for stage in STAGES:
        ways = [{"plan": plan} for plan in ("fp32", "fp16", GROWS)] + [{"plan": "fp32", "budget": 200}]
        if world.size() > 1:
            ways += [{"plan": "bf16"}]
            ways += [{"plan": plan, "checkpointing": True} for plan in ("fp32", "fp16")]
            ways += [{"plan": plan, "offload": True} for plan in ("fp32", "fp16")]
            ways += [{"plan": plan, "family": "llama"} for plan in ({"preset": "fp16", "head": "fp32"}, "fp32")]
        for way in ways:
            key = json.dumps({"stage": stage, **way})
            budget = way.pop("budget", BUDGET)
            found["trajectory"][key] = trajectory(deepspeed(stage=stage, **way), budget)
        for plan in ("fp32", "fp16", "bf16") if world.size() > 1 else ("fp16", "bf16"):
            backend = deepspeed(plan, stage)
            found["holds", plan, stage], first = holds(backend, Precision.parse(plan))
            found["overflow", plan, stage] = overflows(backend, first)
            if plan == "fp16":
                found["snapshot", stage] = snapshots(backend)
                found["never clean", stage] = never_clean(backend)
        if world.size() > 1:
            offloaded = deepspeed("fp16", stage, offload=True)
            found["holds offloaded", stage] = holds(offloaded, Precision.parse("fp16"))[0]
        found["resume", stage], found["take over", stage] = resumes(GROWS, stage, file)
    return found


torch.set_num_threads(1)
with world.joined():
    ranks.report(everything(sys.argv[1]))
