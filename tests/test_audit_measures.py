"""What `tenbit audit` measures, against the cast itself, autograd and hand calculation; and its page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from audited import LONGEST, answers, audited, experts, inside_mlp, recipe_for, spoilt, stream
from conftest import small_module
from test_report_many import CHROMIUM, browse
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tenbit import algorithms
from tenbit.batching import totals
from tenbit.models.logprobs import Head
from tenbit.precision import Format, Precision
from tenbit.report.audit import write_page
from tenbit.report.audit_figures import _short
from tenbit.studies.audit import save
from tenbit.studies.audit_anatomy import Anatomy, anatomy_of
from tenbit.studies.audit_backward import (
    Backward,
    Histogram,
    _Seen,
    highest_scale,
    lowest_scale,
    strict_scale,
    window,
)
from tenbit.studies.audit_forward import Forward, Place, Range
from tenbit.studies.audit_passes import batches_of
from tenbit.studies.audit_run import watch
from tenbit.studies.audit_verdict import judge, loss_share, met, remedied
from tenbit.studies.audit_weights import measure_weight

FP16, BF16 = Format.FP16, Format.BF16


def histogram(values: torch.Tensor, format: Format = FP16) -> Histogram:
    seen = _Seen(format, values.device)
    for part in values.split(1000):  # in pieces, which must add up
        seen.add(part)
    return seen.histogram()


def edges(format: Format) -> torch.Tensor:
    """Numbers at which a cast decides otherwise, and their neighbours in FP32, both signs."""
    tiny, normal, top = format.smallest_subnormal, format.smallest_normal, format.largest
    ulp = top * format.epsilon / (2 - format.epsilon)
    at = torch.tensor([tiny / 2, tiny, 1.5 * tiny, normal - tiny / 2, normal - tiny, normal, top, top + ulp / 2])
    above, below = torch.tensor(math.inf), torch.tensor(0.0)
    around = torch.cat([at, torch.nextafter(at, above), torch.nextafter(at, below), 2 * at, at / 2])
    return torch.cat([around, -around, torch.zeros(3)])


@pytest.fixture(scope="module")
def real():
    """Real gradients: of a small model's head, over 40 powers of two."""
    module = small_module("llama")
    ids = torch.arange(60).view(4, 15)
    loss = module(input_ids=ids, labels=ids).loss
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


@pytest.mark.parametrize("format", [FP16, BF16], ids=str)
@pytest.mark.parametrize("power", [-12, -3, 0, 1, 5, 16, 17, 20, 23, 30, 40])
def test_histogram_arithmetic_is_the_cast(real, format, power):
    for values in (real, edges(FP16)):
        scaled = values.double() * 2.0**power
        cast = scaled.float().to(format.dtype).double()
        lost = histogram(values, format).at(2.0**power)
        gone = (cast == 0) & (values != 0)
        assert lost.values == int((values != 0).sum())
        assert lost.flushed == int(gone.sum())
        assert lost.subnormal == int(((cast != 0) & (cast.abs() < format.smallest_normal)).sum())
        assert lost.overflowed == int(cast.isinf().sum())
        share = float(values.double()[gone].square().sum() / values.double().square().sum())
        assert lost.squares_share == pytest.approx(share, rel=1e-9)


def test_histogram_of_zeros_and_of_what_is_not_finite():
    h = histogram(torch.tensor([0.0, math.inf, -math.inf, math.nan, -2.0, 0.5]))
    assert (h.zeros, h.not_finite, h.values, h.largest, h.smallest) == (1, 3, 2, 2.0, 0.5)
    assert h.norm == pytest.approx(math.sqrt(4.25))
    empty = histogram(torch.zeros(4))
    assert (empty.values, empty.norm, empty.at(1.0).flushed_share) == (0, 0.0, 0.0)


