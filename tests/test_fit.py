"""The plan inside a model: FP32 modules, FP32 routers, a rescaled residual stream, on both sides."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common_training import fresh_backend, fresh_model, trajectory
from conftest import small_module
from ranks import on_ranks
from rich.console import Console
from safetensors.torch import load_file
from test_loop import recipe, saved_tensors

from tenbit import train
from tenbit.batching import collate, ungraded
from tenbit.engines.torch import TorchEngine
from tenbit.mismatch import measure
from tenbit.models.fit import all_routers, fit, fit_loaded
from tenbit.precision import Format, Precision
from tenbit.types import Prompt, Sampling

IDS = torch.randint(0, 250, (3, 24), generator=torch.Generator().manual_seed(0))
RESCALED = {"preset": "fp16", "residual_scale": 0.0625}
WIDE_MLP = {"preset": "fp16", "fp32": ["model.layers.1.mlp"]}
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen3_moe")


def plan(spec) -> Precision:
    return Precision.parse(spec)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rescaled_stream_leaves_the_function_and_its_gradients_bit_for_bit(family):
    """A power of two changes no mantissa, so in FP32 nothing at all may differ."""
    module = small_module(family)
    fitted = copy.deepcopy(module)
    fit_loaded(fitted, plan(RESCALED))
    got, want = fitted(IDS).logits, module(IDS).logits
    assert torch.equal(got, want)
    for model, logits in ((fitted, got), (module, want)):
        logits.log_softmax(-1).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
    for (name, p), q in zip(fitted.named_parameters(), module.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("form", ["fp32", "fp16"])
def test_a_branch_that_ends_in_a_bias_is_rescaled_without_cancellation(form):
    """Output and the gradient of the bias are the plain layer's to rounding, in FP16 too, however small the scale."""
    torch.manual_seed(0)
    plain = small_module("llama", attention_bias=True, mlp_bias=True)
    for layer in plain.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.normal_(linear.bias, std=0.5)
    exact = copy.deepcopy(plain).double()
    (exact(IDS).logits.log_softmax(-1).square().mean() * 1024).backward()
    fitted = plain.to(plan(form).compute.dtype)
    fit_loaded(fitted, plan({"preset": form, "residual_scale": 2.0**-8}))
    (fitted(IDS).logits.float().log_softmax(-1).square().mean() * 1024).backward()
    bound = {"fp32": 1e-5, "fp16": 2e-2}[form]
    far = (fitted(IDS).logits.double() - exact(IDS).logits).abs().max() / exact(IDS).logits.abs().max()
    assert float(far.detach()) < bound
    for (name, p), q in zip(fitted.named_parameters(), exact.parameters(), strict=True):
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            assert float((p.grad.double() - q.grad).norm() / q.grad.norm()) < bound, name


@pytest.mark.parametrize("family", ["olmo", "olmo2", "gpt2"])
def test_a_stream_that_is_not_known_is_not_rescaled(family):
    with pytest.raises(ValueError, match=r"precision\.residual_scale.*'bf16' or 'fp32'"):
        fit_loaded(small_module(family), plan(RESCALED))


def test_a_stream_that_something_else_reads_is_found_out():
    """An architecture that looks right and is not: a layer that adds a constant to its stream."""
    module = small_module("llama")
    module.model.layers[0].register_forward_hook(lambda m, args, out: out + 1.0)
    with pytest.raises(ValueError, match="something besides norms reads its residual stream"):
        fit_loaded(module, plan(RESCALED))


def stream_of_millions(family: str = "llama"):
    """A model whose residual stream passes 65504, while its branches and its function are ordinary."""
    module = small_module(family)
    with torch.no_grad():  # no weight is beyond 65504
        module.model.layers[0].mlp.up_proj.weight *= 50
        module.model.layers[0].mlp.down_proj.weight *= 2e4
        module.model.layers[1].self_attn.o_proj.weight *= 5e4
    return module


def mlp_of_millions():
    """gate times up passes 65504; the product with down brings it back."""
    module = small_module("llama")
    mlp = module.model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight *= 300
        mlp.gate_proj.weight *= 300
        mlp.down_proj.weight *= 1e-2
    return module


