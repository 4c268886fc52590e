"""Attribution of the gap: a cause is planted, and it is found, and no other cause is blamed for it."""

from __future__ import annotations

import copy
import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from tenbit.backends.single import SingleBackend
from tenbit.engines.torch import TorchEngine
from tenbit.models import loading
from tenbit.precision import Format, Precision
from tenbit.recipe import Recipe
from tenbit.scoring import Scored, train_logps
from tenbit.studies import attribution_bench as bench_module
from tenbit.studies.attribution import Attribution, attribute, show
from tenbit.studies.attribution_bench import Bench, Bootstrap, Gap, common, gap, transformed, variant
from tenbit.studies.attribution_cause import Cause, part, scaled
from tenbit.studies.attribution_record import CERTAIN, above, encode_again
from tenbit.types import Prompt, Sampling

FP32, BF16 = Precision.parse("fp32"), Precision.parse("bf16")
LENGTH = 40


def recipe_of(folder, attention="sdpa", **rollout) -> Recipe:
    tree = {
        "steps": 1,
        "model": {"path": str(folder), "attention": attention, "device": "cpu"},
        "rollout": {"max_tokens": LENGTH, **rollout},
    }
    return Recipe.of(tree)


def opened(model_folder, attention="sdpa", family="qwen2", **rollout):
    recipe = recipe_of(model_folder(family), attention, **rollout)
    return recipe, loading.load(recipe.model)


def prompts(n=24):
    generator = torch.Generator().manual_seed(5)
    return [Prompt(tuple(torch.randint(0, 256, (6 + i % 5,), generator=generator).tolist()), i) for i in range(n)]


def drawn(recipe, model, precision=FP32, *, sampling=None, engine_precision=None, n=24, make=TorchEngine):
    """(sequences, log mu as recorded) by an engine."""
    plan = engine_precision or precision
    with make(model.module.config, plan, pad_token_id=model.pad_token_id) as engine:
        engine.load_weights(plan.to_engine(model.module.state_dict().items()), version=0)
        completions = engine.generate(prompts(n), sampling or recipe.sampling(model.stop_token_ids))
    return [(c.prompt_ids, c.response_ids) for c in completions], [c.logp for c in completions]


def joined(sequences, recorded, trained):
    return [Scored(*s, mu, pi) for s, mu, pi in zip(sequences, recorded, trained, strict=True)]


def genuine(recipe, model, precision):
    sequences, recorded = drawn(recipe, model, precision)
    return joined(sequences, recorded, train_logps(model, precision, recipe, sequences))


def shifted(model, size=0.02, seed=1):
    """The same model with noise on its weights: another version."""
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += size * p.std().nan_to_num() * torch.randn(p.shape, generator=generator)
    return replace(model, module=module)


def blamed(found: Attribution, at_least=0.15) -> set[str]:
    return {row.name for row in found.rows if row.share is not None and row.share > at_least}


# --- the measure


def test_a_gap_is_the_mean_of_k3_over_all_tokens_by_hand():
    mu = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
    pi = [torch.tensor([-1.1, -2.3]), torch.tensor([-0.25])]
    found = gap(mu, pi, Bootstrap.of(2))
    by_hand = sum(math.exp(l) - 1 - l for l in (-0.1, -0.3, 0.25)) / 3
    assert found.value == pytest.approx(by_hand, rel=1e-6)
    first = gap(mu, pi, Bootstrap.of(2), [1, 0])
    assert first.value == pytest.approx(math.exp(-0.1) - 1 + 0.1, rel=1e-5)


def test_the_bootstrap_resamples_sequences_and_pairs_what_is_compared():
    generator = torch.Generator().manual_seed(0)
    n, length = 50, 20
    scale = torch.rand(n, generator=generator)[:, None] * 0.2  # sequences differ more than their tokens do
    noise = scale * torch.randn(n, length, generator=generator)
    mu = list(torch.zeros(n, length).unbind())
    bootstrap = Bootstrap.of(n)
    found = gap(mu, list(noise.unbind()), bootstrap)
    assert (bootstrap.counts.sum(1) == n).all()
    per_sequence = (noise.double().expm1() - noise.double()).mean(1)
    standard_error = float(per_sequence.std() / n**0.5)
    low, high = found.interval
    assert (high - low) / 4 == pytest.approx(standard_error, rel=0.2)  # 2 * 1.96 standard errors
    half = gap(mu, [x / 2**0.5 for x in noise.unbind()], bootstrap)
    ratio = half.over(found)
    assert ratio.value == pytest.approx(0.5, rel=0.02)
    assert ratio.interval[1] - ratio.interval[0] < 0.02  # unpaired it would be about 1
    assert Gap(0.0, torch.zeros(3)).over(Gap(0.0, torch.zeros(3))).value == 0.0