def test_histograms_add_up(real):
    whole, half = histogram(real), len(real) // 2
    both = histogram(real[:half]) + histogram(real[half:])
    assert both.at(2.0**10) == whole.at(2.0**10) or both.at(2.0**10).squares_share == pytest.approx(
        whole.at(2.0**10).squares_share
    )
    assert (both.largest, both.smallest, both.zeros) == (whole.largest, whole.smallest, whole.zeros)


def test_the_window_is_where_the_cast_says(real):
    h, share = histogram(real), loss_share(FP16)
    high, low, strict = highest_scale(h), lowest_scale(h, share), strict_scale(h)

    def flushed(scale: float) -> tuple[int, float]:
        cast = (real.double() * scale).float().to(FP16.dtype)
        gone = (cast == 0) & (real != 0)
        return int(gone.sum()), float(real.double()[gone].square().sum() / real.double().square().sum())

    assert (real * high).to(FP16.dtype).isfinite().all()
    assert not (real * high * 2).to(FP16.dtype).isfinite().all()
    assert flushed(low)[1] <= share < flushed(low / 2)[1]
    assert flushed(strict)[0] == 0 < flushed(strict / 2)[0]
    a, b = Place("a", "input"), Place("b", "weight")
    found = window({a: h, b: histogram(real * 1024), Place("c", "output"): histogram(torch.zeros(3))}, share)
    assert (found.low_at, found.high_at) == (a, b)
    assert (found.low, found.high) == (low, high / 1024)


def test_weights_against_the_cast():
    w = torch.cat([edges(FP16), torch.randn(500, generator=torch.Generator().manual_seed(0))])
    found = measure_weight("w", w, FP16)
    cast = w.half().double()  # the test's own cast
    assert found.overflowed == int(cast.isinf().sum()) > 0
    assert found.flushed == int(((cast == 0) & (w != 0)).sum()) > 0
    assert found.subnormal == int(((cast != 0) & (cast.abs() < 2.0**-14)).sum()) > 0
    kept = cast.isfinite() & (w != 0)
    error, size = (cast - w.double())[kept].abs(), w.double()[kept].abs()
    assert found.worst_error == float((error / size).max()) == 1.0
    assert found.rms_error == pytest.approx(float(error.norm() / size.norm()))
    plain = measure_weight("w", torch.randn(1000), FP16)
    assert 0 < plain.rms_error < plain.unit == 2.0**-11
    assert plain.fits
    assert not plain.lossy
    assert measure_weight("w", torch.tensor([math.nan, 1.0]), FP16).not_finite == 1
    assert measure_weight("w", torch.zeros(3), FP16).rms_error == 0


@pytest.fixture(scope="module")
def watched():
    """A model, its batches, and what was seen of it."""
    model, recipe = spoilt(), recipe_for()
    rows = answers(model, recipe)
    return model, recipe, rows, watch(model, recipe, recipe.precision, rows, totals(rows, LONGEST))


