"""LoRA: gradients by hand in float64, the merge against PEFT, a base that nothing writes, both kinds of rollouts."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from common_training import fixed_rows, fresh_backend, fresh_model, one_step
from conftest import SIZES, small_config, small_module
from peft import PeftModel
from test_loop import QUIET, recipe, rows, saved_tensors
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tenbit import Recipe, train
from tenbit.algorithms import ALGORITHMS
from tenbit.backends.choose import make_backend
from tenbit.batching import collate
from tenbit.canary import Canary
from tenbit.engines.torch import TorchEngine
from tenbit.lora_spec import LoraSpec
from tenbit.models import loading
from tenbit.models.lora import Adapter, is_adapter, linears, plain, targets
from tenbit.precision import Format, Precision
from tenbit.prompts import Asked
from tenbit.recipe import BackendSpec, ModelSpec, OptimSpec
from tenbit.sampler import deliver
from tenbit.studies import plan_memory
from tenbit.studies.plan_memory import Trainer
from tenbit.studies.plan_model import Shape
from tenbit.types import Overflow, Problem, Sampling, Undelivered

LORA = {"rank": 4, "alpha": 8}
ONCE = OptimSpec.model_validate({"lr": 1e-2})


def adapter_of(plan="fp32", seed=0, **spec) -> Adapter:
    return Adapter(LoraSpec(**{**LORA, **spec}), seed, Precision.parse(plan).compute)


def held(backend, share="parts") -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in backend.weights(None, share)}


def by_hand(parts: dict[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
    """W + s B A in float64, under the model's own names."""
    out = {}
    for name, tensor in parts.items():
        if ".lora_" in name:
            continue
        key, value = name.replace(".base_layer", ""), tensor.double()
        layer = name.removesuffix(".base_layer.weight")
        if f"{layer}.lora_A.default.weight" in parts:
            a, b = (parts[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
            value = value + scaling * (b @ a)
        out[key] = value
    return out


def logp_by_hand(module, weights, sequences) -> list[torch.Tensor]:
    """log pi of each response's tokens by the plain model in float64, with these weights in it."""
    own = {n: weights[n] for n, _ in module.named_parameters()}  # tied weights under one name
    out = []
    for prompt, response in sequences:
        ids = torch.tensor([[*prompt, *response]])
        logits = torch.func.functional_call(module, own, kwargs={"input_ids": ids}).logits[0]
        logp = F.log_softmax(logits[len(prompt) - 1 : -1], -1)
        out.append(logp.gather(-1, torch.tensor(response)[:, None])[:, 0])
    return out


# --- the mathematics


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_gradients_of_both_factors_are_those_of_w_plus_s_b_a_in_float64(family):
    backend = fresh_backend("fp32", family, lora=LORA)
    sequences = [(r.rollout.completion.prompt_ids, r.rollout.completion.response_ids) for r in fixed_rows(5)]
    batch = collate(fixed_rows(5), 257)
    backend.accumulate(batch, lambda logp, b: (-(logp * b.mask).sum(), {}))
    got = {name: p.grad for name, p in backend.inner._module.named_parameters() if p.grad is not None}

    parts = held(backend)
    leaves = {n: t.double().requires_grad_() for n, t in parts.items() if is_adapter(n)}
    module = small_module(family).double()
    weights = by_hand({**parts, **leaves}, LORA["alpha"] / LORA["rank"])
    (-torch.cat(logp_by_hand(module, weights, sequences)).sum()).backward()
    assert got.keys() == leaves.keys(), "the adapter alone is trained"
    for name, leaf in leaves.items():
        assert float(leaf.grad.norm()) > 0, name
        off = float((got[name].double() - leaf.grad).norm() / leaf.grad.norm())
        assert off < 1e-5, name


def test_the_merge_is_pefts_own_in_fp32():
    model = fresh_model("llama", adapter=adapter_of())
    merged = dict(model.adapter.merged(model.module.state_dict().items()))
    assert merged.keys() == small_module("llama").state_dict().keys()
    for name, layer in model.module.named_modules():
        if hasattr(layer, "get_delta_weight"):
            theirs = layer.base_layer.weight + layer.get_delta_weight("default")
            torch.testing.assert_close(merged[f"{name}.weight"], theirs, rtol=0, atol=1e-7)
            assert not torch.equal(theirs, layer.base_layer.weight)


@pytest.mark.parametrize("plan", ["fp16", "bf16"])
def test_what_is_rolled_out_is_rounded_once(plan):
    """From the FP32 factors, not from their 16-bit copies."""
    backend, form = fresh_backend(plan, lora=LORA), Format(plan).dtype
    parts = held(backend)
    coarse = {n: t.to(form).float() if is_adapter(n) else t for n, t in parts.items()}
    exact, worse = by_hand(parts, 2.0), by_hand(coarse, 2.0)
    same = other = total = 0
    for name, tensor in backend.weights(form):
        assert tensor.dtype == form
        same += int((tensor == exact[name].to(form)).sum())
        other += int((tensor == worse[name].to(form)).sum())
        total += tensor.numel()
    assert same / total > 0.9999, "FP32's own rounding decides a tie here and there"
    assert other < same


def test_pitfall_25_the_base_is_rounded_once_and_never_written():
    model = fresh_model(adapter=adapter_of("fp16"))
    backend = make_backend(model, Precision.parse("fp16"), ONCE, 1.0, 20, BackendSpec())
    before = {n: t for n, t in held(backend).items() if not is_adapter(n)}
    original = small_module().state_dict()
    for name, tensor in plain(before.items()):
        assert torch.equal(tensor.half().float(), tensor.float()), "the trainer holds the very numbers"
        assert torch.equal(tensor.float(), original[name].half().float())
    first = held(backend, "model")
    for i in range(20):
        one_step(backend, fixed_rows(seed=i), 400)
        for _ in backend.weights(torch.float16):
            pass  # merged for a rollout, at every update
    after = held(backend)
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert any(not torch.equal(t, first[n]) for n, t in backend.weights())
    assert all(torch.equal(t, dict(backend.weights())[n]) for n, t in backend.weights()), "afresh, so always alike"


def test_it_begins_as_the_base_and_its_seed_decides_the_rest():
    one, two, other = (dict(injected(seed).named_parameters()) for seed in (0, 0, 1))
    factors = [n for n in one if ".lora_A" in n]
    assert len(factors) == 14
    assert all(torch.equal(one[n], two[n]) and not torch.equal(one[n], other[n]) for n in factors)
    assert all(0.5 < float(one[n].detach().abs().max()) * math.sqrt(one[n].shape[1]) <= 1 for n in factors)
    assert not any(t.any() for n, t in one.items() if ".lora_B" in n)
    assert {p.dtype for p in one.values()} == {torch.float32}
    ids = torch.arange(9)[None]
    assert torch.equal(injected(0)(ids).logits, small_module("llama")(ids).logits)


def injected(seed, meta=False):
    module = small_module("llama")
    if meta:
        module.to("meta")
    state = torch.get_rng_state()
    adapter_of(seed=seed).inject(module)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers change"
    return module


def test_on_meta_it_has_the_same_names_and_shapes():
    here, there = injected(0), injected(0, meta=True)
    assert {n: p.shape for n, p in here.named_parameters()} == {n: p.shape for n, p in there.named_parameters()}
    assert {p.device.type for p in there.parameters()} == {"meta"}
    assert {n for n, p in here.named_parameters() if p.requires_grad} == {
        n for n in dict(here.named_parameters()) if is_adapter(n)
    }


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_moves_the_adapter(name):
    backend = fresh_backend("fp16", lora=LORA)
    before = held(backend)
    _, step = one_step(backend, fixed_rows(), 400, name)
    assert not step.skipped
    assert step.grad_norm > 0
    moved = {n for n, t in backend.weights(None, "parts") if not torch.equal(t, before[n])}
    assert moved == {n for n in before if is_adapter(n)}


# --- targets


def test_targets_are_all_linear_layers_but_the_head():
    module = small_module("llama")
    assert len(linears(module)) == 2 * 7
    assert "lm_head" not in linears(module)
    assert targets(module, ("q_proj", "layers.1.mlp.up_proj")) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"'q_prj'.*There are: down_proj, .*q_proj"):
        targets(module, ("q_prj", "v_proj"))
    with pytest.raises(ValueError, match="'lm_head'"):
        targets(module, ("lm_head",))


def test_of_a_mixture_the_attention_alone_has_one():
    sizes = {**SIZES, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    module = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes))
    assert {name.rpartition(".")[2] for name in linears(module)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_base_that_does_not_fit_is_refused():
    module = small_module()
    module.model.layers[0].mlp.up_proj.weight.data[0, 0] = 70000.0
    with pytest.raises(Overflow, match=r"layers\.0\.mlp\.up_proj\.weight' does not fit 'fp16'"):
        adapter_of("fp16").inject(module)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"dropout": 0.1}}, "there is no key 'lora.dropout'"),
        ({"lora": {"rnk": 8}}, "did you mean 'rank'"),
        ({"lora": {"targets": "q_proj"}}, r"\['q_proj'\]"),
        ({"lora": {"targets": []}}, "nothing would be trained"),
        ({"lora": {"rollout": "adapter", "alpha": 48}, "rollout": {"max_tokens": 8, "engine": "vllm"}}, "two only"),
        ({"lora": {"rollout": "adapter"}, "precision": "fp16/fp16~4"}, "lora.rollout = 'merged'"),
        (
            {"lora": {"rollout": "adapter"},
             "rollout": {"max_tokens": 8, "engine": "vllm", "vllm": {"options": {"tensor_parallel_size": 2}}}},
            "lora.rollout = 'merged'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe.of({"steps": 1, "rollout": {"max_tokens": 8}, **changes})


def test_the_papers_numbers_are_the_defaults():
    found = Recipe.of({"steps": 1, "rollout": {"max_tokens": 8}, "lora": {}}).lora
    assert found is not None
    assert (found.rank, found.alpha, found.scaling, found.targets, found.rollout) == (32, 64, 2, "all-linear", "merged")


# --- rollouts

SEQUENCES = [((5, 6, 7), tuple(range(40, 90))), ((9,), (1, 2, 3)), (tuple(range(100)), tuple(range(20)))]


def pair(plan, rollout, **fields):
    """(backend, engine) of one small model, after the adapter was made to matter."""
    precision = Precision.parse(plan if not fields else {"preset": plan, **fields})
    adapter = Adapter(LoraSpec(rollout=rollout, **LORA), 0, precision.compute)
    model = fresh_model("llama", adapter=adapter)
    engine = TorchEngine(small_config("llama"), precision, pad_token_id=257, adapter=adapter if adapter.apart else None)
    return make_backend(model, precision, ONCE, 1.0, 9, BackendSpec()), engine


def send(backend, engine, precision, version=0):
    engine.load_weights(precision.to_engine(backend.weights(precision.sync.dtype, engine.wants)), version)


def apart(backend, engine) -> float:
    """The largest difference of log pi and log mu over some tokens."""
    from tenbit.batching import ungraded
    from tenbit.types import Completion

    batch = collate([ungraded(Completion(p, r, torch.zeros(len(r)), "length")) for p, r in SEQUENCES], 257)
    pi = backend.logprobs(batch)
    mu = engine.score(SEQUENCES, Sampling(1))
    return max(float((pi[i][: len(m)] - m).abs().max()) for i, m in enumerate(mu))


@pytest.mark.parametrize("rollout", ["merged", "adapter"])
@pytest.mark.parametrize(("plan", "bound"), [("fp32", 1e-5), ("fp16", 0.02), ("bf16", 0.16)])
def test_sampler_and_trainer_run_the_same_policy(plan, bound, rollout):
    backend, engine = pair(plan, rollout)
    precision = engine.precision
    with engine:
        for version in range(3):
            send(backend, engine, precision, version)
            assert apart(backend, engine) < bound
            one_step(backend, fixed_rows(seed=version), 400)
        assert apart(backend, engine) > bound / 100, "the step has moved the trainer"
        precision.verify([*backend.live(), *engine.live()])


def test_the_adapter_itself_is_no_further_off_than_merged_weights():
    """Both sides hold the very same 16-bit factors and base; a merge is rounded once more."""
    off = {}
    for rollout in ("merged", "adapter"):
        backend, engine = pair("fp16", rollout)
        with engine:
            send(backend, engine, engine.precision)
            off[rollout] = apart(backend, engine)
    assert 0 < off["adapter"] < off["merged"]


def test_the_base_is_sent_once_and_then_the_adapter_alone():
    backend, engine = pair("fp16", "adapter")
    precision = engine.precision
    with engine:
        assert (engine.path, engine.wants) == ("generic", "parts")
        with pytest.raises(ValueError, match="missing"):
            engine.load_weights(backend.weights(None, "trained"), 0)
        assert engine.wants == "parts"
        send(backend, engine, precision)
        assert engine.wants == "trained"
        one_step(backend, fixed_rows(), 400)
        few = list(backend.weights(None, "trained"))
        assert all(is_adapter(name) for name, _ in few)
        with pytest.raises(ValueError, match="missing"):
            engine.load_weights(few[1:], 1)
        with pytest.raises(ValueError, match="no weights"):
            engine.score(SEQUENCES, Sampling(1))
        send(backend, engine, precision, 1)
        assert apart(backend, engine) < 0.02
    with pytest.raises(ValueError, match="path 'native'"):
        TorchEngine(small_config("llama"), precision, adapter=adapter_of(rollout="adapter"), path="native")


@pytest.mark.parametrize("rollout", ["merged", "adapter"])
@pytest.mark.parametrize("plan", ["fp16", "bf16"])
def test_a_stale_adapter_is_caught(plan, rollout):
    backend, engine = pair(plan, rollout)
    wanted = Recipe.of({"steps": 1, "precision": plan, "rollout": {"max_tokens": 8}})
    asked = [Asked(Problem("", "", ""), tuple(range(60)))]
    model = replace(fresh_model("llama"), adapter=backend.adapter)
    canary = Canary.of(asked, model, wanted.precision, Sampling(8), 300)
    with engine:
        deliver(engine, backend, wanted, canary, 0)
        one_step(backend, fixed_rows(), 400)
        deliver(engine, backend, wanted, canary, 1)
        for i in range(8 if plan == "fp16" else 30):
            one_step(backend, fixed_rows(seed=i), 400)
        with pytest.raises(Undelivered, match="canary"):
            canary.prove(engine, backend)  # the update was skipped
        deliver(engine, backend, wanted, canary, 2)


@pytest.mark.parametrize("rollout", ["merged", "adapter"])
def test_modules_in_fp32_and_a_rescaled_stream_hold_for_adapters_too(rollout):
    backend, engine = pair("fp16", rollout, fp32=["model.layers.0.mlp"], residual_scale=0.5)
    with engine:
        send(backend, engine, engine.precision)
        assert apart(backend, engine) < 0.02
        weights = by_hand(held(backend), 2.0)
        exact = logp_by_hand(small_module("llama").double(), weights, SEQUENCES)
        mu = engine.score(SEQUENCES, Sampling(1))
    assert max(float((m - e).abs().max()) for m, e in zip(mu, exact, strict=True)) < 0.02


def test_what_goes_into_an_adapter_of_an_fp32_module_is_not_rounded():
    model = fresh_model("llama", adapter=adapter_of("fp16"))
    precision = Precision.parse({"preset": "fp16", "fp32": ["model.layers.0.mlp"]})
    seen = []
    factor = model.module.get_submodule("model.layers.0.mlp.down_proj.lora_A.default")
    factor.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    backend = make_backend(model, precision, ONCE, 1.0, 9, BackendSpec())
    backend.logprobs(collate(fixed_rows(2), 257))
    assert seen[-1] == torch.float32


# --- whole runs


def lora_recipe(folder, grader, **changes):
    return recipe(folder, lora=LORA, task__grader=grader, optim__lr=1e-2, rollout__max_tokens=12, **changes)


@pytest.mark.parametrize(("rollout", "plan"), [("merged", "fp16"), ("adapter", "fp16"), ("adapter", "bf16/fp32")])
def test_a_run_leaves_its_adapter_and_goes_on_where_it_stopped(model_folder, tmp_path, grader, rollout, plan):
    folder = model_folder("llama")
    more = {
        "precision": plan, "lora__rollout": rollout,
        "eval__every": 2, "eval__data": ["arithmetic_test"], "eval__limit": 2,
        "compare__precisions": ["fp16", "bf16"], "compare__prompts": 2, "compare__samples": 2,
    }  # fmt: skip
    whole = train(lora_recipe(folder, grader, **more), tmp_path / "whole", console=QUIET)
    train(lora_recipe(folder, grader, steps=2, **more), tmp_path / "parts", console=QUIET)
    parts = train(lora_recipe(folder, grader, **more), tmp_path / "parts", resume=True, console=QUIET)
    assert rows(whole) == rows(parts)
    assert all(r["optim/grad_norm"] > 0 for r in rows(whole) if r["step"])

    saved = saved_tensors(whole / "checkpoints" / "step-000003")
    assert all(".lora_" in name for name in saved)
    precision = Precision.parse(plan)
    base = AutoModelForCausalLM.from_pretrained(folder)
    for p in base.parameters():
        p.data = p.data.to(precision.compute.dtype).float()
    assert_exported(whole, copy.deepcopy(base), saved, precision)


def assert_exported(run, base, saved, precision):
    """adapter/ by PEFT is the trained policy; model/ is the same, merged in FP32 and rounded once."""
    exported = AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto")
    assert {p.dtype for p in exported.parameters()} == {precision.export.dtype}
    state = dict(base.named_parameters())
    want = {}
    for name, p in state.items():
        layer = name.removesuffix(".weight")
        want[name] = p.double()
        if f"master.{layer}.lora_A.default.weight" in saved:
            a, b = (saved[f"master.{layer}.lora_{x}.default.weight"].double() for x in "AB")
            assert b.any()
            want[name] = p.double() + LORA["alpha"] / LORA["rank"] * (b @ a)
    for name, p in exported.named_parameters():
        torch.testing.assert_close(p.double(), want[name], rtol=1.01 * precision.export.epsilon, atol=1e-7)
    exact = [logp.detach() for logp in logp_by_hand(copy.deepcopy(base).double(), want, SEQUENCES)]
    named = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == base.config._name_or_path
    with pytest.raises(ValueError, match=r"is an adapter. The whole model of a run is in model/"):
        loading.load(ModelSpec.model_validate({"path": str(run / "adapter")}))
    peft = PeftModel.from_pretrained(base, run / "adapter")
    assert {p.dtype for n, p in peft.named_parameters() if "lora_" in n} == {torch.float32}
    theirs = []
    for prompt, response in SEQUENCES:
        logits = peft(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        theirs.append(F.log_softmax(logits.detach(), -1).gather(-1, torch.tensor(response)[:, None])[:, 0])
    assert max(float((t - e).abs().max()) for t, e in zip(theirs, exact, strict=True)) < 1e-4


# --- memory


def test_the_planner_counts_what_is_held():
    config, adapter = small_config("llama"), adapter_of("fp16")
    shape = Shape.of(config, adapter)
    hidden, heads, ff, kv = 64, 64, 160, 32
    layer = 4 * (2 * (hidden + heads) + 2 * (hidden + kv) + 3 * (hidden + ff))
    assert (shape.adapter, shape.adapter_layer) == (2 * layer, layer)
    assert shape.parameters == sum(p.numel() for p in small_module("llama").parameters())
    backend = fresh_backend("fp16", "llama", lora=LORA)
    one_step(backend, fixed_rows(), 400)
    size = {}
    for part, name, tensor in backend.live():
        kind = "frozen weights" if part == "copy" and not is_adapter(name) else part
        size[kind] = size.get(kind, 0) + tensor.numel() * tensor.element_size()
    planned = {p.name: p.bytes for p in plan_memory.resident(shape, Precision.parse("fp16"), Trainer("single"), 1)}
    assert planned == {
        "FP32 masters": size["master"], "AdamW's moments": size["optimizer"], "16-bit copy": size["copy"],
        "frozen weights": size["frozen weights"],
    }  # fmt: skip
    whole = plan_memory.resident(Shape.of(config), Precision.parse("fp16"), Trainer("single"), 1)
    assert "frozen weights" not in {p.name for p in whole}
    assert plan_memory.checkpoint_bytes(shape) == size["master"] + size["optimizer"]
