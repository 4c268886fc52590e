"""Run by torchrun: one vLLM over two ranks, against the model itself, and faults on one rank of them.

ranks_of_vllm.py equal MODEL...         tensor parallelism over both ranks, one model folder after another
ranks_of_vllm.py lost MODEL             the same, and one rank's sampling fails for itself
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import ranks
import torch
import torch.distributed as dist

from tenbit import world
from tenbit.engines import vllm_ranks
from tenbit.engines.choose import make_engine
from tenbit.engines.spread import spread, team_of
from tenbit.models import loading
from tenbit.precision import Precision
from tenbit.recipe import ModelSpec, RolloutSpec
from tenbit.types import EngineFailed, Prompt, Sampling

torch.set_num_threads(1)
PROMPTS = [Prompt(tuple((7 * i + j) % 256 for j in range(5 + 3 * i)), 100 + i) for i in range(5)]
SAMPLING = Sampling(16, temperature=0.8)


def opened(model):
    vllm = {"cache_gib": 0.05, "options": {"tensor_parallel_size": 2}}
    spec = RolloutSpec.model_validate({"engine": "vllm", "max_tokens": 32, "max_batch": 16, "vllm": vllm})
    return spread(lambda: make_engine(spec, model, Precision.parse("fp32"), 0, 128), False, team_of(spec))


def truth(module, prompt, response) -> torch.Tensor:
    """log mu by transformers' own forward in FP32 and a softmax in float64."""
    with torch.no_grad():
        logits = module(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()
    scores = (logits / SAMPLING.temperature).log_softmax(-1)
    return scores.gather(-1, torch.tensor(response)[:, None])[:, 0].float()


def caught(act) -> str:
    try:
        act()
    except (EngineFailed, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def named(module):
    return Precision.parse("fp32").to_engine(module.state_dict().items())


def moved(module):
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.2 * p.std().nan_to_num(0.1) * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return other


def samples(engine, module) -> dict:
    drawn = engine.generate(PROMPTS, SAMPLING)
    scored = engine.score([(c.prompt_ids, c.response_ids) for c in drawn], SAMPLING)
    expected = [truth(module, c.prompt_ids, c.response_ids) for c in drawn]
    return {
        "ids": [c.response_ids for c in drawn],
        "drawn_off": max(float((c.logp - e).abs().max()) for c, e in zip(drawn, expected, strict=True)),
        "scored_off": max(float((s - e).abs().max()) for s, e in zip(scored, expected, strict=True)),
    }


def faults(engine, module) -> dict[str, str]:
    """Each on the last rank alone."""
    here = world.rank() == world.size() - 1
    worker = engine.own._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    install = worker.tenbit_install

    def flipped(pairs):
        for name, tensor in pairs:
            if here and name == "model.layers.1.mlp.down_proj.weight":
                tensor = tensor.clone()
                tensor[:, tensor.shape[1] - 1].neg_()  # of the last rank's columns
            yield name, tensor

    worker.tenbit_install = lambda pairs: install(flipped(pairs))
    found = {"flipped": caught(lambda: engine.load_weights(named(module), 1))}
    found["after"] = caught(lambda: engine.generate(PROMPTS, SAMPLING))
    del worker.tenbit_install
    short = [(n, t) for n, t in named(module) if n != "model.norm.weight"]
    found["missing"] = caught(lambda: engine.load_weights(short, 1))
    engine.load_weights(named(module), 2)
    draw = engine.own.generate
    lies = [c.__class__(**{**vars(c), "response_ids": (1, 2)}) for c in draw(PROMPTS, SAMPLING)]
    engine.own.generate = lambda *_: lies if here else draw(*_)
    if here:
        draw(PROMPTS, SAMPLING)  # its team waits for it
    found["lying"] = caught(lambda: engine.generate(PROMPTS, SAMPLING))
    del engine.own.generate
    if here:
        worker.tenbit_install = dies
    found["broken"] = caught(lambda: engine.load_weights(named(module), 3))
    return found


def dies(*_, **__):
    raise RuntimeError("CUDA out of memory")


def lost(folder: str) -> None:
    """The other rank waits for this one within vLLM, where nothing but the end of the process can reach it."""
    vllm_ranks.PATIENCE = 2.0
    model = loading.load(ModelSpec(path=folder))
    with opened(model) as engine:
        engine.load_weights(named(model.module), 0)
        worker = engine.own._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        if world.rank() == 1:
            worker.model_runner.execute_model = dies
        engine.generate(PROMPTS, SAMPLING)


def equal(*folders: str) -> None:
    found = {}
    for folder in folders:
        model = loading.load(ModelSpec(path=folder))
        with opened(model) as engine:
            engine.load_weights(named(model.module), 0)
            what = found[Path(folder).name] = {"first": samples(engine, model.module)}
            newer = moved(model.module)
            engine.load_weights(named(newer), 1)
            what["newer"] = samples(engine, newer)
            reports = engine.own._installed
            what["held"] = [sum(p.numel for ps in r.parts.values() for p in ps) for r in reports]
            if folder == folders[-1]:
                what["faults"] = faults(engine, model.module)
        sum_of_ranks = torch.ones(1)
        dist.all_reduce(sum_of_ranks)  # the trainer's group outlives the engine
        what["ranks"] = float(sum_of_ranks)
    ranks.report(found)


with world.joined():
    {"equal": equal, "lost": lost}[sys.argv[1]](*sys.argv[2:])