def by_hand(model: Any, recipe: Any, rows: Any) -> tuple[dict[str, list], dict[str, list]]:
    """Values and gradients of layer 0 of a Llama, written out, over all micro-batches; gradients by autograd.grad."""
    module, values, grads = model.module, {}, {}
    layer, heads = module.model.layers[0], 4
    total = totals(rows, LONGEST)
    for _, batch in batches_of(rows, recipe.optim.token_budget, model.pad_token_id):
        x = module.model.embed_tokens(batch.tokens)
        at = torch.arange(x.shape[1])[None]
        position = module.model.rotary_emb(x, at)
        normed = layer.input_layernorm(x)
        attn = layer.self_attn
        q, k = attn.q_proj(normed), attn.k_proj(normed)
        split = [t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (q, k)]
        rotated, key = apply_rotary_pos_emb(*split, *position)
        value = attn.v_proj(normed).unflatten(-1, (-1, 16)).transpose(1, 2)
        key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
        product = rotated @ key.transpose(-1, -2)
        future = torch.ones_like(product[0, 0], dtype=torch.bool).triu(1)
        mixed = (product / 4).masked_fill(future, -math.inf).softmax(-1) @ value
        middle = x + attn.o_proj(mixed.transpose(1, 2).flatten(2))
        again = layer.post_attention_layernorm(middle)
        gate, up = layer.mlp.gate_proj(again), layer.mlp.up_proj(again)
        inner = silu(gate) * up
        out = middle + layer.mlp.down_proj(inner)
        hidden = module.model.norm(module.model.layers[1](out, position_embeddings=position))
        logits = module.lm_head(hidden)
        logp = logits.log_softmax(-1)[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0]
        index = (batch.prompt_length[:, None] - 1 + torch.arange(batch.mask.shape[1])).clamp(max=logp.shape[1] - 1)
        loss = algorithms.loss(recipe.algorithm.build(), logp.gather(1, index), batch, total)[0]
        named = {
            "stream": x, "q": q, "product": product, "middle": middle, "gate": gate, "inner": inner, "out": out,
            "logits": logits,
        }  # fmt: skip
        wanted = {"q": q, "gate": gate, "inner": inner, "out": out, "stream": x, "logits": logits, "again": again}
        wanted |= {"down": layer.mlp.down_proj.weight, "embed": module.model.embed_tokens.weight}
        found = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
        apart = middle.detach().requires_grad_()
        (found["through norm"],) = torch.autograd.grad(layer.post_attention_layernorm(apart), apart, found.pop("again"))
        for into, what in ((values, named), (grads, found)):
            for name, t in what.items():
                into.setdefault(name, []).append(t.detach().flatten())
    return values, grads


def test_forward_is_what_the_formula_gives(watched):
    model, recipe, rows, seen = watched
    values, _ = by_hand(model, recipe, rows)
    layer = "model.layers.0"
    places = {
        "stream": Place(layer, "input"),
        "q": Place(f"{layer}.self_attn.q_proj", "output"),
        "product": Place(f"{layer}.self_attn", "product"),
        "middle": Place(f"{layer}.post_attention_layernorm", "input"),
        "gate": Place(f"{layer}.mlp.act_fn", "input"),
        "inner": Place(f"{layer}.mlp.down_proj", "input"),
        "out": Place(layer, "output"),
    }
    for name, place in places.items():
        whole = torch.cat(values[name])
        found = seen.forward[place]
        assert found.count == len(whole), name
        assert found.largest == pytest.approx(float(whole.abs().max()), rel=1e-4), name
        assert found.rms == pytest.approx(float(whole.square().mean().sqrt()), rel=1e-4), name
    scores = seen.forward[Place(f"{layer}.self_attn", "scores")]
    assert scores.largest == pytest.approx(float(torch.cat(values["product"]).abs().max()) / 4, rel=1e-4)
    assert seen.forward[Place("lm_head", "logits")].largest <= float(torch.cat(values["logits"]).abs().max()) * 1.0001
    assert seen.micro_batches > 1


def test_gradients_are_autograds(watched):
    model, recipe, rows, seen = watched
    _, grads = by_hand(model, recipe, rows)
    layer = "model.layers.0"
    places = {
        "q": Place(f"{layer}.self_attn.q_proj", "output"),
        "gate": Place(f"{layer}.mlp.gate_proj", "output"),
        "inner": Place(f"{layer}.mlp.down_proj", "input"),
        "out": Place(layer, "output"),
        "through norm": Place(f"{layer}.post_attention_layernorm", "input"),
        "stream": Place("model.embed_tokens", "output"),
        "logits": Place("lm_head", "logits"),
        "down": Place(f"{layer}.mlp.down_proj.weight", "weight"),
        "embed": Place("model.embed_tokens.weight", "weight"),
    }
    for name, place in places.items():
        whole, found = torch.cat(grads[name]), seen.backward[place]
        assert found.largest == pytest.approx(float(whole.abs().max()), rel=1e-3), name
        assert found.norm == pytest.approx(float(whole.double().norm()), rel=1e-4), name
        if name != "logits":  # there only rows that have a loss were looked at
            assert found.values + found.zeros == len(whole), name


