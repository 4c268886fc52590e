"""The precision plan: Table 1's numbers, refusals with a remedy, casts, the loss scale's rules on real gradients."""

from __future__ import annotations

import math
import random
import tomllib
from fractions import Fraction

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tenbit.backends.masters import Masters
from tenbit.loss_scale import LossScale
from tenbit.precision import Format, Precision
from tenbit.recipe import OptimSpec

PRESETS = ["fp16", "bf16", "fp32"]
PAIRS = [f"{a}/{b}" for a in PRESETS for b in PRESETS]


@pytest.mark.parametrize("fmt", Format)
def test_table_1_equals_torch(fmt: Format):
    info = torch.finfo(fmt.dtype)
    assert fmt.bytes * 8 == info.bits
    assert fmt.epsilon == info.eps
    assert fmt.smallest_normal == info.smallest_normal
    assert fmt.largest == info.max
    smallest = torch.tensor(fmt.smallest_subnormal, dtype=torch.float64).to(fmt.dtype)
    assert float(smallest) == fmt.smallest_subnormal > 0
    assert float(torch.tensor(fmt.smallest_subnormal / 2, dtype=torch.float64).to(fmt.dtype)) == 0.0
    one = torch.ones((), dtype=fmt.dtype)
    assert float(torch.nextafter(one, one * 2)) == 1 + fmt.epsilon
    assert Format.of(fmt.dtype) is fmt


def test_table_1_as_printed():
    fp16, bf16, fp32 = Format.FP16, Format.BF16, Format.FP32
    assert [(f.exponent_bits, f.mantissa_bits) for f in (fp16, bf16, fp32)] == [(5, 10), (8, 7), (8, 23)]
    assert [f.smallest_normal for f in (fp16, bf16, fp32)] == [2.0**-14, 2.0**-126, 2.0**-126]
    assert [f.smallest_subnormal for f in (fp16, bf16, fp32)] == [2.0**-24, 2.0**-133, 2.0**-149]
    assert fp16.largest == 65504
    assert bf16.largest == pytest.approx(3.4e38, rel=0.01)
    assert [1 + f.epsilon for f in (fp16, bf16)] == [1.0009765625, 1.0078125]


def test_fp16_has_eight_times_the_precision_of_bf16():
    """Section 3.4, on real numbers: the largest relative rounding error over [1, 2)."""
    x = torch.linspace(1, 2, 10_001, dtype=torch.float64)[:-1]
    error = {f: float(((x.to(f.dtype).double() - x) / x).abs().max()) for f in (Format.FP16, Format.BF16)}
    assert error[Format.BF16] / error[Format.FP16] == pytest.approx(8.0, rel=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str):
    p = Precision.parse(name)
    assert p.compute == p.rollout == p.sync == p.export == Format(name)
    assert p.master == p.optimizer == p.reduce == p.logits == Format.FP32
    assert p.casting == "whole"
    assert p.head == "model"
    assert p.name == name
    assert p.has_copy == (name != "fp32")
    assert p.copy_format == Format(name)
    assert (p.loss_scale == LossScale.model_validate({})) if name == "fp16" else (p.loss_scale is None)


@pytest.mark.parametrize("pair", PAIRS)
def test_any_training_rollout_pair(pair: str):
    train, rollout = pair.split("/")
    p = Precision.parse(pair)
    assert (p.compute, p.rollout, p.sync, p.export) == (train, rollout, rollout, rollout)
    assert (p.loss_scale is not None) == (train == "fp16")
    assert p.name == (train if train == rollout else pair)
    assert Precision.parse(p) is p
    assert Precision.parse(p.model_dump(mode="json")) == p, "what a run stores must give the same plan again"


def test_table_form_reaches_the_parts():
    table = tomllib.loads("""
        preset = "fp16/bf16"
        casting = "autocast"
        head = "fp32"
        sync = "fp32"
        loss_scale = { initial = 1024.0, interval = 5 }
    """)
    p = Precision.parse(table)
    assert (p.compute, p.rollout, p.sync, p.export) == ("fp16", "bf16", "fp32", "bf16")
    assert p.casting == "autocast"
    assert not p.has_copy
    assert p.copy_format == Format.FP32
    assert p.head_dtype("train") == p.head_dtype("rollout") == torch.float32
    assert p.loss_scale == LossScale(initial=1024.0, growth=2.0, backoff=0.5, interval=5)
    assert Precision.parse({"preset": "fp16", "reduce": "fp16"}).reduce == Format.FP16
    model = Precision.parse({"preset": "fp16/bf16"})
    assert (model.head_dtype("train"), model.head_dtype("rollout")) == (torch.float16, torch.bfloat16)
    assert Precision.parse({"compute": "bf16", "rollout": "fp32"}).name == "bf16/fp32"
    assert table["preset"] == "fp16/bf16", "parsing must not change what it was given"


