"""The built-in engine against full forward passes of the library's own models.

Tests that hold off a known mistake of the field carry its number, as `test_pitfall_22_...` or in their docstring.
"""

import math

import pytest
import torch
from conftest import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from tenbit.engines.compiled import available
from tenbit.engines.llama import unsupported
from tenbit.engines.torch import TorchEngine
from tenbit.precision import Precision
from tenbit.types import Overflow, Prompt, Sampling

torch.set_num_threads(1)

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "qwen2": lambda **k: Qwen2Config(**SMALL, **k),
    "qwen3": lambda **k: Qwen3Config(**SMALL, **k),
    "llama": lambda **k: LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, **k),
    "llama3-rope": lambda **k: LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        **k,
    ),
    "mistral": lambda **k: MistralConfig(**SMALL, sliding_window=None, **k),
}
OTHERS = {
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=97,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
    ),
    "gemma2": lambda: Gemma2Config(**SMALL, sliding_window=8),
    "mistral-sliding": lambda: MistralConfig(**SMALL, sliding_window=8),
}
FAST = ["plain", pytest.param("native", marks=pytest.mark.skipif(not available(), reason="no native kernels"))]
PROMPTS = [Prompt(tuple(range(3, 4 + length)), seed=17 * i + length) for length in (0, 6, 2, 11, 2) for i in range(3)]


def make(config, seed=0):
    """A random model, sharper than at initialisation so that its distributions differ from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


def in_format(model, fmt):
    """A copy of the model with weights in another format; buffers such as rotary tables stay in FP32."""
    copy = AutoModelForCausalLM.from_config(model.config, dtype=fmt.dtype).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def engine_of(model, precision="fp32", **options):
    engine = TorchEngine(model.config, Precision.parse(precision), **options)
    engine.load_weights(model.named_parameters(), version=1)
    return engine


@torch.no_grad()
def reference(model, prompt, response, temperature=1.0):
    """log pi of a response by one full forward pass."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0].double() / temperature
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logp.gather(-1, torch.tensor(response)[:, None])[:, 0]


def check_against(model, engine, sampling, atol=1e-5):
    out = engine.generate(PROMPTS, sampling)
    scored = engine.score([(c.prompt_ids, c.response_ids) for c in out], sampling)
    for prompt, completion, score in zip(PROMPTS, out, scored, strict=True):
        assert completion.prompt_ids == prompt.ids
        assert 1 <= completion.length <= sampling.max_tokens
        assert completion.logp.dtype == torch.float32
        expected = reference(model, prompt.ids, completion.response_ids, sampling.temperature)
        assert torch.allclose(completion.logp.double(), expected, atol=atol, rtol=0)
        assert torch.allclose(score.double(), expected, atol=atol, rtol=0)
        stops = [t in sampling.stop_token_ids for t in completion.response_ids]
        assert not any(stops[:-1])
        assert completion.finish == ("stop" if stops[-1] else "length")
        assert stops[-1] or completion.length == sampling.max_tokens
    return out