def test_log_probabilities_are_those_of_a_plain_forward_pass(watched):
    model, _, rows, seen = watched
    for row, logp in zip(rows, seen.logps, strict=True):
        c = row.rollout.completion
        with torch.no_grad():
            z = model.module(input_ids=torch.tensor([[*c.prompt_ids, *c.response_ids]])).logits[0]
        want = z.log_softmax(-1)[len(c.prompt_ids) - 1 : -1].gather(1, torch.tensor(c.response_ids)[:, None])[:, 0]
        assert torch.allclose(logp, want, atol=1e-5)


def test_the_heads_product_is_seen_before_its_softcap():
    """A softcap hides logits from the function, not from the format they are multiplied in."""
    torch.manual_seed(0)
    head = Head(torch.randn(30, 8) * 1e5, None, torch.float32, softcap=30.0, scale=0.5)
    hidden, targets = torch.randn(5, 8), torch.arange(5)
    place = Place("lm_head", "logits")
    forward = Forward(small_module("llama"))
    forward.see_logits(hidden, head, "lm_head")
    assert forward.ranges()[place].largest == pytest.approx(float((hidden @ head.weight.T).abs().max()))
    small = Head(head.weight / 1e5, None, torch.float32, softcap=30.0, scale=0.5)
    product = (hidden @ small.weight.T).requires_grad_()
    logp = (30 * torch.tanh(product / 30) * 0.5 / 0.7).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    weight = torch.randn(5)
    (want,) = torch.autograd.grad(logp, product, weight)
    backward = Backward(small_module("llama"), FP16)
    backward.see_logits(hidden, small, targets, 0.7, weight, "lm_head")
    assert backward.histograms()[place].norm == pytest.approx(float(want.double().norm()), rel=1e-5)


def test_the_inside_of_experts_is_seen():
    found = audited(spoilt(experts, family="qwen3_moe"))
    place = Place("model.layers.1.mlp.experts", "inside")
    edge = [found.before.forward[Place(place.module, kind)].largest for kind in ("input", "output")]
    assert found.before.forward[place].largest > 65504 > 10 * max(edge)
    assert place in found.before.backward
    assert found.plan.fp32 == ("model.layers.1.mlp",)
    gate = next(
        r for r in found.as_dict()["forward"] if r["module"] == "model.layers.0.mlp.gate" and r["kind"] == "output"
    )
    assert gate["fp32"]  # routers are, by default


# --- from measurements to a verdict, without a model

LAYERS = ("m.layers.0", "m.layers.1")
NORMS = frozenset({"m.norm", "m.layers.0.norm1", "m.layers.1.norm1"})
ANATOMY = Anatomy(LAYERS, "m.embed", "m.norm", "head", norms=NORMS)
EAGER = Anatomy(LAYERS, "m.embed", "m.norm", "head", norms=NORMS, eager=True)
PLAN = Precision.parse("fp16")


def size(largest: float, count: int = 7) -> Range:
    return Range(largest, largest / 3, 0, count)


def found_in(forward: dict[Place, Range], anatomy: Anatomy = ANATOMY, plan: Precision = PLAN) -> list:
    return judge(anatomy, plan, [], forward, {})