def test_the_common_beginning():
    assert common((1, 2, 3), (1, 2, 4)) == 2
    assert common((1, 2), (1, 2, 4)) == 2
    assert common((3,), (1,)) == 0


def test_transformed_is_the_engines_truncated_distribution(model_folder):
    recipe, model = opened(model_folder)
    sampling = Sampling(LENGTH, temperature=0.8, top_p=0.9, stop_token_ids=model.stop_token_ids)
    sequences, recorded = drawn(recipe, model, sampling=sampling)
    plain = replace(sampling, top_p=1.0)
    cut, whole = transformed(model, FP32, recipe, sequences, (sampling, plain))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(cut, recorded, strict=True))
    expected = train_logps(model, FP32, recipe, sequences, 0.8)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, expected, strict=True))
    truncated = Bench(recipe, model, FP32, sampling).trainer(sequences)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(truncated, recorded, strict=True))


def test_a_plain_variant_is_not_fused_and_the_model_is_not_changed(model_folder):
    recipe, model = opened(model_folder)

    def fused(of):
        SingleBackend(replace(of, module=copy.deepcopy(of.module)), FP32, recipe.optim, 1.0, 1)
        own = replace(of, module=copy.deepcopy(of.module))
        SingleBackend(own, FP32, recipe.optim, 1.0, 1)
        return [name for name, part in own.module.named_modules() if "forward" in vars(part)]

    assert fused(variant(model, plain=True)) == []
    eager = variant(model, "eager")
    assert eager.module.config._attn_implementation == "eager"
    assert model.module.config._attn_implementation == "sdpa"
    assert not any(part._forward_pre_hooks for part in model.module.modules())


# --- numerics


@pytest.fixture(scope="module")
def in_bf16(model_folder):
    recipe, model = opened(model_folder)
    return attribute(recipe, model, BF16, genuine(recipe, model, BF16))


def test_rounding_is_found_and_the_record_is_not_blamed(in_bf16):
    dtype = in_bf16["dtype"]
    assert dtype.share == pytest.approx(1.0, abs=0.01)
    assert dtype.interval[0] > 0.95
    assert dtype.kl_after < 1e-3 * dtype.kl_before
    assert "fp16" in dtype.remedy
    assert dtype.numbers["rounding_of_the_trainer"] > 16 * dtype.numbers["rounding_of_the_trainer_in_fp16"] > 0
    assert in_bf16["stale weights"].share is None
    assert in_bf16["sampling transform"].share is None
    assert in_bf16["retokenisation"].share == 0.0
    assert in_bf16["retokenisation"].numbers["changed"] > 0.5  # random bytes are hardly ever UTF-8
    assert "another trainer" not in {row.name for row in in_bf16.rows}
    # Prefill and the trainer still round in bf16, in different orders: more is left than FP32 would leave.
    assert 1e-4 * in_bf16.total < in_bf16.residual < 0.2 * in_bf16.total


def test_the_dtype_is_a_bound_and_not_the_first_cause(in_bf16):
    measured = [row.name for row in in_bf16.rows if row.share is not None]
    assert measured[-1] == "dtype"  # after the causes that can be switched at this dtype
    assert measured[0] == "decode against prefill"
    before, _, bound = in_bf16.verdict.partition("Rounding as a whole")
    assert "decode against prefill" in before
    assert "fp16" not in before.partition("First:")[0]
    assert "dtype 100%" in bound


def test_for_a_pair_in_fp16_the_dtype_has_no_remedy_of_16_bits(model_folder):
    recipe, model = opened(model_folder)
    short = Precision.parse("fp16")
    found = attribute(recipe, model, short, genuine(recipe, model, short))
    assert found["dtype"].share == pytest.approx(1.0, abs=0.02)
    assert not found.verdict.partition("First:")[2].startswith(" 'fp16'")
    assert "best 16-bit" not in found.verdict