@pytest.mark.parametrize(
    ("plan", "key", "remedy"),
    [
        ("fp8", "precision 'fp8'", "write 'fp16', 'bf16', 'fp32'"),
        ("fp16/int4", "'int4'", "a training/rollout pair such as 'bf16/fp32'"),
        ("/fp16", "precision '/fp16'", "write 'fp16'"),
        ("fp16/bf16/fp32", "'bf16/fp32'", "write 'fp16'"),
        ("FP16", "precision 'FP16'", "write 'fp16'"),
        ("", "precision ''", "write 'fp16'"),
        ({"casting": "whole"}, "precision", "needs 'preset', or both 'compute' and 'rollout'"),
        ({"compute": "fp16"}, "precision", "needs 'preset', or both 'compute' and 'rollout'"),
        ({"preset": "fp16", "master": "fp16"}, "precision.master", "Remove the key"),
        ({"preset": "bf16", "master": "bf16", "optimizer": "bf16"}, "precision.master", "Remove the key"),
        ({"preset": "bf16", "optimizer": "bf16"}, "precision.optimizer", "Remove the key"),
        ({"preset": "fp16", "logits": "fp16"}, "precision.logits", "Remove the key"),
        ({"preset": "fp16", "loss_scale": None}, "precision.loss_scale", "Remove the key for the dynamic default"),
        ({"preset": "bf16", "loss_scale": {}}, "precision.loss_scale", "Remove one of them"),
        ({"preset": "fp32", "casting": "autocast"}, "precision.casting", "Remove the key"),
        ({"preset": "fp16", "reduce": "bf16"}, "precision.reduce", "in 'fp32' or in the format they were computed in"),
        ({"preset": "fp16", "casting": "autocast", "reduce": "fp16"}, "precision.reduce", "Remove the key"),
        ({"preset": "fp16", "sync": "bf16"}, "precision.sync", "set it to 'fp16' or 'fp32'"),
        ({"preset": "fp16", "export": "bf16"}, "precision.export", "Remove the key"),
        ({"preset": "bf16/fp16", "export": "bf16"}, "precision.export", "Remove the key"),
        ({"preset": "fp16", "residual_scale": 0.3}, "precision.residual_scale", "Take 0.25"),
        ({"preset": "fp16", "residual_scale": 2.0**-60}, "precision.residual_scale", "Take 5.96046e-08 or more"),
        ({"preset": "fp16", "residual_scale": 2.0}, "residual_scale", "less than or equal to 1"),
        ({"preset": "fp32", "fp32": ["model.layers.0.mlp"]}, "precision.fp32", "Remove the key"),
        ({"preset": "fp16", "rollout_bits": 3, "rollout_weights": "fp8"}, "precision.rollout_bits", "Remove one"),
        ({"preset": "fp16", "loss_scale": {"limit": 1024.0}}, "precision.loss_scale.initial", "raise the other"),
    ],
)
def test_impossible_plans_are_refused_with_key_and_remedy(plan, key: str, remedy: str):
    with pytest.raises(ValueError, match=r"(?s).") as caught:
        Precision.parse(plan)
    message = str(caught.value)
    assert key in message
    assert remedy in message


@pytest.mark.parametrize(
    ("plan", "key"),
    [
        ({"preset": "fp16", "rollouts": "fp16"}, "rollouts"),
        ({"preset": "fp16", "compute": "fp61"}, "compute"),
        ({"preset": "fp16", "casting": "partly"}, "casting"),
        ({"preset": "fp16", "loss_scale": {"initial": 0.5}}, "loss_scale.initial"),
        ({"preset": "fp16", "loss_scale": {"growth": 1.0}}, "loss_scale.growth"),
        ({"preset": "fp16", "loss_scale": {"backoff": 1.0}}, "loss_scale.backoff"),
        ({"preset": "fp16", "loss_scale": {"interval": 0}}, "loss_scale.interval"),
        ({"preset": "fp16", "loss_scale": {"window": 3}}, "loss_scale.window"),
    ],
)
def test_pitfall_29_misspelt_keys_and_values_out_of_range_are_refused(plan: dict, key: str):
    with pytest.raises(ValidationError) as caught:
        Precision.parse(plan)
    assert [".".join(map(str, e["loc"])) for e in caught.value.errors()] == [key]


