"""vLLM's experts: recorded, equal to what a pass over the sequence chooses, compared with the trainer's, replayed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_module
from test_moe import QUIET, asked, model_of, recipe, rows, watched

from tenbit import Recipe, train
from tenbit.engines.vllm import VllmEngine
from tenbit.engines.vllm_experts import Routing, _experts, _plain
from tenbit.precision import Precision
from tenbit.recipe import RolloutSpec
from tenbit.scoring import measured, score
from tenbit.types import Completion, EngineFailed, Sampling, merge

pytestmark = pytest.mark.vllm


def mixed_module() -> Any:
    """One dense layer, two with experts; vLLM's attention on CPUs wants heads of 32 and more."""
    return small_module("qwen3_moe", mlp_only_layers=[0], num_hidden_layers=3, head_dim=32)


def drawn_in(plan: str) -> list[Completion]:
    module, precision = mixed_module(), Precision.parse(plan)
    spec = RolloutSpec.model_validate({"engine": "vllm", "max_tokens": 40, "max_batch": 8})
    prompts = [*asked(16, longest=60)]
    prompts += [type(p)(p.ids, p.seed + 100) for p in prompts[:4]]  # twice: the second may come from a cache
    with VllmEngine(model_of(module), precision, spec, longest=128) as engine:
        engine.load_weights(precision.to_engine(module.state_dict().items()), 0)
        engine.generate(prompts[:4], Sampling(4))  # fills the prefix cache
        drawn = engine.generate(prompts, Sampling(40, stop_token_ids=(256,), experts=True))
        plain = engine.generate(prompts[:2], Sampling(4))
    assert all(c.experts is None for c in plain)
    return drawn


def test_vllm_says_which_experts_every_token_took():
    """FP32, a mixture with one dense layer: prompts, decoded tokens, rows that joined later, prompts asked twice."""
    module = mixed_module()
    seen = watched(module)
    drawn = drawn_in("fp32")
    for c in drawn:
        assert c.experts is not None
        assert c.experts.shape == (len(c.prompt_ids) + c.length - 1, 2, 2)
        with torch.no_grad():
            module(torch.tensor([[*c.prompt_ids, *c.response_ids]]))
        whole = torch.stack([seen[0], seen[1]], 1)[:-1]
        assert torch.equal(c.experts.long().sort(-1).values, whole.sort(-1).values)


def test_replay_lowers_the_mismatch_with_vllm():
    module = mixed_module()
    drawn = drawn_in("bf16")
    found: dict[bool, dict[str, Any]] = {}
    for replay in (False, True):
        tree = {"steps": 1, "precision": "bf16", "rollout": {"max_tokens": 40, "replay": replay}}
        scored = score(Recipe.of(tree), model_of(module), Precision.parse("bf16"), drawn)
        found[replay] = measured(scored).metrics() | {k: s.mean for k, s in merge(s.routing for s in scored).items()}
    print(json.dumps(found, indent=1))
    assert 0 < found[False]["routing/tokens_differ"] < 0.1
    assert found[True]["kl_k3"] < 0.5 * found[False]["kl_k3"]
    assert found[True]["logp_abs_max"] < found[False]["logp_abs_max"]


def test_a_run_with_vllm(model_folder, grader, tmp_path):
    out: Path = train(
        recipe(model_folder("qwen3_moe", head_dim=32), grader, engine="vllm"), tmp_path / "run", console=QUIET
    )
    for row in rows(out):
        assert 0 <= row["routing/tokens_differ"] < 0.1
        assert row["mismatch/logp_abs_max"] < 0.05


def test_what_was_recorded_crosses_to_another_process():
    """vLLM's own encoding between its processes; starting one more for it would take half a minute."""
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    chosen = torch.randint(0, 128, (9, 3, 2)).to(torch.int16)
    sent = [{"0-abcdefgh": _plain([(0, chosen[:5]), (3, chosen[3:])])}]
    (got,) = MsgpackDecoder().decode(MsgpackEncoder().encode(sent))
    assert torch.equal(_experts(got["0-abcdefgh"], 8), chosen[:8])
    with pytest.raises(EngineFailed, match="experts of 9 tokens where 10 were run"):
        _experts(got["0-abcdefgh"], 10)


def test_layers_without_experts_are_left_out_of_what_vllm_returns_by_itself():
    """On GPUs it numbers all decoder layers; this is how its array is read."""
    model = replace(model_of(mixed_module()), device=torch.device("cuda"))
    found = np.arange(7 * 3 * 2, dtype=np.uint8).reshape(7, 3, 2)
    drawn = SimpleNamespace(token_ids=[1, 2, 3], routed_experts=found)
    out = SimpleNamespace(prompt_token_ids=[5, 6, 7, 8], outputs=[drawn])
    (experts,) = Routing(model).end(Sampling(3, experts=True), [out], print)
    assert experts is not None
    assert experts.tolist() == found[:6, 1:].tolist()
