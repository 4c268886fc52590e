"""The single-process backend: gradients, loss scaling, skipping, resuming, and the precision it promises."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import byte_tokenizer, small_module

from tenbit import algorithms
from tenbit.algorithms import ALGORITHMS
from tenbit.backends.masters import MAX_SKIPS_IN_A_ROW
from tenbit.backends.single import SingleBackend
from tenbit.checkpoint import Checkpoints, Progress, load
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.recipe import OptimSpec
from tenbit.types import Batch, Overflow, Totals

PLANS = [
    "fp32",
    "fp16",
    "bf16",
    {"preset": "fp16", "casting": "autocast"},
    {"preset": "bf16", "casting": "autocast"},
    {"preset": "fp16", "head": "fp32"},
    {"preset": "fp16", "head": "fp32", "casting": "autocast"},
]


def make_backend(plan="fp32", module=None, lr=1e-3, updates=10, **optim) -> SingleBackend:
    module = copy.deepcopy(module if module is not None else small_module()).train()
    model = Model(module, byte_tokenizer(), (256,), 257, 512, torch.device("cpu"))
    spec = OptimSpec.model_validate({"lr": lr, **optim})
    return SingleBackend(model, Precision.parse(plan), spec, temperature=1.0, updates=updates)


def make_batch(rows=6, seed=0, longest=9) -> Batch:
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 5, (rows,), generator=g)
    lengths = torch.randint(1, longest + 1, (rows,), generator=g)
    tokens = torch.randint(0, 256, (rows, int((prompts + lengths).max())), generator=g)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    logp = (-5 + torch.randn(mask.shape, generator=g)).masked_fill(~mask, 0.0)
    return Batch(tokens, prompts, mask, logp, torch.randn(rows, generator=g))


def part_of(batch: Batch, rows: slice) -> Batch:
    return Batch(**{k: v[rows] for k, v in vars(batch).items() if v is not None})


def loss_for(name: str, batch: Batch):
    total = Totals(len(batch), int(batch.mask.sum()), 16)
    return lambda logp, b: algorithms.loss(ALGORITHMS[name], logp, b, total)


def masters(backend: SingleBackend) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in backend.weights()}


def gradients(backend: SingleBackend) -> torch.Tensor:
    """All of them in one vector, the loss scale divided out."""
    found = {name: total for part, name, total in backend.live() if part == "gradient"}
    scale = backend.state().counts["loss_scale"]
    return torch.cat([found[name].double().flatten() / scale for name in sorted(found)])


def distance(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want - got).norm() / want.norm())


def test_gradients_equal_plain_autograd():
    """FP32: the backend's step is torch's AdamW on the gradient of the loss written with full logits."""
    module, batch = small_module(), make_batch()
    backend = make_backend(module=module, max_grad_norm=1e9, eps=1e-2)  # Adam: g / (|g| + eps) magnifies rounding
    backend.accumulate(batch, loss_for("rloo", batch))
    stats = backend.step()
    reference = copy.deepcopy(module)
    total = 0.0
    for i in range(len(batch)):
        p, n = int(batch.prompt_length[i]), int(batch.mask[i].sum())
        logits = reference(batch.tokens[i : i + 1, : p + n]).logits[0].log_softmax(-1)
        picked = logits[range(p - 1, p + n - 1), batch.tokens[i, p : p + n]]
        total = total - batch.advantage[i] * picked.sum() / (6 * 16)
    total.backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()
    torch.optim.AdamW(reference.parameters(), lr=1e-3, eps=1e-2, weight_decay=0.0).step()
    assert stats.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for name, p in reference.named_parameters():
        assert torch.allclose(masters(backend)[name], p, atol=1e-6), name


@pytest.mark.parametrize("plan", PLANS)
def test_micro_batches_do_not_change_the_step(plan):
    batch = make_batch(rows=8)
    whole, cut = make_backend(plan), make_backend(plan)
    whole.accumulate(batch, loss_for("pg-tis", batch))
    for start in (0, 3, 4):
        stop = {0: 3, 3: 4, 4: 8}[start]
        cut.accumulate(part_of(batch, slice(start, stop)), loss_for("pg-tis", batch))
    rounding = {"fp32": 1e-5}.get(str(plan), 2e-2 if "bf16" in str(plan) else 3e-3)
    assert distance(gradients(whole), gradients(cut)) < rounding
    a, b = whole.step(), cut.step()
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=rounding)


@pytest.mark.parametrize("plan", PLANS)
def test_16_bit_gradients_are_near_fp32(plan):
    batch = make_batch(rows=8)
    exact, ours = make_backend("fp32"), make_backend(plan)
    for backend in (exact, ours):
        backend.accumulate(batch, loss_for("rloo", batch))
    bound = 5e-2 if "bf16" in str(plan) else 1e-2
    assert distance(gradients(exact), gradients(ours)) < bound
    want, got = exact.step(), ours.step()
    assert not got.skipped
    assert got.grad_norm == pytest.approx(want.grad_norm, rel=bound)


@pytest.mark.parametrize("plan", PLANS)
def test_the_plan_holds_for_live_tensors(plan):
    precision = Precision.parse(plan)
    backend, batch = make_backend(plan), make_batch()
    backend.accumulate(batch, loss_for("rloo", batch))
    seen = precision.verify(backend.live())
    assert seen["master"] == seen["copy"] > 0
    assert seen["logits"] == 1
    assert seen["gradient"] == seen["master"]
    backend.step()
    assert precision.verify(backend.live())["optimizer"] == 2 * seen["master"]
    assert {t.dtype for _, t in backend.weights()} == {torch.float32}


def test_rotary_tables_stay_fp32_when_weights_are_cast_whole():
    """Pitfall 21: ``module.to(16 bits)`` would round the rotary frequencies, too."""
    backend = make_backend("bf16")
    buffers = dict(backend._module.named_buffers())
    assert buffers
    assert all(b.dtype == torch.float32 for b in buffers.values())


def test_an_injected_overflow_skips_the_step_and_nothing_else_moves():
    """Section 3.2; pitfall 19: the moments, AdamW's count and the schedule stand still, the scale halves."""
    backend, batch = make_backend("fp16", warmup=4), make_batch()
    backend.accumulate(batch, loss_for("rloo", batch))
    first = backend.step()
    before, moments = masters(backend), copy.deepcopy(backend._masters._optimizer.state_dict()["state"])
    backend.accumulate(batch, lambda logp, b: (logp.sum() * float("inf"), {}))
    bad = backend.step()
    assert bad.skipped
    assert bad.grad_norm is None
    for name, tensor in masters(backend).items():
        assert torch.equal(tensor, before[name]), name
    for key, state in backend._masters._optimizer.state_dict()["state"].items():
        for k, v in state.items():
            assert torch.equal(v, moments[key][k]), (key, k)
    backend.accumulate(batch, loss_for("rloo", batch))
    after = backend.step()
    assert (first.loss_scale, bad.loss_scale, after.loss_scale) == (65536.0, 65536.0, 32768.0)
    assert not after.skipped
    assert first.lr == pytest.approx(0.25e-3)
    assert after.lr == pytest.approx(0.5e-3)  # the second update, not the third