def _found(*shares, precision="bf16"):
    rows = [Cause(f"cause {i}", "what", "remedy", 1.0, 0.0, s, (s - 0.01, s)) for i, s in enumerate(shares)]
    return Attribution(1.04e-7, (1e-7, 2e-7), 1e-9, tuple(rows), 9, 99, precision, "torch")


def test_overlapping_shares_are_not_said_to_be_alternatives():
    assert "do not add up" in _found(0.95, 0.4).verdict
    assert "Either" not in _found(0.95, 0.4).verdict
    assert "Either" in _found(0.95, 0.92).verdict
    assert "overlap" not in _found(0.6, 0.3).verdict
    assert "KL(μ‖π) is 1.0·10⁻⁷" in _found(0.6).verdict


def test_a_share_is_never_more_than_all():
    grown, left, came = (Gap(v, torch.full((9,), v, dtype=torch.float64)) for v in (5.0, 0.5, 0.01))
    assert part(grown, left, came).value == pytest.approx(0.9)
    assert scaled(grown, left, grown, came).value == pytest.approx(0.9)
    assert part(came, left, came).value < -1  # a switch may make it larger by whatever factor


def test_every_cause_of_the_list_has_a_row(in_bf16):
    names = {row.name for row in in_bf16.rows}
    assert names >= {
        "dtype",
        "decode against prefill",
        "batch composition",
        "attention kernel",
        "FP32 head",
        "sampling transform",
        "stale weights",
        "retokenisation",
    }
    for row in in_bf16.rows:
        assert row.what
        assert row.remedy
        if row.share is not None and row.kl_before is not None:
            assert row.interval[0] <= row.share <= row.interval[1]


def test_it_is_shown_and_written(in_bf16):
    out = io.StringIO()
    show(in_bf16, Console(file=out, width=100))
    text = out.getvalue()
    for row in in_bf16.rows:
        assert sum(line.strip().startswith(row.name) and ":" not in line for line in text.splitlines()) == 1
    for row in in_bf16.rows:
        assert row.name in text
    assert "one by one and prefilled" in text
    assert in_bf16["attention kernel"].what not in text  # it carries nothing, so no sentences
    assert "precision = 'fp16'" in text
    back = json.loads(json.dumps(in_bf16.as_dict(), allow_nan=False))
    assert back["verdict"] == in_bf16.verdict
    assert [row["name"] for row in back["rows"]] == [row.name for row in in_bf16.rows]


def test_in_fp32_there_is_nothing_to_find(model_folder):
    recipe, model = opened(model_folder)
    found = attribute(recipe, model, FP32, genuine(recipe, model, FP32))
    assert found.total < 1e-9
    assert found["dtype"].share is None
    assert found["FP32 head"].share is None
    assert found["stale weights"].share is None
    assert found["sampling transform"].share is None


def test_a_model_that_overflows_fp16_is_told_so(model_folder):
    recipe, model = opened(model_folder)
    with torch.no_grad():
        for layer in model.module.base_model.layers:
            layer.mlp.up_proj.weight *= 1e6
            layer.mlp.down_proj.weight /= 1e6
    found = attribute(recipe, model, BF16, genuine(recipe, model, BF16))
    assert "not an option" in found["dtype"].note
    assert found["dtype"].share == pytest.approx(1.0, abs=0.01)


def test_a_head_that_only_the_engine_has_in_fp32(model_folder):
    recipe, model = opened(model_folder, family="llama")
    with torch.no_grad():
        # One number added to all logits: probabilities stay, but in 16 bits the larger products are rounded more.
        model.module.get_output_embeddings().weight[:, 0] = 32.0
    wide = BF16.model_copy(update={"head": "fp32"})
    sequences, recorded = drawn(recipe, model, engine_precision=wide)
    found = attribute(recipe, model, BF16, joined(sequences, recorded, train_logps(model, BF16, recipe, sequences)))
    head = found["FP32 head"]
    assert head.share > 0.8
    assert head.interval[0] > 0.5
    assert "head" in head.remedy
    assert blamed(found) == {"FP32 head"}
    assert found["stale weights"].share is None
    agreed = genuine(recipe, model, wide)
    assert attribute(recipe, model, wide, agreed)["FP32 head"].share is None