def test_a_plan_cannot_be_changed():
    p = Precision.parse("fp16")
    with pytest.raises(ValidationError, match="frozen"):
        p.rollout = Format.BF16


@pytest.mark.parametrize("pair", PAIRS)
def test_pitfall_15_to_engine_casts_once_from_the_masters(pair: str):
    """FP32 -> the rollout's format, and not by way of the training format, which would round twice."""
    p = Precision.parse(pair)
    torch.manual_seed(0)
    masters = {"w": nn.Parameter(torch.randn(1000)), "steps": torch.arange(5)}
    cast = dict(p.to_engine(masters.items()))
    assert cast["w"].dtype == p.rollout.dtype
    assert not cast["w"].requires_grad
    assert torch.equal(cast["w"], masters["w"].detach().to(p.rollout.dtype))
    assert cast["steps"].dtype == torch.int64
    if p.compute.mantissa_bits < p.rollout.mantissa_bits:
        twice = masters["w"].detach().to(p.compute.dtype).to(p.rollout.dtype)
        assert not torch.equal(cast["w"], twice)


def test_weights_may_travel_in_fp32():
    p = Precision.parse({"preset": "fp16", "sync": "fp32"})
    w = torch.randn(10)
    assert torch.equal(dict(p.to_engine([("w", w)]))["w"], w)


def live(p: Precision, **changed: torch.dtype) -> list[tuple[str, str, Tensor]]:
    formats = {
        "master": p.master.dtype,
        "optimizer": p.optimizer.dtype,
        "copy": p.copy_format.dtype,
        "gradient": p.reduce.dtype,
        "logits": p.logits.dtype,
        "rollout": p.rollout.dtype,
    }
    return [(part, f"layer.{part}", torch.zeros(2, dtype=d)) for part, d in {**formats, **changed}.items()]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("casting", ["whole", "autocast"])
def test_verify_accepts_what_the_plan_says_and_finds_every_wrong_cast(pair: str, casting: str):
    if casting == "autocast" and pair.startswith("fp32"):
        pytest.skip("refused: nothing to cast")
    p = Precision.parse({"preset": pair, "casting": casting})
    right = live(p)
    assert p.verify(right) == dict.fromkeys((part for part, _, _ in right), 1)
    assert p.verify([*right, ("master", "position_ids", torch.arange(3))])["master"] == 2
    for part, name, tensor in right:
        for wrong in {f.dtype for f in Format} - {tensor.dtype}:
            with pytest.raises(ValueError, match=f"{part} tensor '{name}' is {wrong}"):
                p.verify(live(p, **{part: wrong}))
    assert p.verify([]) == {}


def test_rows_show_every_part_of_the_plan():
    rows = Precision.parse("fp16/bf16").rows()
    shown = {key: value for key, value, _ in rows}
    rare = {"rollout_bits", "rollout_weights", "fp32", "residual_scale"}
    assert set(shown) == set(Precision.model_fields) - rare
    more = {"preset": "fp16", "fp32": ["model.layers.0.mlp"], "residual_scale": 0.5, "loss_scale": {"limit": 131072.0}}
    everything = {key: value for key, value, _ in Precision.parse(more).rows()}
    assert everything["fp32"] == "model.layers.0.mlp"
    assert everything["residual_scale"] == "0.5"
    assert everything["loss_scale"] == "65536, ×2 after 2000, ×0.5 on overflow, at most 131072"
    assert {k: v for k, v, _ in Precision.parse("fp16/fp8").rows()}["rollout_weights"] == "fp8"
    assert shown["compute"] == "fp16"
    assert shown["rollout"] == "bf16"
    assert shown["loss_scale"] == "65536, ×2 after 2000, ×0.5 on overflow"
    assert {k: v for k, v, _ in Precision.parse("bf16").rows()}["loss_scale"] == "none"
    assert all(what for _, _, what in rows)


def test_autocast_computes_in_the_plans_format():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    for name in ("fp16", "bf16"):
        p = Precision.parse({"preset": name, "casting": "autocast"})
        with p.autocast("cpu"):
            assert layer(x).dtype == p.compute.dtype
        with Precision.parse(name).autocast("cpu"):
            assert layer(x).dtype == torch.float32, "cast whole: nothing is cast a second time"