@pytest.mark.parametrize("path", [*FAST, "generic"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_log_probabilities_equal_a_full_forward_pass(kind, tied, path):
    """Pitfall 9: log-probabilities are of the distribution at its temperature. Pitfalls 21 and 24, in FP32."""
    model = make(CONFIGS[kind](tie_word_embeddings=tied))
    stop = (5, 9, 11, 40, 41, 42, 43)
    with engine_of(model, path=path, max_batch=4) as engine:
        out = check_against(model, engine, Sampling(20, temperature=0.8, stop_token_ids=stop))
    assert {c.finish for c in out} == {"stop", "length"}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_go_through_their_own_forward(kind):
    model = make(OTHERS[kind]())
    with engine_of(model, max_batch=4) as engine:
        assert engine.path == "generic"
        check_against(model, engine, Sampling(20, stop_token_ids=(5, 9, 11, 40, 41, 42, 43)))


@pytest.mark.parametrize("path", [*FAST, "generic"])
def test_a_response_does_not_depend_on_what_else_is_in_the_batch(path):
    model = make(CONFIGS["qwen2"]())
    sampling = Sampling(16, stop_token_ids=(5, 40, 41))
    with engine_of(model, path=path) as engine:
        expected = [c.response_ids for c in engine.generate(PROMPTS, sampling)]
        backwards = [c.response_ids for c in engine.generate(PROMPTS[::-1], sampling)][::-1]
        alone = [engine.generate([prompt], sampling)[0].response_ids for prompt in PROMPTS]
    with engine_of(model, path=path, max_batch=3) as engine:
        narrow = [c.response_ids for c in engine.generate(PROMPTS, sampling)]
    assert expected == backwards == alone == narrow
    assert len(set(expected)) > len(PROMPTS) // 2


@pytest.mark.parametrize("path", [*FAST, "generic"])
def test_greedy_equals_generate(path):
    model = make(CONFIGS["qwen3"]())
    with engine_of(model, path=path) as engine:
        for completion in engine.generate(PROMPTS, Sampling(24, temperature=0.0)):
            expected = model.generate(
                torch.tensor([completion.prompt_ids]), do_sample=False, max_new_tokens=24, eos_token_id=None
            )
            assert completion.response_ids == tuple(expected[0, len(completion.prompt_ids) :].tolist())
            assert completion.logp.eq(0).all()


@pytest.mark.parametrize("path", [*FAST, "generic"])
def test_first_tokens_follow_the_softmax(path):
    """Chi-square of 6,000 first tokens of one prompt against the model's distribution, through the whole engine."""
    config = Qwen2Config(**{**SMALL, "vocab_size": 11})
    model = make(config)
    with torch.no_grad():
        probability = model(torch.tensor([[1, 2, 3]])).logits[0, -1].double().softmax(-1)
    n = 6000
    with engine_of(model, path=path, max_batch=500) as engine:
        out = engine.generate([Prompt((1, 2, 3), seed=i) for i in range(n)], Sampling(1))
    counts = torch.bincount(torch.tensor([c.response_ids[0] for c in out]), minlength=11)
    chi = ((counts - n * probability) ** 2 / (n * probability)).sum()
    assert chi < 10 + 5 * math.sqrt(20)


@pytest.mark.parametrize("path", [*FAST, "generic"])
def test_pitfall_10_truncated_distributions_are_scored_as_they_are_sampled(path):
    model = make(CONFIGS["qwen2"]())
    sampling = Sampling(12, temperature=0.7, top_p=0.8, top_k=20)
    with engine_of(model, path=path) as engine:
        out = engine.generate(PROMPTS, sampling)
        scored = engine.score([(c.prompt_ids, c.response_ids) for c in out], sampling)
    for completion, score in zip(out, scored, strict=True):
        assert torch.allclose(completion.logp, score, atol=1e-5)
        assert (completion.logp > reference(model, completion.prompt_ids, completion.response_ids, 0.7)).all()


@pytest.mark.parametrize("path", [*FAST, "generic"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", {"preset": "fp16", "head": "fp32"}], ids=str)
def test_pitfalls_22_and_24_an_update_takes_effect_everywhere(precision, tied, path):
    """Old and new weights in turn: no cache, fused projection, tied or wider head survives a load."""
    config = CONFIGS["qwen2"](tie_word_embeddings=tied)
    models = [make(config, seed) for seed in (0, 1)]
    sampling = Sampling(6)
    fresh = []
    for model in models:
        with engine_of(model, precision, path=path) as engine:
            fresh.append(engine.generate(PROMPTS, sampling))
    with TorchEngine(config, Precision.parse(precision), path=path) as engine:
        for version, which in enumerate((0, 1, 0)):
            engine.load_weights(models[which].state_dict().items(), version)
            for new, old in zip(engine.generate(PROMPTS, sampling), fresh[which], strict=True):
                assert new.version == version
                assert new.response_ids == old.response_ids
                assert torch.equal(new.logp, old.logp)
            engine.precision.verify(engine.live())  # a wider head must not widen the embedding it is tied to
            head, embedding = (engine._module.get_output_embeddings(), engine._module.get_input_embeddings())
            assert (head.weight.data_ptr() == embedding.weight.data_ptr()) == tied
    assert [c.response_ids for c in fresh[0]] != [c.response_ids for c in fresh[1]]


@pytest.mark.parametrize("path", [*FAST, "generic"])
def test_pitfall_23_live_weights_are_the_ones_that_were_sent(path):
    model = make(CONFIGS["llama"](tie_word_embeddings=False))
    with engine_of(model, "fp16", path=path) as engine:
        live = {name: tensor for _, name, tensor in engine.live()}
        for name, tensor in model.named_parameters():
            assert torch.equal(live.pop(name), tensor.half())
        assert not live
        assert engine.precision.verify(engine.live())["rollout"] == len(dict(model.named_parameters()))


def test_pitfall_23_missing_and_unknown_weights_are_refused_by_name():
    model = make(CONFIGS["qwen2"](tie_word_embeddings=True))
    named = dict(model.named_parameters())
    engine = TorchEngine(model.config, Precision.parse("fp16"))
    with pytest.raises(ValueError, match="load_weights first"):
        engine.generate(PROMPTS, Sampling(1))
    broken = {k: v for k, v in named.items() if "layers.1.mlp.up" not in k}
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        engine.load_weights(broken.items(), 0)
    with pytest.raises(ValueError, match=r"unknown: model\.extra"):
        engine.load_weights([*named.items(), ("model.extra", torch.zeros(1))], 0)
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*shape \[3\].*\[64\]"):
        engine.load_weights([*named.items(), ("model.norm.weight", torch.zeros(3))], 0)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*tied"):
        engine.load_weights([*named.items(), ("lm_head.weight", torch.zeros(97, 64))], 0)
    with pytest.raises(Overflow, match=r"not finite.*fp16.*65504: model\.norm\.weight\."):
        engine.load_weights({**named, "model.norm.weight": torch.full((64,), 1e5)}.items(), 0)
    with pytest.raises(ValueError, match="load_weights first"):
        engine.generate(PROMPTS, Sampling(1))
    engine.load_weights([*named.items(), ("lm_head.weight", named["model.embed_tokens.weight"])], 0)
    assert len(engine.generate(PROMPTS, Sampling(1))) == len(PROMPTS)


@pytest.mark.parametrize("path", [*FAST, "generic"])
def test_pitfall_11_token_ids_are_carried_where_text_would_not_lead_back_to_them(path):
    """Random bytes are rarely UTF-8: decoded and tokenised again they become other tokens of other probability."""
    tokenizer = byte_tokenizer()
    model = make(Qwen2Config(**{**SMALL, "vocab_size": len(tokenizer)}))
    with engine_of(model, path=path) as engine:
        out = engine.generate(PROMPTS, Sampling(20))
    again = [tuple(tokenizer(tokenizer.decode(c.response_ids)).input_ids) for c in out]
    assert sum(a != c.response_ids for a, c in zip(again, out, strict=True)) > len(out) // 2
    for prompt, c in zip(PROMPTS, out, strict=True):
        assert c.prompt_ids == prompt.ids
        assert len(c.logp) == len(c.response_ids)
        assert torch.allclose(c.logp.double(), reference(model, c.prompt_ids, c.response_ids), atol=1e-5)


@pytest.mark.parametrize("path", [*FAST, "generic"])
def test_pitfall_12_the_stop_token_is_sampled_scored_and_never_appended(path):
    model = make(CONFIGS["qwen2"]())
    stop = (5, 9, 11, 40, 41, 42, 43)
    with engine_of(model, path=path) as engine:
        out = engine.generate(PROMPTS, Sampling(12, stop_token_ids=stop))
        free = engine.generate(PROMPTS, Sampling(12))
    assert {c.finish for c in out} == {"stop", "length"}
    for c, unstopped in zip(out, free, strict=True):
        # The same seed without stop tokens draws the same tokens: nothing was added, nothing taken away.
        assert c.response_ids == unstopped.response_ids[: c.length]
        assert (c.finish == "stop") == (c.response_ids[-1] in stop)
        expected = reference(model, c.prompt_ids, c.response_ids)[-1]
        assert float(c.logp[-1]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("path", [*FAST, "generic"])
def test_bad_requests_are_named(path):
    with engine_of(make(CONFIGS["qwen2"]()), path=path) as engine:
        assert engine.generate([], Sampling(1)) == []
        assert engine.score([], Sampling(1)) == []
        with pytest.raises(ValueError, match=r"prompt 1 has 40 tokens.*context of 64.*max_tokens to 24"):
            engine.generate([Prompt((1,), 0), Prompt((1,) * 40, 0)], Sampling(25))
        assert engine.generate([Prompt((1,) * 40, 0)], Sampling(24))[0].length == 24
        with pytest.raises(ValueError, match="prompt 0 is empty"):
            engine.generate([Prompt((), 0)], Sampling(1))
        with pytest.raises(ValueError, match="token id 97"):
            engine.generate([Prompt((97,), 0)], Sampling(1))
        with pytest.raises(ValueError, match="temperature"):
            engine.generate([Prompt((1,), 0)], Sampling(1, temperature=-1.0))


def test_which_models_take_the_fast_path():
    for make_config in CONFIGS.values():
        assert unsupported(make_config()) is None
    assert unsupported(OTHERS["mistral-sliding"]()) == "sliding window"
    assert "gpt_neox" in str(unsupported(OTHERS["gpt_neox"]()))
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "dynamic" in str(unsupported(LlamaConfig(**SMALL, rope_parameters=dynamic)))
    with pytest.raises(ValueError, match="sliding window"):
        TorchEngine(OTHERS["mistral-sliding"](), Precision.parse("fp32"), path="plain")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", ["plain", "generic"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_cuda_agrees_with_a_full_forward_pass_on_the_cpu(precision, path):
    model = make(CONFIGS["qwen3"](tie_word_embeddings=True))
    atol = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 0.2}[precision]
    with engine_of(model, precision, path=path, device="cuda", max_batch=4) as engine:
        check_against(model, engine, Sampling(20, stop_token_ids=(5, 9, 11, 40, 41, 42, 43)), atol=atol)