def test_an_attention_that_the_two_sides_do_not_share(model_folder):
    recipe, model = opened(model_folder, attention="eager")
    sequences, _ = drawn(recipe, model, BF16)
    other = train_logps(variant(model, "sdpa", plain=True), BF16, recipe, sequences)
    found = attribute(recipe, model, BF16, joined(sequences, other, train_logps(model, BF16, recipe, sequences)))
    attention = found["attention kernel"]
    assert attention.share > 0.8
    assert "'sdpa'" in attention.remedy
    assert attention.numbers["moved"] > 0
    assert found["stale weights"].share is None
    assert found["sampling transform"].share is None


def test_pitfall_15_an_engine_left_in_another_format(model_folder):
    recipe, model = opened(model_folder)
    short = Precision.parse("fp16")
    sequences, recorded = drawn(recipe, model, engine_precision=BF16)
    found = attribute(recipe, model, short, joined(sequences, recorded, train_logps(model, short, recipe, sequences)))
    cause = found["rollout format"]
    assert cause.share > 0.9
    assert "bf16" in cause.note
    assert "'fp16'" in cause.remedy
    assert found["stale weights"].share is None
    assert blamed(found) == {"rollout format"}


class Coarse(TorchEngine):
    """An engine whose decoding is off, in whatever format: by a fixed noise on what it says of its tokens."""

    def generate(self, prompts, sampling):
        out = []
        for c in super().generate(prompts, sampling):
            generator = torch.Generator().manual_seed(sum(c.response_ids))
            out.append(replace(c, logp=c.logp + 0.02 * torch.randn(len(c.logp), generator=generator)))
        return out


class Crowded(Coarse):
    """An engine that is off only when it decodes several responses at a time."""

    def generate(self, prompts, sampling):
        return (
            super().generate(prompts, sampling) if len(prompts) > 1 else TorchEngine.generate(self, prompts, sampling)
        )


def by_engine(monkeypatch, make):
    def make_engine(rollout, model, precision, seed=0):
        return make(model.module.config, precision, pad_token_id=model.pad_token_id)

    monkeypatch.setattr(bench_module, "make_engine", make_engine)


def test_decoding_that_is_off_is_not_blamed_on_the_format(model_folder, monkeypatch):
    recipe, model = opened(model_folder)
    by_engine(monkeypatch, Coarse)
    sequences, recorded = drawn(recipe, model, BF16, make=Coarse)
    found = attribute(recipe, model, BF16, joined(sequences, recorded, train_logps(model, BF16, recipe, sequences)))
    assert found["decode against prefill"].share > 0.6
    assert found["dtype"].share < 0.4
    assert found["stale weights"].share is None
    assert abs(found["batch composition"].share) < 0.3


def test_a_batch_that_changes_its_members(model_folder, monkeypatch):
    recipe, model = opened(model_folder)
    by_engine(monkeypatch, Crowded)
    sequences, recorded = drawn(recipe, model, make=Crowded)
    found = attribute(recipe, model, FP32, joined(sequences, recorded, train_logps(model, FP32, recipe, sequences)))
    assert found["batch composition"].share > 0.9
    assert found["stale weights"].share is None


# --- the record


def test_pitfall_9_log_probabilities_from_before_the_temperature(model_folder):
    recipe, model = opened(model_folder, temperature=0.6)
    sequences, _ = drawn(recipe, model)
    raw = train_logps(model, FP32, recipe, sequences, 1.0)
    found = attribute(recipe, model, FP32, joined(sequences, raw, train_logps(model, FP32, recipe, sequences)))
    cause = found["sampling transform"]
    assert cause.share > 0.99
    assert cause.numbers["temperature"] == 1.0
    assert "processed_logprobs" in cause.remedy
    assert blamed(found) == {"sampling transform"}


def test_another_temperature_than_the_recipes(model_folder):
    recipe, model = opened(model_folder)
    sequences, recorded = drawn(recipe, model, sampling=Sampling(LENGTH, 0.7, stop_token_ids=model.stop_token_ids))
    found = attribute(recipe, model, FP32, joined(sequences, recorded, train_logps(model, FP32, recipe, sequences)))
    assert found["sampling transform"].numbers["temperature"] == 0.7
    assert "rollout.temperature = 0.7" in found["sampling transform"].remedy
    assert blamed(found) == {"sampling transform"}