@pytest.mark.parametrize(
    ("build", "spec"), [(stream_of_millions, {**RESCALED, "residual_scale": 2.0**-8}), (mlp_of_millions, WIDE_MLP)]
)
def test_what_overflows_in_fp16_is_finite_and_right_with_its_remedy_on_both_sides(build, spec):
    module = build()
    with torch.no_grad():
        want = module(IDS).logits.log_softmax(-1)
    bare = copy.deepcopy(module).to(Format.FP16.dtype)
    assert not bool(bare(IDS).logits.isfinite().all()), "the model was to overflow"
    fitted = copy.deepcopy(module)
    fit_loaded(fitted, plan(spec))
    with torch.no_grad():
        got = fitted.to(Format.FP16.dtype)(IDS).logits.float().log_softmax(-1)
    assert float((got - want).abs().max()) < 0.05
    model = fresh_model("llama")
    model.module.load_state_dict(module.state_dict())
    assert mismatch_of(model, plan(spec)) < 1e-5


def mismatch_of(model, precision: Precision, sampler: Precision | None = None) -> float:
    """KL k3 of the built-in engine against the single backend, both made by the plan, or the engine by another one."""
    from tenbit.backends.single import SingleBackend
    from tenbit.recipe import OptimSpec

    with TorchEngine(model.module.config, sampler or precision, pad_token_id=257) as engine:
        engine.load_weights(precision.to_engine(model.module.state_dict().items()), 0)
        prompts = [Prompt(tuple(IDS[i % 3, : 8 + i % 5].tolist()), i) for i in range(16)]
        drawn = engine.generate(prompts, Sampling(32, stop_token_ids=(256,)))
    batch = collate([ungraded(c) for c in drawn], 257)
    backend = SingleBackend(model, precision, OptimSpec.model_validate({}), 1.0, 1)
    pi = backend.logprobs(batch)
    assert bool(pi.isfinite().all())
    return measure(pi, batch.logp_rollout, batch.mask).metrics(3.0)["kl_k3"]


def test_pitfall_21_a_remedy_on_one_side_only_would_be_another_policy():
    """The reason for one plan: FP32 in the trainer alone is a mismatch that FP32 on both sides has not."""
    parts = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")]
    wide = plan({"preset": "bf16", "fp32": parts})
    both = mismatch_of(fresh_model("qwen3"), wide)
    one = mismatch_of(fresh_model("qwen3"), wide, sampler=plan("bf16"))
    assert one > 100 * both


def test_an_fp32_module_computes_as_in_fp32_and_its_parameters_get_their_gradients():
    module = small_module("llama", seed=3).to(Format.FP16.dtype)
    mlp = module.model.layers[1].mlp
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(Format.FP16.dtype)
    wide = copy.deepcopy(mlp).float()
    want = wide(x.float())
    want.sum().backward()
    fit(module, plan(WIDE_MLP))
    got = mlp(x)
    assert got.dtype == Format.FP16.dtype
    assert torch.equal(got, want.to(Format.FP16.dtype))
    got.float().sum().backward()
    for p, q in zip(mlp.parameters(), wide.parameters(), strict=True):
        assert p.grad.dtype == p.dtype
        assert torch.allclose(p.grad.float(), q.grad, rtol=2e-3, atol=1e-4)
        assert p.dtype == Format.FP16.dtype, "the weights themselves stay"


def test_pitfall_21_routers_are_fp32_by_default_and_in_the_models_format_if_asked():
    module = small_module("qwen3_moe").to(Format.BF16.dtype)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).to(Format.BF16.dtype)
    name, router = next(iter(all_routers(module).items()))
    weight: Any = router.weight
    top_k: Any = router.top_k
    assert name.endswith("mlp.gate")
    rounded = copy.deepcopy(module)
    fit(rounded, plan({"preset": "bf16", "router": "model"}))
    assert next(iter(all_routers(rounded).values()))(x)[0].dtype == Format.BF16.dtype
    fit(module, plan("bf16"))
    logits, scores, experts = router(x)
    exact = F.linear(x.double(), weight.double())
    assert torch.allclose(logits.double(), exact, rtol=1e-5, atol=1e-6)
    top = exact.softmax(-1).topk(top_k)
    assert torch.equal(experts, top.indices)
    assert scores.dtype == Format.FP32.dtype


def test_a_copy_of_a_fitted_model_computes_with_its_own_weights():
    module = small_module("llama")
    fit_loaded(module, plan({**RESCALED, **WIDE_MLP}))
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.zero_()
    assert not torch.equal(other(IDS).logits, module(IDS).logits)


def test_a_model_is_fitted_once():
    module = small_module("llama")
    fit_loaded(module, plan(RESCALED))
    before = module(IDS).logits
    fit_loaded(module, plan(RESCALED))
    assert torch.equal(module(IDS).logits, before)
    with pytest.raises(AssertionError, match="another plan"):
        fit(module, plan("fp16"))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("lm_head", r"precision\.head = 'fp32'"), ("model", "parts of them"), ("model.embed_tokens", "parts of them")],
)
def test_pitfall_29_a_name_that_would_do_nothing_is_refused(name, remedy):
    with pytest.raises(ValueError, match=remedy):
        fit(small_module("llama"), plan({"preset": "fp16", "fp32": [name]}))