@pytest.mark.parametrize(
    ("module", "kind", "anatomy", "remedy"),
    [
        ("m.layers.0.mlp.down", "input", ANATOMY, 'fp32 = ["m.layers.0.mlp"]'),
        ("m.layers.0.attn", "product", ANATOMY, None),  # fused attention never holds it
        ("m.layers.0.attn", "product", EAGER, 'fp32 = ["m.layers.0.attn"]'),
        ("m.layers.1.norm1", "output", ANATOMY, 'fp32 = ["m.layers.1"]'),
        ("m.layers.1.norm1", "input", ANATOMY, "residual_scale = 0.25"),
        ("m.layers.1", "output", ANATOMY, "residual_scale = 0.25"),
        ("m.embed", "output", ANATOMY, "residual_scale = 0.25"),
        ("m.layers.1.mlp", "output", ANATOMY, "residual_scale = 0.25"),
        ("m.norm", "output", ANATOMY, "none"),
        ("head", "logits", ANATOMY, 'head = "fp32"'),
    ],
)
def test_every_place_has_its_remedy(module, kind, anatomy, remedy):
    place = Place(module, kind)
    findings = found_in({place: size(65000.0)}, anatomy)
    if remedy is None:
        assert not findings
        return
    (finding,) = findings
    assert finding.where == module
    assert not finding.beyond
    assert (finding.remedy.toml if finding.remedy else "none") == remedy
    assert found_in({place: size(65536.0)}, anatomy)[0].beyond
    assert not found_in({place: size(16376.0)}, anatomy)  # four times below the end is far enough
    assert not found_in({place: size(65000.0)}, anatomy, Precision.parse("bf16"))
    assert found_in({place: size(65000.0)}, anatomy, Precision.parse("bf16/fp16"))


def test_a_remedy_that_does_not_help_is_followed_by_a_stronger_one_and_then_by_none():
    place = {Place("m.layers.0.mlp.down", "input"): size(1e5), Place("m.layers.0.mlp", "output"): size(1e5, 3)}
    plan, steps = PLAN, []
    for _ in range(6):
        wider = remedied(plan, met(found_in(place, plan=plan)))
        if wider == plan:
            break
        plan = wider
        steps.append((plan.residual_scale, plan.fp32))
    # the stream first; then what is inside the MLP; its result, which rescaling did not make smaller, with the layer
    assert steps == [(0.125, ()), (0.125, ("m.layers.0",))]
    assert not found_in(place, plan=plan)
    stuck = {Place("m.layers.0", "output"): size(1e5)}
    assert found_in(stuck, Anatomy(LAYERS, "m.embed", "m.norm", "head", no_rescale="why"))[0].remedy is None


def test_gradients_that_span_more_than_the_format_has():
    wide = {
        Place("m.layers.0.mlp.gate", "output"): histogram(torch.full((9,), 2.0**-50)),
        Place("m.layers.1.attn.q", "input"): histogram(torch.full((9,), 2.0**14)),
    }
    (finding,) = judge(ANATOMY, PLAN, [], {}, wide)
    assert finding.remedy is not None
    assert finding.remedy.toml == 'fp32 = ["m.layers.1.attn"]'
    (left,) = judge(ANATOMY, remedied(PLAN, [finding]), [], {}, wide)
    assert left.remedy is not None
    assert left.remedy.toml == f"loss_scale = {{initial = {2.0**63}, limit = {2.0**63}}}"
    edge = {Place("m.w", "weight"): h for h in wide.values()} | {Place("m.v", "weight"): next(iter(wide.values()))}
    (hopeless,) = judge(ANATOMY, PLAN, [], {}, edge)
    assert hopeless.remedy is None
    assert "no loss scale fits" in hopeless.what
    over = {Place("m.w", "weight"): histogram(torch.tensor([2.0**17]))}
    assert judge(ANATOMY, PLAN, [], {}, over)[0].remedy is None  # not even unscaled
    assert not judge(ANATOMY, Precision.parse("bf16"), [], {}, {Place("m.w", "weight"): histogram(torch.ones(1), BF16)})


def test_names_of_a_model():
    found = anatomy_of(small_module("qwen3_moe"))
    assert found.layers == ("model.layers.0", "model.layers.1")
    assert (found.embedding, found.last_norm, found.head) == ("model.embed_tokens", "model.norm", "lm_head")
    assert found.routers == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    assert "model.layers.0.self_attn.q_norm" in found.norms
    assert found.part_of("model.layers.1.mlp.experts.act_fn") == "model.layers.1.mlp"
    assert found.part_of("model.layers.1") is None
    assert found.layer_of("model.layers.10") is None