@pytest.mark.parametrize("heat", [0.73, 0.97])
def test_a_temperature_between_the_usual_ones_is_solved_for(model_folder, heat):
    recipe, model = opened(model_folder)
    sampling = Sampling(LENGTH, heat, stop_token_ids=model.stop_token_ids)
    sequences, recorded = drawn(recipe, model, BF16, sampling=sampling)
    found = attribute(recipe, model, BF16, joined(sequences, recorded, train_logps(model, BF16, recipe, sequences)))
    cause = found["sampling transform"]
    assert cause.numbers["temperature"] == pytest.approx(heat, abs=0.006)
    assert cause.share > 0.9
    assert blamed(found) <= {"sampling transform", "dtype", "decode against prefill"}
    assert found["stale weights"].share is None


@pytest.mark.parametrize(("top_p", "heat"), [(0.97, 1.0), (0.93, 0.85)])
def test_a_truncation_between_the_usual_ones_is_not_taken_for_other_weights(model_folder, top_p, heat):
    recipe, model = opened(model_folder)
    sampling = Sampling(LENGTH, heat, top_p=top_p, stop_token_ids=model.stop_token_ids)
    sequences, recorded = drawn(recipe, model, sampling=sampling)
    found = attribute(recipe, model, FP32, joined(sequences, recorded, train_logps(model, FP32, recipe, sequences)))
    cause = found["sampling transform"]
    assert cause.numbers["top_p"] == pytest.approx(top_p, abs=0.006)
    assert cause.numbers["temperature"] == pytest.approx(heat, abs=0.006)
    assert cause.share > 0.99
    assert blamed(found) == {"sampling transform"}


def test_an_honest_record_has_no_rival_transform(in_bf16):
    cause = in_bf16["sampling transform"]
    assert "none fits the record measurably better" in cause.note or "% smaller" in cause.note
    assert "top-k" not in cause.note  # a top-k of the whole vocabulary is no transform


def test_both_columns_at_another_temperature_than_the_recipes_are_no_cause(model_folder):
    recipe, model = opened(model_folder)
    sequences, recorded = drawn(recipe, model, BF16, sampling=recipe_of(model_folder(), temperature=0.6).sampling(()))
    scored = joined(sequences, recorded, train_logps(model, BF16, recipe, sequences, 0.6))
    found = attribute(recipe, model, BF16, scored)
    assert found["sampling transform"].share is None
    assert "temperature 0.6" in found["sampling transform"].note
    assert not {"another trainer", "stale weights"} & blamed(found)
    assert all(row.share <= 1.05 for row in found.rows if row.share is not None)


def test_pitfall_10_log_probabilities_renormalised_by_top_p(model_folder):
    recipe, model = opened(model_folder)
    truncated = Sampling(LENGTH, top_p=0.9, stop_token_ids=model.stop_token_ids)
    sequences, recorded = drawn(recipe, model, sampling=truncated)
    found = attribute(recipe, model, FP32, joined(sequences, recorded, train_logps(model, FP32, recipe, sequences)))
    cause = found["sampling transform"]
    assert cause.share > 0.99
    assert cause.numbers["top_p"] == 0.9
    assert "rollout.top_p = 1" in cause.remedy
    assert blamed(found) == {"sampling transform"}


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "checkpoint"])
def test_pitfall_23_weights_that_never_arrived(model_folder, known):
    recipe, model = opened(model_folder)
    older = shifted(model)
    sequences, recorded = drawn(recipe, older, BF16)
    scored = joined(sequences, recorded, train_logps(model, BF16, recipe, sequences))
    found = attribute(recipe, model, BF16, scored, older=older if known else None)
    cause = found["stale weights"]
    assert cause.share > 0.8
    assert cause.interval[0] > 0.5
    assert "reaches the engine" in cause.remedy
    assert ("older checkpoint" in cause.what) == known
    assert blamed(found) == {"stale weights"}
    assert "stale weights" in found.verdict


def test_a_heavy_tail_is_not_taken_for_stale_weights(model_folder):
    """A genuine record with a few responses far off is above the control on average, and not in rank."""
    recipe, model = opened(model_folder)
    scored = genuine(recipe, model, BF16)
    for i in range(0, len(scored), 4):
        off = scored[i].logp_rollout + 0.02 * (-1.0) ** torch.arange(scored[i].length)
        scored[i] = replace(scored[i], logp_rollout=off)
    found = attribute(recipe, model, BF16, scored)
    stale = found["stale weights"]
    assert stale.numbers["times_a_fresh_record"] > 2
    assert stale.share is None
    assert stale.note.startswith("not shown")
    assert "a few responses" in stale.note