# ---- dynamic loss scaling (section 3.2), with real FP32 masters and FP16 gradients


class Trained:
    """One weight trained as the `whole` way does it: FP16 gradients, taken to FP32, unscaled, stepped."""

    def __init__(self, **rules: float) -> None:
        self.master = nn.Parameter(torch.ones(3))
        plan = Precision.parse({"preset": "fp16", "loss_scale": rules})
        optim = OptimSpec.model_validate({"lr": 0.1, "max_grad_norm": 1e9})
        self.masters = Masters({"w": self.master}, plan, optim, 100)

    def step(self, bad: float | None = None) -> None:
        copy = self.master.detach().to(torch.float16).requires_grad_()
        self.masters.scaled((copy.float() * torch.tensor([1.0, 2.0, -1.0])).sum() * 1e-3).backward()
        assert copy.grad is not None
        assert copy.grad.dtype == torch.float16
        if bad is not None:
            copy.grad[1] = bad
        self.master.grad = copy.grad.float()
        self.masters.step()

    @property
    def scale(self) -> float:
        return self.masters.state().counts["loss_scale"]

    @property
    def moment(self) -> torch.Tensor:
        return self.masters.state().tensors["exp_avg.w"].clone()

    @property
    def counted(self) -> int:
        return int(self.masters._optimizer.state[self.master]["step"])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_overflow_skips_the_step_and_halves_the_scale_at_once(bad: float):
    t = Trained()
    assert t.scale == 65536
    t.step()
    before, moments = t.master.detach().clone(), t.moment
    t.step(bad)
    assert t.scale == 32768
    assert torch.equal(t.master.detach(), before)
    assert torch.equal(t.moment, moments)
    assert t.counted == 1
    t.step(bad)
    assert t.scale == 16384
    t.step()
    assert t.counted == 2
    assert not torch.equal(t.master.detach(), before)


def test_the_scale_doubles_after_n_clean_steps_and_an_overflow_starts_the_count_again():
    t = Trained(initial=256.0, interval=3)
    scales = []
    for bad in (None, None, None, None, None, math.inf, None, None, None):
        t.step(bad)
        scales.append(t.scale)
    assert scales == [256, 256, 512, 512, 512, 256, 256, 256, 512]
    assert t.counted == 8


def test_the_rules_of_the_plan_are_the_scalers():
    t = Trained(initial=64.0, growth=4.0, backoff=0.25, interval=1)
    t.step()
    assert t.scale == 256
    t.step(math.inf)
    assert t.scale == 64


def test_pitfall_18_the_scale_and_its_counter_are_state():
    """A resumed scale grows at the step at which the uninterrupted one does."""
    whole, first = Trained(initial=8.0, interval=3), Trained(initial=8.0, interval=3)
    for _ in range(2):
        whole.step()
        first.step()
    resumed, kept = Trained(initial=8.0, interval=3), first.masters.state()
    resumed.masters.restore(kept.counts, lambda tensors: [t.copy_(kept.tensors[n]) for n, t in tensors.items()])
    for t in (whole, resumed):
        t.step()
    assert whole.masters.state().counts == resumed.masters.state().counts
    assert resumed.scale == 16
    assert torch.equal(whole.master, resumed.master)


def test_pitfall_17_masters_and_what_updates_them_are_fp32():
    """FP16 gradients meet FP32 masters: what is unscaled, clipped and stepped with has FP32's range and digits."""
    t = Trained()
    t.step()
    assert {x.dtype for x in t.masters.state().tensors.values()} == {torch.float32}
    t.master.grad = torch.full((3,), 2.0**-24 * 65536)  # 2^-24, FP16's smallest number, as it comes scaled
    before = t.moment
    t.masters.step()
    added = t.moment.double() - 0.9 * before.double()
    assert torch.allclose(added, torch.full((3,), 0.1 * 2.0**-24, dtype=torch.double), rtol=1e-2)