def test_an_overflow_in_one_micro_batch_is_not_hidden_by_the_next():
    backend, batch = make_backend("fp16"), make_batch()
    backend.accumulate(batch, lambda logp, b: (logp.sum() * 1e30, {}))
    backend.accumulate(batch, loss_for("rloo", batch))
    assert backend.step().skipped


@pytest.mark.parametrize("plan", ["bf16", "fp32"])
def test_without_a_loss_scale_a_nan_gradient_is_skipped_too(plan):
    """BF16 has no overflow check of its own; the step would destroy the weights."""
    backend, batch = make_backend(plan), make_batch()
    before = masters(backend)
    backend.accumulate(batch, lambda logp, b: (logp.sum() * float("nan"), {}))
    assert backend.step().skipped
    assert all(torch.equal(t, before[n]) for n, t in masters(backend).items())


def test_the_scale_grows_after_clean_steps():
    plan = {"preset": "fp16", "loss_scale": {"initial": 256.0, "interval": 2}}
    backend, batch = make_backend(plan), make_batch()
    scales = []
    for _ in range(5):
        backend.accumulate(batch, loss_for("rloo", batch))
        scales.append(backend.step().loss_scale)
    assert scales == [256.0, 256.0, 512.0, 512.0, 1024.0]


def test_a_model_that_always_overflows_stops_with_a_remedy():
    backend, batch = make_backend("fp16"), make_batch(rows=1)

    def overflow():
        backend.accumulate(batch, lambda logp, b: (logp.sum() * float("inf"), {}))
        return backend.step()

    assert all(overflow().skipped for _ in range(MAX_SKIPS_IN_A_ROW - 1))
    with pytest.raises(Overflow, match="in a row had inf or NaN"):
        overflow()


