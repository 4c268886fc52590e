"""What the engine's formats do: rounding where the trainer rounds, and overflows that are refused.

Tests that hold off a known mistake of the field carry its number in their name.
"""

import math
import time

import pytest
import torch
from test_engine_torch import CONFIGS, FAST, PROMPTS, SMALL, engine_of, in_format, make, reference
from transformers import Gemma2Config, HyperCLOVAXConfig, Qwen2Config, Qwen3Config

from tenbit.engines.torch import TorchEngine
from tenbit.models.logprobs import Head, batch_logprobs
from tenbit.precision import Format, Precision
from tenbit.types import Overflow, Prompt, Sampling

torch.set_num_threads(1)


def k3(mu, pi):
    gap = (pi - mu).double()
    return float((gap.exp() - 1 - gap).mean())


@pytest.mark.parametrize("path", [*FAST, "generic"])
def test_mismatch_is_at_rounding_level_and_far_smaller_in_fp16(path):
    """Engine against the library's forward pass in the same format: KL (k3) in BF16 is at least 24 times FP16's."""
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    master = make(config)
    kl = {}
    for name in ("fp16", "bf16"):
        precision = Precision.parse(name)
        model = in_format(master, precision.rollout)
        mu, pi = [], []
        with engine_of(master, name, path=path) as engine:
            for c in engine.generate([Prompt((1, 2, i), seed=i) for i in range(24)], Sampling(48)):
                mu.append(c.logp)
                pi.append(reference(model, c.prompt_ids, c.response_ids).float())
        kl[name] = k3(torch.cat(mu), torch.cat(pi))
        assert (torch.cat(mu) - torch.cat(pi)).abs().max() < 60 * precision.rollout.epsilon
    assert 0 < kl["fp16"] * 24 <= kl["bf16"] < 1e-2


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("sent", list(Format))
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_pitfall_13_weights_that_are_not_finite_are_refused_whatever_dtype_they_come_in(bad, sent, precision):
    """The masters are cast before they arrive, so an overflowed weight comes as an infinity in the rollout format."""
    model = make(CONFIGS["qwen2"](tie_word_embeddings=True))
    named = {k: v.detach().to(sent.dtype) for k, v in model.named_parameters()}
    broken = dict(named)
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias")
    for name in names:
        broken[name] = named[name].clone()
        broken[name].view(-1)[-1] = bad
    with TorchEngine(model.config, Precision.parse(precision)) as engine:
        engine.load_weights(named.items(), 0)
        remedy = "'bf16' or 'fp32'" if precision == "fp16" else "learning rate"
        with pytest.raises(Overflow, match=rf"not finite.*{precision}.*{names[0]}, {names[1]}.*{remedy}"):
            engine.load_weights(broken.items(), 1)
        with pytest.raises(ValueError, match="load_weights first"):
            engine.generate(PROMPTS, Sampling(1))
        engine.load_weights(named.items(), 2)
        assert engine.generate(PROMPTS, Sampling(1))[0].version == 2


def test_looking_for_overflows_costs_a_fraction_of_a_short_generation():
    """Milliseconds for the built-in model's size; the limit leaves room for a busy machine."""
    config = Qwen2Config(vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=4)
    model = make(config)
    named = [(k, v.detach().to(Format.FP16.dtype)) for k, v in model.named_parameters()]
    with TorchEngine(config, Precision.parse("fp16")) as engine:
        took = []
        for version in range(5):
            start = time.perf_counter()
            engine.load_weights(named, version)
            took.append(time.perf_counter() - start)
    assert min(took) < 0.05


def padded(pairs):
    """(tokens [B, L], prompt_length [B], mask [B, T]) of (prompt, response) pairs, padded on the right."""
    sequences = [torch.tensor([*p, *r]) for p, r in pairs]
    responses = torch.tensor([len(r) for _, r in pairs])
    mask = torch.arange(int(responses.max())) < responses[:, None]
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return tokens, torch.tensor([len(p) for p, _ in pairs]), mask