def test_the_scale_keeps_the_rules_of_torchs_grad_scaler():
    """Any backoff and growth, from any start; torch's own decides, step by step."""
    rules = {"initial": 1000.0, "growth": 3.0, "backoff": 0.25, "interval": 2}
    ours = Precision.parse({"preset": "fp16", "loss_scale": rules}).scaler()
    theirs = torch.amp.GradScaler("cpu", 1000.0, 3.0, 0.25, 2)
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.0)
    for bad in (0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0):
        assert ours.value == pytest.approx(theirs.get_scale())
        theirs.scale(p.sum()).backward()
        p.grad = torch.full((1,), math.nan if bad else 1.0)
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.update(bool(bad))
        assert ours.clean_steps == theirs.state_dict()["_growth_tracker"]


def test_unscaling_and_clipping_are_torchs():
    """Pitfall 19, against unscale_ and clip_grad_norm_ one after the other; the norm too."""
    torch.manual_seed(0)
    gradient = torch.randn(40) * 3
    ours, theirs = (nn.Parameter(torch.ones(40)) for _ in range(2))
    masters = Masters({"w": ours}, Precision.parse("fp16"), OptimSpec.model_validate({"max_grad_norm": 0.5}), 10)
    ours.grad, theirs.grad = gradient * 65536.0, gradient.clone()
    norm = nn.utils.clip_grad_norm_([theirs], 0.5)
    assert masters.step().grad_norm == pytest.approx(float(norm), rel=1e-6)
    assert torch.allclose(masters.state().tensors["exp_avg.w"], 0.1 * theirs.grad, rtol=1e-5)


def test_an_update_of_1e_6_survives_in_fp32_masters_only():
    """Why 16-bit masters are refused: next to 1, FP16 has steps of 1e-3 and BF16 of 8e-3."""
    for fmt, moves in ((Format.FP32, True), (Format.FP16, False), (Format.BF16, False)):
        w = torch.ones(1, dtype=fmt.dtype)
        for _ in range(100):
            w += torch.full((1,), 1e-6).to(fmt.dtype)
        assert (float(w) != 1.0) == moves


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_without_a_loss_scale_it_is_one_and_stays_one(name: str):
    scale = Precision.parse(name).scaler()
    assert not scale.moves
    scale.update(skipped=True)
    scale.restore(65536.0, 3)
    assert (scale.value, scale.clean_steps) == (1.0, 0)


def small_language_model() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config)


def gradients(dtype: torch.dtype, factor: float) -> Tensor:
    """All gradients of factor x the mean log-loss of a small Qwen2 held in `dtype`, without the embedding's rows."""
    model = small_language_model().to(dtype)
    tokens = torch.tensor([[random.Random(i).randrange(64) for i in range(40)]])
    logits = model(input_ids=tokens).logits.float()
    (nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]) * factor).backward()
    return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None and "embed" not in n])


def test_fp16_gradients_underflow_without_loss_scaling_and_do_not_with_it():
    """Section 3.2 on a real network: loss x 1e-3 leaves FP16 gradients zero or subnormal at scale 1, hardly at 2^16."""
    truth = gradients(torch.float32, 1e-3)
    lost = {}
    for scale in (1.0, 2.0**16):
        g = gradients(torch.float16, 1e-3 * scale).float()
        assert g.isfinite().all()
        alive = truth != 0
        zero = (g == 0)[alive]
        subnormal = ((g != 0) & (g.abs() < Format.FP16.smallest_normal))[alive]
        error = float((g / scale - truth).norm() / truth.norm())
        lost[scale] = (float(zero.float().mean()), float(subnormal.float().mean()), error)
    zero, subnormal, error = lost[1.0]
    assert zero > 0.02  # 4.6% zero, 95.4% subnormal, relative error 5.6e-2
    assert zero + subnormal > 0.95
    zero, subnormal, scaled_error = lost[2.0**16]
    assert zero < 0.001  # none zero, 0.15% subnormal, relative error 7.9e-4: FP16's own rounding
    assert subnormal < 0.02
    assert scaled_error < 0.005
    assert scaled_error < error / 10


# --- weights rounded to fewer bits before they are rolled out


def rounded(value: float, bits: int) -> float:
    """Half to even at `bits` mantissa bits, in exact fractions."""
    if value == 0:
        return 0.0
    exact, unit = Fraction(value), Fraction(2)
    exponent = 0
    while abs(exact) >= unit ** (exponent + 1):
        exponent += 1
    while abs(exact) < unit**exponent:
        exponent -= 1
    step = unit**exponent / 2**bits
    return float(round(exact / step) * step)


