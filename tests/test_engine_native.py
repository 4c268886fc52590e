"""The compiled kernels against plain torch and float64, and what happens where they cannot be had."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import Qwen2Config, Qwen3Config

from tenbit.engines import compiled
from tenbit.engines import sampling as sampler
from tenbit.engines.native import NativeOps
from tenbit.engines.ops import Layer, Linear, PlainOps, Shape
from tenbit.engines.torch import TorchEngine
from tenbit.precision import Format, Precision
from tenbit.types import Prompt, Sampling

native = pytest.mark.skipif(not compiled.available(), reason="no native kernels here")
FORMATS = list(Format)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def ulps(a, b):
    """The largest distance in units of the last place of the largest number."""
    return float((a.double() - b.double()).abs().max() / (b.double().abs().max() * Format.of(b.dtype).epsilon))


@native
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows", [5, 16, 17, 31, 32, 33, 48, 130, 300])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 7), (96, 70), (256, 512)])
def test_products_equal_float64_to_rounding(fmt, rows, inputs, outputs):
    """FP16 on AMX is a sum of exact products: it must be as good as torch's own, not as good as BF16's."""
    torch.manual_seed(rows)
    x, w, b = (torch.randn(*size).to(fmt.dtype) for size in ((rows, inputs), (outputs, inputs), (outputs,)))
    ops, linear = NativeOps(), Linear(w, b)
    ops.refresh([linear])
    exact = torch.nn.functional.linear(x.double(), w.double(), b.double())
    ours, theirs = ops.linear(x, linear), PlainOps().linear(x, linear)
    assert ours.dtype == fmt.dtype
    assert float((ours.double() - exact).abs().max()) <= 1.05 * float((theirs.double() - exact).abs().max()) + 1e-6
    if fmt != Format.FP32:
        rounded = exact.to(fmt.dtype)
        assert (ours != rounded).float().mean() < 0.01


@native
@pytest.mark.parametrize("fmt", [Format.FP16, Format.BF16])
def test_products_of_inf_nan_large_and_subnormal_numbers(fmt):
    torch.manual_seed(0)
    x, w = torch.randn(20, 64).to(fmt.dtype), torch.randn(40, 64).to(fmt.dtype)
    x[3, 5], x[4, 5] = torch.inf, torch.nan
    x[5] = fmt.largest
    x[6] *= 2.0**-22 if fmt == Format.FP16 else 1.0
    ops, linear = NativeOps(), Linear(w, None)
    ops.refresh([linear])
    ours, theirs = ops.linear(x, linear), PlainOps().linear(x, linear)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.allclose(ours[6].double(), theirs[6].double(), atol=2 * fmt.smallest_subnormal, rtol=fmt.epsilon)


@native
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_norms_and_silu(fmt, rows):
    torch.manual_seed(rows)
    x, y, w = (torch.randn(*size).to(fmt.dtype) for size in ((rows, 96), (rows, 96), (96,)))
    ops, plain = NativeOps(), PlainOps()
    for ours, theirs in zip(
        (ops.norm(x, w, 1e-6), *ops.add_norm(x.clone(), y, w, 1e-6)),
        (plain.norm(x, w, 1e-6), *plain.add_norm(x.clone(), y, w, 1e-6)),
        strict=True,
    ):
        assert ulps(ours, theirs) <= (4 if fmt == Format.FP32 else 1)
        assert fmt == Format.FP32 or (ours != theirs).float().mean() < 0.01
    gate_up = torch.randn(rows, 192).to(fmt.dtype) * 6
    assert ulps(ops.silu_mul(gate_up), plain.silu_mul(gate_up)) <= (4 if fmt == Format.FP32 else 1)


@native
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (14, 2)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
def test_rotation_and_attention(fmt, heads, head_dim):
    torch.manual_seed(head_dim)
    shape = Shape(*heads, head_dim, 1e-6)
    rows, capacity = 9, 48
    norms = torch.rand(2, head_dim).to(fmt.dtype)
    layer = Layer(*(None,) * 2, norms[0], norms[1], *(None,) * 4)  # type: ignore[arg-type]
    qkv = torch.randn(rows, (heads[0] + 2 * heads[1]) * head_dim).to(fmt.dtype)
    cos, sin = torch.randn(2, capacity, head_dim).to(fmt.dtype)
    position = torch.tensor([0, 1, 14, 15, 16, 17, 31, 40, 47])
    ours, theirs = qkv.clone(), qkv.clone()
    NativeOps().rotate(ours, layer, shape, cos, sin, position)
    PlainOps().rotate(theirs, layer, shape, cos, sin, position)
    assert ulps(ours, theirs) <= (4 if fmt == Format.FP32 else 1)
    cache = torch.randn(2, rows + 1, heads[1], capacity, head_dim).to(fmt.dtype)
    (k1, v1), (k2, v2) = cache.clone(), cache.clone()
    for row, last in enumerate(position):  # what lies beyond a row's position must not matter
        k1[row, :, last + 1 :] = v1[row, :, last + 1 :] = torch.nan
    a = NativeOps().attend(theirs, k1, v1, shape, position, 47)
    b = PlainOps().attend(theirs.clone(), k2, v2, shape, position, 47)
    assert ulps(a, b) <= (16 if fmt == Format.FP32 else 2)
    for row, last in enumerate(position):
        assert torch.equal(k1[row, :, : last + 1], k2[row, :, : last + 1])
        assert torch.equal(v1[row, :, : last + 1], v2[row, :, : last + 1])


@native
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("vocabulary", [3, 16, 97, 256, 5003])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_drawing_equals_the_plain_one(fmt, vocabulary, temperature):
    torch.manual_seed(vocabulary)
    logits = (torch.randn(64, vocabulary) * 4).to(fmt.dtype)
    u = torch.rand(64)
    u[:3] = torch.tensor([0.0, 1.0 - 2.0**-24, 0.5])
    sampling = Sampling(1, temperature=temperature)
    tokens, logp = NativeOps().draw(logits, u, sampling)
    expected, expected_logp = sampler.draw(logits, u, sampling)
    assert (tokens == expected).sum() >= 63  # one may fall on an edge between two tokens
    same = tokens == expected
    assert torch.allclose(logp[same], expected_logp[same], atol=1e-5)
    assert torch.allclose(logp, sampler.log_mu(logits, tokens, sampling), atol=1e-5)


@native
@pytest.mark.parametrize("place", [0, 1, 255, 256, 999])
def test_the_kernel_never_draws_probability_zero_nor_hides_what_is_not_finite(place):
    logits = torch.full((4, 1000), -300.0)
    logits[:, place] = 0.0
    u = torch.tensor([0.0, 0.5, 1.0 - 2.0**-24, 1.0])
    tokens, logp = NativeOps().draw(logits, u, Sampling(1))
    assert tokens.tolist() == [place] * 4
    assert logp.tolist() == [0.0] * 4
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits[2, place] = bad
        assert NativeOps().draw(logits, u, Sampling(1))[1].isnan().tolist() == [False, False, True, False]


@native
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config])
def test_a_whole_step_is_its_parts(precision, config):
    """One call of step.cpp and the building blocks one by one give the same bits."""
    small = config(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    drawn = []
    for whole in (True, False):
        torch.manual_seed(0)
        with TorchEngine(small, Precision.parse(precision), path="native") as engine:
            named = dict(engine._module.named_parameters())
            engine.load_weights([(k, torch.randn(v.shape) * 0.2) for k, v in named.items()], 0)
            if not whole:
                engine._runner._step = None
            elif engine._runner._step is None:
                pytest.skip("no AMX here")
            drawn.append(engine.generate([Prompt((1, 2, i), seed=i) for i in range(20)], Sampling(24)))
    for a, b in zip(*drawn, strict=True):
        assert a.response_ids == b.response_ids
        assert torch.equal(a.logp, b.logp)


SCRIPT = "from tenbit.engines import compiled; print(compiled.available(), compiled.why_not(), sep='|')"


def run(**environment):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


@native
def test_processes_may_compile_at_the_same_time(tmp_path):
    racers = [run(XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]
    assert [racer.communicate()[0].strip() for racer in racers] == ["True|"] * 3
    assert len(list((tmp_path / "tenbit").iterdir())) == 1


def test_without_kernels_the_engine_is_plain_and_says_why(tmp_path):
    off = run(TENBIT_NATIVE="0").communicate()[0]
    assert off.strip() == "False|TENBIT_NATIVE=0"
    if compiled.available():
        bare = run(XDG_CACHE_HOME=str(tmp_path), PATH="/nonexistent").communicate()[0]
        assert bare.strip() == "False|there is no g++ to compile the kernels with"


def test_an_engine_without_kernels_samples_in_plain_torch(monkeypatch):
    monkeypatch.setattr(compiled, "why_not", lambda: "no AVX-512")
    config = Qwen2Config(vocab_size=50, hidden_size=32, num_attention_heads=2, num_key_value_heads=2)
    assert TorchEngine(config, Precision.parse("fp32")).path == "plain"
    with pytest.raises(ValueError, match=r"path 'native' cannot be had here.*no AVX-512"):
        TorchEngine(config, Precision.parse("fp32"), path="native")