@pytest.mark.parametrize("softcap", [3.0, 5.0])
@pytest.mark.parametrize("fmt", [Format.FP16, Format.BF16])
def test_pitfall_21_softcapped_logits_are_the_trainers(fmt, softcap):
    """Head, softcap and log-softmax of both sides on the same 16-bit weights: what is left is the hidden states'
    rounding, well below what a softcap taken in 16 bits on one side would add."""
    config = Gemma2Config(**SMALL, sliding_window=8, final_logit_softcapping=softcap)
    master = make(config)
    with torch.no_grad():
        master.lm_head.weight.mul_(4)  # logits that the softcap bends
    trainer = in_format(master, fmt)
    with engine_of(master, fmt.value) as engine:
        out = engine.generate([Prompt((1, 2, i), seed=i) for i in range(32)], Sampling(40, temperature=0.9))
        pairs = [(c.prompt_ids, c.response_ids) for c in out]
        scored = torch.cat(engine.score(pairs, Sampling(1, temperature=0.9)))
    mu = torch.cat([c.logp for c in out])
    tokens, prompt_length, mask = padded(pairs)
    with torch.no_grad():
        logp, _ = batch_logprobs(trainer, Head.of(trainer, fmt.dtype), tokens, prompt_length, mask, 0.9)
    library = torch.cat([reference(trainer, p, r, 0.9) for p, r in pairs]).float()
    pi = logp[mask]
    assert torch.allclose(scored, pi, atol=1e-6)
    assert k3(mu, pi) < 30 * fmt.epsilon**2
    assert k3(mu, library) > 1.5 * k3(mu, pi)


def test_a_scale_of_the_logits_that_the_head_does_not_know_is_refused():
    """HyperCLOVA X multiplies by the `logits_scaling` that Granite divides by: two sides agreeing on a third model."""
    model = make(HyperCLOVAXConfig(**SMALL, logits_scaling=0.5))
    with pytest.raises(ValueError, match="'hyperclovax' does something to its logits"):
        engine_of(model)


@pytest.mark.parametrize("path", [*FAST, "generic"])
@pytest.mark.parametrize("fmt", [Format.FP16, Format.BF16])
def test_pitfall_21_norms_and_rotary_tables_round_where_the_trainers_do(fmt, path):
    """At positions near 1,000 a rotary table made in 16 bits would be off by a radian; the control shows it."""
    config = Qwen3Config(**{**SMALL, "max_position_embeddings": 1100}, tie_word_embeddings=False)
    master = make(config)
    with torch.no_grad():
        for block in master.model.layers:
            block.self_attn.q_norm.weight.mul_(4)  # attention that looks at positions
    trainer, rounded = in_format(master, fmt), in_format(master, fmt).to(fmt.dtype)
    torch.manual_seed(0)
    prompt = tuple(torch.randint(97, (1000,)).tolist())
    with engine_of(master, fmt.value, path=path) as engine:
        (completion,) = engine.generate([Prompt(prompt, 0)], Sampling(60))
    pi, control = (reference(m, prompt, completion.response_ids).float() for m in (trainer, rounded))
    assert k3(completion.logp, pi) < 100 * fmt.epsilon**2
    assert k3(completion.logp, control) > 10 * k3(completion.logp, pi)


@pytest.mark.parametrize("path", [*FAST, "generic"])
def test_pitfall_13_an_overflow_is_an_error_that_names_the_request(path):
    """Activations beyond FP16's range; in BF16 the same weights sample."""
    model = make(CONFIGS["qwen2"](tie_word_embeddings=False))
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 60000.0
        model.model.layers[0].mlp.down_proj.weight.mul_(3e4)
    requests = [Prompt((3, 4), 0), Prompt((3, 7), 1)]
    with engine_of(model, "fp16", path=path) as engine:
        with pytest.raises(Overflow, match=r"request [01] .*not finite.*overflowed"):
            engine.generate(requests, Sampling(4))
        with pytest.raises(Overflow, match=r"sequence 0.*not finite"):
            engine.score([((3, 7), (1, 2))], Sampling(4))
    with engine_of(model, "bf16", path=path) as engine:
        assert all(c.logp.isfinite().all() for c in engine.generate(requests, Sampling(4)))