@pytest.mark.parametrize("bits", [1, 3, 5, 9])
def test_rolled_out_weights_are_rounded_half_to_even(bits):
    plan = Precision.parse(f"fp16/fp16~{bits}")
    generator = torch.Generator().manual_seed(bits)
    values = torch.cat(
        [torch.randn(300, generator=generator), torch.tensor([0.0, -0.0, 1.0, 1.5, 1.75, 2.25, -3.5, 1e-4])]
    )
    got = plan.rolled_out("w", values)
    assert got.tolist() == [rounded(v, bits) for v in values.tolist()]
    (_, sent), (_, ids) = plan.to_engine([("w", values), ("ids", torch.arange(3))])
    assert torch.equal(sent, got.half())
    assert torch.equal(ids, torch.arange(3))


def test_three_bits_are_those_of_fp8_e4m3():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)).clamp(-400, 400)
    normal = values.abs() > 2.0**-6
    expected = values[normal].to(torch.float8_e4m3fn).float()
    assert torch.equal(Precision.parse("fp16/fp16~3").rolled_out("w", values[normal]), expected)


def test_the_loss_scale_grows_to_its_limit_and_not_beyond():
    rules = {"initial": 1024.0, "interval": 1, "limit": 3000.0}
    scale = Precision.parse({"preset": "fp16", "loss_scale": rules}).scaler()
    seen = [scale.value]
    for skipped in (False, False, False, True, False, False):
        scale.update(skipped)
        seen.append(scale.value)
    assert seen == [1024.0, 2048.0, 3000.0, 3000.0, 1500.0, 3000.0, 3000.0]
    scale.restore(65536.0, 0)  # from before the limit was set
    scale.update(False)
    assert scale.value == 65536.0


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("fp16/fp8", "fp16/fp8"),
        ("bf16/fp8", "bf16/fp8"),
        ("fp16/fp16~fp8", "fp16/fp8"),
        ("bf16/fp16~fp8", "bf16/fp16~fp8"),
        ({"preset": "fp16", "rollout_weights": "fp8"}, "fp16/fp8"),
    ],
)
def test_fp8_rollouts_have_a_name_that_gives_the_plan_back(spec, name):
    plan = Precision.parse(spec)
    assert plan.name == name
    assert Precision.parse(name) == plan
    assert plan.spacing == 2.0**-3
    assert plan.compute == Precision.parse(name.partition("/")[0]).compute, "training is untouched"


@pytest.mark.parametrize(
    ("name", "shape", "rounded"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (4, 8), True),
        ("model.layers.0.mlp.gate_proj.weight", (4, 8), True),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 4, 8), True),
        ("model.layers.0.biased.weight", (4, 8), True),
        ("transformer.h.0.mlp.c_fc.weight", (4, 8), True),
        ("model.layers.0.self_attn.q_proj.bias", (8,), False),
        ("model.layers.0.self_attn.sinks", (4, 8), False),
        ("model.layers.0.self_attn.q_norm.weight", (4, 8), False),
        ("model.layers.0.mlp.gate.weight", (4, 8), False),
        ("model.layers.0.mlp.router.layer.weight", (4, 8), False),
        ("model.layers.0.mlp.shared_expert_gate.weight", (4, 8), False),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 8), False),
        ("model.layers.0.linear_attn.conv1d.weight", (4, 1, 8), False),
        ("model.embed_tokens.weight", (4, 8), False),
        ("lm_head.weight", (4, 8), False),
        ("output.weight", (4, 8), False),
    ],
)
def test_fp8_takes_linear_layers_and_experts_and_nothing_else(name, shape, rounded):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    got = Precision.parse("fp16/fp8").rolled_out(name, weight)
    assert torch.equal(got, weight) != rounded


def test_one_module_in_fp32_may_be_written_as_a_string():
    assert Precision.parse({"preset": "fp16", "fp32": "model.layers.0.mlp"}).fp32 == ("model.layers.0.mlp",)


def test_a_rounded_rollout_has_its_own_name_and_is_refused_where_it_rounds_nothing():
    plan = Precision.parse("fp16/fp16~4")
    assert plan.name == "fp16/fp16~4"
    assert Precision.parse(plan.name) == plan
    assert plan.spacing == 2.0**-4
    assert Precision.parse("fp16/bf16").spacing == 2.0**-7
    with pytest.raises(ValueError, match="rollout_bits = 7"):
        Precision.parse("bf16/bf16~7")
    with pytest.raises(ValueError, match="rollout_bits"):
        Precision.parse("fp16/fp16~many")