def test_the_ranks_of_two_samples_by_hand():
    assert above(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])) == pytest.approx(2 / (20 / 12) ** 0.5)
    same = torch.arange(9.0)
    assert above(same, same) == 0.0
    generator = torch.Generator().manual_seed(0)
    heavy = torch.randn(4000, 2, 20, generator=generator).mul(2.5).exp()  # a mean ruled by its tail
    beyond = sum(above(a, b) > CERTAIN for a, b in heavy) / len(heavy)
    assert beyond < 0.003


def test_an_older_checkpoint_does_not_explain_a_genuine_record(model_folder):
    recipe, model = opened(model_folder)
    found = attribute(recipe, model, BF16, genuine(recipe, model, BF16), older=shifted(model))
    assert found["stale weights"].share is None
    assert found["dtype"].share > 0.9


def test_pitfall_11_responses_that_were_tokenised_again(model_folder):
    recipe, model = opened(model_folder)
    sequences, recorded = drawn(recipe, model)
    text = "12+34=46 so the answer is 46 and that is all of it"
    for i in range(6):  # some that survive: plain ASCII
        sequences[i] = (sequences[i][0], tuple(model.tokenizer.encode(text[i : i + LENGTH])))
    here = train_logps(model, FP32, recipe, sequences)
    recorded[:6] = here[:6]
    again = [(prompt, encode_again(model, response)) for prompt, response in sequences]
    changed = [i for i, (s, a) in enumerate(zip(sequences, again, strict=True)) if s != a]
    assert 0 < len(changed) <= len(sequences) - 6
    theirs = train_logps(model, FP32, recipe, again)
    trained = [
        torch.cat([theirs[i][: len(own)], torch.full((max(0, len(own) - len(theirs[i])),), -5.0)])
        for i, own in enumerate(here)
    ]
    for some in (range(len(sequences)), changed):  # with responses that survive, and without
        chosen = joined(*([values[i] for i in some] for values in (sequences, recorded, trained)))
        found = attribute(recipe, model, FP32, chosen)
        cause = found["retokenisation"]
        assert cause.share > 0.99
        assert cause.numbers["changed"] == len(changed) / len(chosen)
        assert cause.numbers["seq_logp_change"] > 1
        assert "token ids" in cause.remedy
        assert blamed(found) == {"retokenisation"}


def test_another_trainer_is_not_taken_for_retokenisation(model_folder):
    recipe, model = opened(model_folder)
    sequences, recorded = drawn(recipe, model)
    theirs = train_logps(shifted(model), FP32, recipe, sequences)
    found = attribute(recipe, model, FP32, joined(sequences, recorded, theirs))
    assert found["another trainer"].share > 0.99
    assert found["retokenisation"].share == 0.0
    assert blamed(found) == {"another trainer"}


# --- bad input


def test_samples_without_finite_numbers_are_left_out_or_refused(model_folder):
    recipe, model = opened(model_folder)
    scored = genuine(recipe, model, FP32)[:4]
    broken = replace(scored[0], logp_rollout=scored[0].logp_rollout.clone().fill_(-torch.inf))
    found = attribute(recipe, model, FP32, [broken, *scored[1:]])
    assert found.left_out == 1
    assert found.sequences == 3
    with pytest.raises(ValueError, match="at least one response"):
        attribute(recipe, model, FP32, [broken])


def test_an_engine_that_cannot_is_a_note_and_not_the_end(model_folder, monkeypatch):
    recipe, model = opened(model_folder)
    scored = genuine(recipe, model, BF16)

    def make_engine(rollout, model, precision, seed=0):
        if precision.rollout == Format.FP32:
            raise ValueError("no memory for the cache. Raise rollout.vllm.memory")
        return TorchEngine(model.module.config, precision, pad_token_id=model.pad_token_id)

    monkeypatch.setattr(bench_module, "make_engine", make_engine)
    found = attribute(recipe, model, BF16, scored)
    assert found["dtype"].share is None
    assert "no memory for the cache" in found["dtype"].note
    assert found.residual is not None  # it is about the dtype as it is
    assert found["decode against prefill"].share is not None