@pytest.mark.parametrize("name", ["model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp.down_proj"])
def test_layers_and_their_parts_compute_in_fp32_on_both_sides(name):
    assert mismatch_of(fresh_model("llama"), plan({"preset": "fp16", "fp32": [name]})) < 1e-6


def test_a_module_that_is_not_there_is_named_with_ones_that_are():
    with pytest.raises(ValueError, match=r"no module 'model\.layers\.7\.mlp'.*'model\.layers\.0\.mlp'"):
        fit(small_module("llama"), plan({"preset": "fp16", "fp32": ["model.layers.7.mlp"]}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("fsdp",), pytest.param(("deepspeed-2", "deepspeed-3"), marks=pytest.mark.scaling)], ids=lambda n: n[0]
)
def test_sharded_models_are_fitted_alike(names, tmp_path):
    """Two ranks give the steps of one process, whatever the plan does to the model's inside."""
    spec = {**RESCALED, **WIDE_MLP}
    kinds = {
        "fsdp": {"name": "fsdp"},
        "deepspeed-2": {"name": "deepspeed", "stage": 2},
        "deepspeed-3": {"name": "deepspeed", "stage": 3},
    }
    texts = [json.dumps({"plan": spec, **kinds[name]}) for name in names]
    want = trajectory(fresh_backend(plan=spec), 64)
    plain = trajectory(fresh_backend(plan="fp16"), 64)
    assert plain["loss"] != want["loss"], "the plan was to be seen in the rounding"
    for rank in on_ranks(2, "ranks_of_backends.py", *texts, folder=tmp_path):
        for text in texts:
            assert rank[text]["loss"] == pytest.approx(want["loss"], rel=5e-3)
            assert rank[text]["norm"] == pytest.approx(want["norm"], rel=5e-3)


def test_fp8_weights_are_those_of_a_quantising_engine():
    """e4m3 with a scale a row, by hand: the nearest of the 8-bit numbers to w / scale, times scale."""
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[grid.isfinite()]
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 2, 6)[:, None]
    w[0] = 0
    got = plan("fp16/fp8").rolled_out("model.layers.0.mlp.up_proj.weight", w)
    for row, rounded in zip(w.double(), got.double(), strict=True):
        scale = row.abs().max() / 448 if row.abs().max() > 0 else 1.0
        nearest = (row[:, None] / scale - grid).abs().min(-1)
        assert torch.allclose((rounded / scale - row / scale).abs(), nearest.values, atol=1e-4)
    assert len(got.unique()) < len(w.unique())


def test_fp8_is_rounded_from_the_masters_in_a_run_and_in_its_export(model_folder, grader, tmp_path):
    """Not from weights that were cast to 16 bits before, whose largest in a row is another one."""
    sent: dict[str, torch.Tensor] = {}
    load_weights = TorchEngine.load_weights

    def load(self, named, version):
        load_weights(self, ((n, sent.setdefault(f"{version}/{n}", t.clone())) for n, t in named), version)

    wanted = recipe(model_folder("llama"), task__grader=grader, precision="fp16/fp8", steps=2, checkpoint__every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, "load_weights", load)
        run = train(wanted, tmp_path / "run", console=Console(file=io.StringIO()))
    name = "model.layers.0.mlp.up_proj.weight"
    for step in (1, 2):
        master = saved_tensors(run / "checkpoints" / f"step-00000{step}")[f"master.{name}"]
        exact = plan("fp16/fp8").rolled_out(name, master).to(Format.FP16.dtype)
        if step == 1:
            assert torch.equal(sent[f"1/{name}"], exact)
            assert not torch.equal(exact, plan("fp16/fp8").rolled_out(name, master.half()))
        else:
            assert torch.equal(load_file(run / "model" / "model.safetensors")[name], exact)


def test_an_engine_gets_fp8_weights_and_an_export_has_them():
    precision = plan("fp16/fp8")
    assert precision.name == "fp16/fp8"
    assert Precision.parse(precision.model_dump(mode="json", exclude_none=True)) == precision
    module = small_module("llama")
    with TorchEngine(module.config, precision, pad_token_id=257) as engine:
        engine.load_weights(precision.to_engine(module.state_dict().items()), 0)
        held = {name: t for _, name, t in engine.live()}
    name = "model.layers.0.mlp.up_proj.weight"
    want = precision.rolled_out(name, module.state_dict()[name]).to(Format.FP16.dtype)
    assert torch.equal(held[name], want)