def test_clipping_acts_on_unscaled_gradients():
    """Pitfall 19: with a scale of 65536, clipping before unscaling would shrink every update to nothing."""
    batch = make_batch()
    small, large = make_backend("fp16", max_grad_norm=1e-3), make_backend("fp32", max_grad_norm=1e-3)
    for backend in (small, large):
        backend.accumulate(batch, loss_for("rloo", batch))
    a, b = small.step(), large.step()
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-2)
    clipped = [backend._masters._optimizer.state_dict()["state"][0]["exp_avg"] for backend in (small, large)]
    assert torch.allclose(clipped[0], clipped[1], atol=2e-2 * float(clipped[1].abs().max()))


@pytest.mark.parametrize("plan", ["fp32", "fp16", {"preset": "fp16", "casting": "autocast"}])
def test_resuming_continues_bit_for_bit(plan, tmp_path):
    """Pitfall 18: also the loss scale and its count of clean steps."""
    if plan == "fp16":
        plan = {"preset": "fp16", "loss_scale": {"interval": 3}}
    whole, batches = make_backend(plan), [make_batch(seed=s) for s in range(6)]
    for i, batch in enumerate(batches):
        if i == 2:
            writing = Checkpoints(tmp_path, keep=1)
            writing.save(whole, Progress(2, 0))  # in the background, while the next step changes what it copied
        whole.accumulate(batch, loss_for("rloo", batch))
        whole.step()
    other = make_backend(plan, module=small_module(seed=9))
    writing.wait()
    load(tmp_path / "step-000002", other)
    for batch in batches[2:]:
        other.accumulate(batch, loss_for("rloo", batch))
        other.step()
    for name, tensor in masters(whole).items():
        assert torch.equal(tensor, masters(other)[name]), name
    whole.accumulate(batch, loss_for("rloo", batch))
    other.accumulate(batch, loss_for("rloo", batch))
    assert whole.step() == other.step()


def test_tied_heads_are_reported_under_both_names_and_stay_tied():
    """Pitfall 24."""
    backend, batch = make_backend("fp16"), make_batch()
    backend.accumulate(batch, loss_for("rloo", batch))
    backend.step()
    named = dict(backend.weights())
    assert named["lm_head.weight"] is not None
    assert torch.equal(named["lm_head.weight"], named["model.embed_tokens.weight"])
    assert backend._module.lm_head.weight is backend._module.model.embed_tokens.weight
    assert set(named) == set(backend._module.state_dict())


def test_eq_5_to_7_need_no_second_forward_pass():
    """Pitfall 7: only what carries theta' asks for it."""
    assert not any(ALGORITHMS[n].needs_old for n in ("pg-is", "pg-tis", "pg-mis", "rloo", "reinforce"))
    assert all(ALGORITHMS[n].needs_old for n in ("grpo", "grpo-token-tis", "grpo-seq-mis", "gspo", "dapo", "icepop"))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
def test_cuda_agrees_with_cpu(plan):
    batch = make_batch(rows=8)
    cpu = make_backend("fp32")
    module = small_module().cuda().train()
    model = Model(module, byte_tokenizer(), (256,), 257, 512, torch.device("cuda"))
    gpu = SingleBackend(model, Precision.parse(plan), OptimSpec.model_validate({"lr": 1e-3}), 1.0, 10)
    for backend in (cpu, gpu):
        backend.accumulate(batch, loss_for("rloo", batch))
    assert distance(gradients(cpu), gradients(gpu).cpu()) < (5e-2 if "bf16" in str(plan) else 1e-2)
    want, got = cpu.step(), gpu.step()
    assert got.grad_norm == pytest.approx(want.grad_norm, rel=5e-2 if "bf16" in str(plan) else 1e-2)