# --- the page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("audit")
    found = audited(spoilt(inside_mlp, num_hidden_layers=3))
    settings = {
        "model": "<script>alert(1)</script>", "data": "d", "device": "cpu", "answers": {}, "training": {},
        "versions": {},
    }  # fmt: skip
    found.settings.update(settings)
    save(found, made)
    return made


def test_the_page_says_what_the_file_holds(folder):
    tree, page = json.loads((folder / "audit.json").read_text()), (folder / "audit.html").read_text()
    assert tree["verdict"]["kind"] == "safe with"
    assert "fp32 = [&#34;model.layers.1.mlp&#34;]" in page
    assert page.count("<svg") == 1 + 1 + 3 + 1  # all layers; embedding, each layer, head
    assert "<script" not in page
    assert "model.layers.1.mlp.down_proj: its input reaches" in page
    assert page.count("c-rest") > 3  # what is computed in FP32
    assert 'class="area c-bad"' not in page  # nothing is left beyond the format
    assert write_page(tree, folder).read_text() == page


def test_the_page_of_an_unsafe_model_shows_where(tmp_path):
    found = audited(spoilt(stream))
    tree = found.as_dict()
    assert all(r["headroom"] >= 4 for r in tree["forward"] if not r["fp32"] and r["headroom"])
    before = type(found)(**{**vars(found), "plan": found.base, "seen": found.before})
    before.settings.update({"model": "m", "data": "d", "device": "cpu", "answers": {}, "training": {}, "versions": {}})
    save(before, tmp_path)
    page = (tmp_path / "audit.html").read_text()
    assert page.count('class="area c-bad"') >= 4
    assert page.count('<figure class="bad">') >= 2


def test_names_beside_bars_can_be_told_apart():
    for family in ("llama", "gemma2", "qwen3_moe", "gpt2"):
        layer = next(n for n, _ in small_module(family).named_modules() if n.endswith(".0"))
        names = [n.removeprefix(f"{layer}.") for n, _ in small_module(family).named_modules() if n.startswith(layer)]
        labels = {_short(f"{n} {kind}") for n in names for kind in ("in", "out")}
        assert len(labels) == 2 * len(names)
        assert max(map(len, labels)) <= 21
    assert _short("post_attention_layernorm out") == "post-attn norm out"
    assert _short("a_module_of_some_unknown_family.with_a_long_name in").endswith("long_name in")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_its_window(folder: Path, tmp_path: Path, width: int):
    tree = json.loads((folder / "audit.json").read_text())
    top = max((r for r in tree["forward"] if not r["fp32"]), key=lambda r: r["largest"])
    top["module"] = "model.layers.27.post_attention_layernorm_of_some_length"  # stands large above the pictures
    folder = tmp_path / "long"
    folder.mkdir()
    write_page(tree, folder)
    measure = """onload = () => {
      document.querySelectorAll("details").forEach((d) => { d.open = true; });
      parent.postMessage([innerWidth, document.documentElement.scrollWidth].join("|"), "*");
    };"""
    text = (folder / "audit.html").read_text(encoding="utf-8")
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    (tmp_path / "copy.html").write_text(copy.replace("</body>", f"<script>{measure}</script></body>"))
    (tmp_path / "frame.html").write_text(
        f'<body><iframe src="copy.html" style="width:{width}px;height:844px;border:0"></iframe><p id="out"></p>'
        '<script>onmessage = (e) => { document.querySelector("#out").textContent = e.data; };</script>'
    )
    dom, console = browse(tmp_path / "frame.html", tmp_path / "p", "--dump-dom", width=1400)
    assert console == ""
    found = re.search(r'id="out">([^<]+)<', dom)
    assert found, dom[-500:]
    inner, wide = map(int, found.group(1).split("|"))
    assert (inner, wide <= width) == (width, True)
