"""Fused training kernels: forward against the library's modules, gradients against float64, and the ordinary ways."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, small_module
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    set_seed,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, apply_rotary_pos_emb

from tenbit.models import kernels
from tenbit.models.fused import fuse
from tenbit.precision import Format

needs_kernels = pytest.mark.skipif(kernels.library() is None, reason="no AVX-512 or no g++")
pytestmark = needs_kernels
FORMATS = list(Format)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def module_of(family: str, form: Format = Format.FP32, seed: int = 0, **changes):
    if family != "mistral":
        return small_module(family, seed, **changes).to(form.dtype).train()
    set_seed(seed)
    config = MistralConfig(**{**SIZES, "sliding_window": 32, "initializer_range": 0.08, "head_dim": 16, **changes})
    return MistralForCausalLM(config).to(form.dtype).train()


def rows(form: Format, *shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(form.dtype)


def within(ours: torch.Tensor, theirs: torch.Tensor, form: Format, ulps: float = 1.0) -> bool:
    room = ulps * form.epsilon * theirs.double().abs().clamp(min=form.smallest_normal)
    return bool(((ours.double() - theirs.double()).abs() <= room).all())


def near(ours: torch.Tensor, theirs: torch.Tensor, form: Format, room: float = 1.0) -> bool:
    """Rounded once: the error of a whole gradient is about a third of epsilon, relative to it."""
    return bool((ours.double() - theirs).norm() <= room * max(form.epsilon, 2e-7) * theirs.norm())


# ---- the operations


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("n", "d"), [(1, 16), (37, 192), (130, 75)])
def test_norm_is_the_librarys_and_its_gradient_that_of_float64(form: Format, n: int, d: int):
    norm = Qwen3RMSNorm(d, eps=1e-6).to(form.dtype)
    x, y, w = rows(form, n, d), rows(form, n, d, seed=1), rows(form, d, seed=2)
    norm.weight.data = w
    for second in (None, y):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        total, out = kernels.add_norm(leaves[0], second, leaves[1], 1e-6)
        with torch.no_grad():
            theirs = x if second is None else x + y
            assert torch.equal(total, theirs)
            # another order of additions may turn the rounding of x / rms(x), and that of the product after it
            assert within(out, norm(theirs), form, 8.0 if form == Format.FP32 else 2.0)
        g, carried = rows(form, n, d, seed=3), rows(form, n, d, seed=4)
        torch.autograd.backward([total, out], [carried, g])
        ref_x, ref_w = theirs.double().requires_grad_(), w.double().requires_grad_()
        normed = ref_x * torch.rsqrt(ref_x.square().mean(-1, keepdim=True) + 1e-6)
        (normed * ref_w * g.double() + ref_x * carried.double()).sum().backward()
        assert near(leaves[0].grad, ref_x.grad, form)
        # the weight meets x / rms(x) as it was rounded forward
        ref = (g.double() * normed.detach().to(form.dtype).double()).sum(0)
        assert near(leaves[1].grad, ref, form, 1.5)


def test_a_norm_of_a_slice_is_the_librarys():
    """As DeepSeek's attention takes one of the first columns of a product."""
    norm, x = Qwen3RMSNorm(16, eps=1e-6), torch.randn(1, 40, 24)[..., :16]
    want = norm(x)
    assert not x.is_contiguous()
    fuse(norm)
    assert "forward" in vars(norm)
    torch.testing.assert_close(norm(x), want)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dim", [16, 20, 64])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_rotation_is_the_librarys(form: Format, norms: bool, dim: int, per_sequence: bool):
    of = kernels.Heads(3, 7, 4, 2, dim, dim**-0.5, 1e-6)
    qkv = rows(form, 21, 8 * dim)
    angles = torch.rand(3 if per_sequence else 1, 7, dim, generator=torch.Generator().manual_seed(dim)) * 6
    cos, sin = angles.cos().to(form.dtype), angles.sin().to(form.dtype)
    weights = [rows(form, dim, seed=s) if norms else None for s in (5, 6)]
    turned, _ = kernels.rotate(qkv, cos, sin, *weights, of)
    q, k = (of.by_head(part) for part in of.parts(qkv)[:2])
    if norms:
        q_norm, k_norm = Qwen3RMSNorm(dim, eps=1e-6), Qwen3RMSNorm(dim, eps=1e-6)
        q_norm.weight.data, k_norm.weight.data = weights
        q, k = q_norm(q), k_norm(k)
    for ours, theirs in zip(of.parts(turned), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        if norms or form == Format.FP32:
            assert (of.by_head(ours).double() - theirs.double()).abs().max() <= 4 * form.epsilon * theirs.abs().max()
        else:
            assert torch.equal(of.by_head(ours), theirs)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("norms", [False, True])
def test_gradient_of_attention_is_that_of_float64(form: Format, norms: bool):
    dim, shape = 20, (3, 7)
    of = kernels.Heads(*shape, 4, 2, dim, dim**-0.5, 1e-6)
    angles = torch.rand(1, 7, dim) * 6
    cos, sin = angles.cos().to(form.dtype), angles.sin().to(form.dtype)
    leaves = [rows(form, 21, 8 * dim), *(rows(form, dim, seed=s) for s in (5, 6) if norms)]
    g = rows(form, 21, 4 * dim, seed=9)

    def reference(qkv: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        q, k, v = (of.by_head(part) for part in of.parts(qkv))
        if weights:
            q, k = (
                x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w
                for x, w in zip((q, k), weights, strict=True)
            )
        q, k = apply_rotary_pos_emb(q, k, cos.double(), sin.double())
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(21, -1)

    ours = [t.clone().requires_grad_() for t in leaves]
    exact = [t.double().requires_grad_() for t in leaves]
    out = kernels.attention(ours[0], cos, sin, *(ours[1:] or (None, None)), of)
    ref = reference(*exact)
    assert near(out.detach(), ref.detach(), form, 8)
    out.backward(g)
    ref.backward(g.double())
    for a, b in zip(ours, exact, strict=True):
        # what the forward pass rounds (rotated q and k, its result) shows in the gradient
        assert near(a.grad, b.grad, form, 8)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("f", [16, 75, 512])
def test_silu_times_gate(form: Format, f: int):
    x = rows(form, 33, 2 * f, scale=3.0).requires_grad_()
    out = kernels.silu_mul(x)
    gate, up = x.detach().split(f, -1)
    assert within(out, F.silu(gate) * up, form, 8.0 if form == Format.FP32 else 2.0)
    g = rows(form, 33, f, seed=1)
    out.backward(g)
    ref = x.detach().double().requires_grad_()
    gate, up = ref.split(f, -1)
    (F.silu(gate) * up).backward(g.double())
    assert x.grad is not None
    assert near(x.grad, ref.grad, form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 7, 3), (33, 65, 100), (200, 1100, 300), (700, 40, 33)])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_are_as_exact_as_torchs(form: Format, m: int, k: int, n: int, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for a in (rows(form, m, k), rows(form, k, m).T):
            for b in (rows(form, k, n, seed=1), rows(form, n, k, seed=1).T):
                bias = rows(form, n, seed=2)
                exact = a.double() @ b.double() + bias.double()
                # half a unit for rounding to the format, and what FP32 sums lose
                room = 0.501 * form.epsilon * exact.abs() + 2e-7 * (a.double().abs() @ b.double().abs() + 1) * 20
                assert ((kernels.product(a, b, bias).double() - exact).abs() <= room).all()
                assert torch.equal(kernels.product(a, b, torch.zeros_like(bias)), kernels.product(a, b))
    finally:
        torch.set_num_threads(before)


def test_products_take_the_whole_range_of_fp16():
    form = Format.FP16
    values = torch.tensor([form.largest, 1.0, form.smallest_normal, form.smallest_subnormal, -1.0 - form.epsilon, 0.0])
    x = torch.diag(values).to(form.dtype)
    assert torch.equal(kernels.product(x, torch.eye(6).to(form.dtype)), x)
    assert torch.equal(kernels.product(torch.eye(6).to(form.dtype), x), x)
    x[0, 0] = torch.inf
    assert not kernels.product(x, x)[0, 0].isfinite(), "an overflow must be seen by the loss scaler"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("biased", [False, True])
def test_linears_side_by_side(form: Format, biased: bool):
    sizes = (48, 16, 20)
    x = rows(form, 70, 32).requires_grad_()
    weights = [rows(form, s, 32, seed=s).requires_grad_() for s in sizes]
    biases = [rows(form, s, seed=9).requires_grad_() if biased else None for s in sizes]
    weights[1].requires_grad_(False)
    g = rows(form, 70, sum(sizes), seed=3)
    kernels.linears(x, *weights, *biases).backward(g)
    assert weights[1].grad is None
    exact, upstream = x.detach().double(), g.double().split(sizes, -1)
    assert near(x.grad, sum(d @ w.detach().double() for d, w in zip(upstream, weights, strict=True)), form)
    for d, w, b in zip(upstream, weights, biases, strict=True):
        if w.requires_grad:
            assert near(w.grad, d.T @ exact, form)
        if b is not None:
            assert near(b.grad, d.sum(0), form)


# ---- whole models


def run(module, length: int = 12, scale: float = 1.0):
    """Hidden states, and gradients by name, of a fixed batch."""
    tokens = torch.randint(0, 256, (3, length), generator=torch.Generator().manual_seed(1))
    weight = torch.randn(3, length, SIZES["hidden_size"], generator=torch.Generator().manual_seed(2)) * scale
    hidden = module.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    (hidden.float() * weight).sum().backward()
    gradients = {n: p.grad.double() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return hidden.detach(), gradients


def errors(found: dict, reference: dict) -> list[float]:
    assert found.keys() == reference.keys()
    return [float((found[n] - g).norm() / g.norm()) for n, g in reference.items() if g.norm() > 1e-6]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", [Format.FP16, Format.BF16])
def test_a_model_is_no_less_exact_fused(family: str, form: Format):
    hidden_ratio, ratio, seeds = 0.0, 0.0, 4
    for seed in range(seeds):
        plain = module_of(family, form, seed=seed)
        fused = copy.deepcopy(plain)
        inner = fused.base_model_prefix
        assert fuse(fused) == [f"{inner}.layers.0", f"{inner}.layers.1", f"{inner}.norm"]
        exact_hidden, exact = run(copy.deepcopy(plain).double(), 24)
        hidden, gradients = run(plain, 24)
        fused_hidden, fused_gradients = run(fused, 24)
        ours, theirs = errors(fused_gradients, exact), errors(gradients, exact)
        ratio += sum(ours) / sum(theirs) / seeds
        hidden_ratio += float((fused_hidden - exact_hidden).norm() / (hidden - exact_hidden).norm()) / seeds
        assert max(ours) <= 1.3 * max(theirs)
    assert hidden_ratio <= 1.03
    assert ratio <= 1.01


@pytest.mark.parametrize("family", FAMILIES)
def test_in_fp32_gradients_are_those_of_float64(family: str):
    fused = module_of(family)
    exact_hidden, exact = run(copy.deepcopy(fused).double())
    assert len(fuse(fused)) == 3
    hidden, gradients = run(fused)
    torch.testing.assert_close(hidden.double(), exact_hidden, rtol=1e-4, atol=1e-5)
    assert max(errors(gradients, exact)) < 2e-6


@pytest.mark.parametrize("form", FORMATS)
def test_a_step_repeats_bit_for_bit(form: Format):
    module = module_of("qwen3", form)
    fuse(module)
    (a, first), (b, second) = run(module, 40), run(module, 40)
    assert torch.equal(a, b)
    assert all(torch.equal(g, second[n]) for n, g in first.items())


def test_scoring_without_gradients_is_the_same():
    module = module_of("qwen2", Format.FP16)
    fuse(module)
    tokens = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = module.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    assert torch.equal(hidden, run(module)[0])


def test_gradient_checkpointing_changes_nothing():
    module = module_of("qwen3", Format.BF16)
    fuse(module)
    _, kept = run(module)
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, made_again = run(module)
    assert all(torch.equal(g, made_again[n]) for n, g in kept.items())


# ---- the ordinary ways


def fused_calls(monkeypatch) -> list[int]:
    calls: list[int] = []
    real = kernels.silu_mul
    monkeypatch.setattr(kernels, "silu_mul", lambda x: calls.append(1) or real(x))
    return calls


def test_what_the_kernels_do_not_do_is_done_by_the_library(monkeypatch):
    plain = module_of("mistral", Format.FP32).eval()
    module = copy.deepcopy(plain)
    fuse(module)
    calls = fused_calls(monkeypatch)
    tokens = torch.randint(0, 256, (2, 12))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    padded = module(input_ids=tokens, attention_mask=mask).logits
    torch.testing.assert_close(padded, plain(input_ids=tokens, attention_mask=mask).logits, rtol=1e-4, atol=1e-4)
    generated = module.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, plain.generate(tokens, max_new_tokens=4, do_sample=False))
    longer = torch.randint(0, 256, (2, 40))  # than the sliding window
    windowed = module(input_ids=longer, use_cache=False).logits
    torch.testing.assert_close(windowed, plain(input_ids=longer, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=Format.BF16.dtype):
        cast = module(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(cast, plain(input_ids=tokens, use_cache=False).logits, rtol=0.02, atol=0.02)
    assert not calls
    seen = []
    handle = module.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    module(input_ids=tokens, use_cache=False)
    handle.remove()
    assert seen == [1]
    assert len(calls) == 1, "the other layer stays fused"
    module(input_ids=tokens, use_cache=False)
    assert len(calls) == 3


def test_an_adapter_that_comes_later_is_used():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module = module_of("llama")
    fuse(module)
    plain, _ = run(module)
    for layer in module.model.layers:
        layer.mlp.up_proj.__class__ = Doubled
    adapted, _ = run(module)
    assert (adapted - plain).norm() > 0.1 * plain.norm()


def test_other_architectures_are_left_alone():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=1, n_head=4))
    assert fuse(gpt2) == []
    sizes = {**SIZES, "head_dim": 16}
    gemma = GemmaForCausalLM(GemmaConfig(**sizes))  # GELU, and norms that multiply by 1 + weight
    assert fuse(gemma) == []
    cohere = Cohere2ForCausalLM(Cohere2Config(**sizes))
    assert fuse(cohere) == []
    gelu = module_of("llama", hidden_act="gelu")
    assert fuse(gelu) == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ]
    assert fuse(module_of("llama", attn_implementation="eager"))[-1] == "model.norm"


def test_without_kernels_nothing_changes():
    script = (
        "from conftest import small_module; from tenbit.models.fused import fuse; m = small_module();"
        "assert fuse(m) == []; import torch; m(input_ids=torch.ones(1, 4, dtype=torch.long))"
    )
    environment = {**os.environ, "TENBIT_NATIVE": "0", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_copies_and_exports_are_unaffected(tmp_path):
    module = module_of("qwen2", Format.FP16)
    names = list(module.state_dict())
    fused = fuse(module)
    assert len(fused) == 3
    assert fuse(module) == fused, "again changes nothing"
    assert list(module.state_dict()) == names
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.zero_()
    assert not torch.equal(run(twin)[0], run(module)[0]), "a copy computes with its own weights"
    module.save_pretrained(tmp_path)
    again = type(module).from_pretrained(tmp_path, dtype=Format.FP16.dtype)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in module.state_dict().items())
    taken = []
    weight = module.model.layers[1].self_attn.k_proj.weight
    weight.register_post_accumulate_grad_hook(lambda p: taken.append(p.grad.clone()))
    run(module)
    assert len(taken) == 1
    assert taken[0].dtype == Format.FP16.dtype


def test_the_librarys_mlp_is_what_is_fused():
    """The formula under test is the library's, not ours."""
    mlp = Qwen3MLP(module_of("qwen3").config)
    x = torch.randn(5, SIZES["hidden_size"])
    gate_up = kernels.linears(x, mlp.gate_proj.weight, mlp.up_proj.weight, None, None)
    torch.testing.assert_close(mlp.down_proj(kernels.silu_mul(gate_up)), mlp(x))
