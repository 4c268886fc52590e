"""The built-in checkpoint as a stranger would use it: through the Auto classes, on text of every kind."""

from __future__ import annotations

import json
import random
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tenbit.engines.torch import TorchEngine
from tenbit.models import pretrain
from tenbit.precision import Precision
from tenbit.tasks import arithmetic
from tenbit.types import Prompt, Sampling


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pretrain.BUILTIN)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(pretrain.BUILTIN, dtype=torch.float32).eval()


def test_any_text_comes_back(tokenizer):
    rng = random.Random(0)
    planes = [(1, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    texts = ["", " ", "a , b . don 't", "\r\n\t\x00 x ", "x²  ≠ y\n\n", *("".join(map(chr, range(256))),)]
    texts += ["".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(50)) for _ in range(300)]
    for text in texts:
        text = unicodedata.normalize("NFC", text)
        ids = tokenizer.encode(text)
        assert ids == list(text.encode("utf-8"))
        assert tokenizer.decode(ids) == text


def test_any_bytes_can_be_decoded(tokenizer):
    rng = random.Random(1)
    for _ in range(200):
        raw = bytes(rng.randrange(256) for _ in range(30))
        assert tokenizer.decode(list(raw)) == raw.decode("utf-8", errors="replace")


def test_special_tokens_are_apart(tokenizer, model):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert min(tokenizer.pad_token_id, tokenizer.eos_token_id) >= 256
    assert len(tokenizer) <= model.config.vocab_size
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.encode("1+1\n<|endoftext|>")[-1] == tokenizer.eos_token_id


def test_chat_template(tokenizer):
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    marker = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids.count(marker) == 2
    assert tokenizer.decode(ids) == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"


def test_the_folder_is_small_and_in_fp16():
    files = [path for path in pretrain.BUILTIN.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert not [path for path in files if path.suffix in {".pt", ".bin"}]
    with safe_open(pretrain.BUILTIN / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118


def test_the_shape_is_what_other_engines_take(model):
    config = model.config
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.hidden_size // config.num_attention_heads in (32, 64)
    assert config.num_attention_heads % 2 == config.num_key_value_heads % 2 == 0
    assert config.max_position_embeddings == 1024
    assert model.lm_head.weight is model.model.embed_tokens.weight


def share_right(model, tokenizer, problems, temperature: float) -> float:
    precision = Precision.parse("fp16")
    with TorchEngine(model.config, precision) as engine:
        engine.load_weights(precision.to_engine(model.state_dict().items()), 0)
        prompts = [
            Prompt(tuple(tokenizer.encode(arithmetic.TEMPLATE.format(problem=p.prompt))), seed)
            for seed, p in enumerate(problems)
        ]
        sampling = Sampling(320, temperature=temperature, stop_token_ids=(tokenizer.eos_token_id,))
        drawn = engine.generate(prompts, sampling)
    texts = [tokenizer.decode(list(c.response_ids), skip_special_tokens=True) for c in drawn]
    return sum(map(arithmetic.is_correct, problems, texts)) / len(problems)


def test_greedily_it_knows_the_task(model, tokenizer):
    assert share_right(model, tokenizer, arithmetic.load("arithmetic_test")[:64], temperature=0.0) >= 0.9


def test_sampled_it_is_right_about_half_of_the_time(model, tokenizer):
    assert 0.30 <= share_right(model, tokenizer, arithmetic.load("arithmetic")[:128], temperature=1.0) <= 0.70


def test_the_shipped_perfectible_set_is_a_part_of_its_source():
    whole = {p.prompt: p.answer for p in arithmetic.load("arithmetic")}
    lines = (arithmetic.DATA / "arithmetic_perfectible.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 256
    assert all(whole[r["problem"]] == r["answer"] and 0.2 <= r["initial_accuracy"] <= 0.8 for r in rows)


def test_training_problems_are_of_one_length_and_none_is_shipped():
    shipped = {p.prompt for name in arithmetic.SIZES for p in arithmetic.load(name)}
    for step in (0, 600, 1200, 1500, 1999):
        chains = pretrain.problems_of(step)
        assert chains == pretrain.problems_of(step)
        assert len(chains) == pretrain.stage_of(step).rows
        assert not shipped & {c.expression for c in chains}
    assert not set(pretrain.problems_of(0)) & set(pretrain.problems_of(1)) & set(pretrain.problems_of(2))


def test_labels_are_the_response_and_its_end(tokenizer):
    chains = pretrain.problems_of(1500)[:3]
    tokens, labels = pretrain.make_batch(tokenizer, chains, 0.0, "x")
    for chain, row, target in zip(chains, tokens, labels, strict=True):
        learned = target[target != -100].tolist()
        assert tokenizer.decode(learned) == arithmetic.solution(chain) + tokenizer.eos_token
        assert tokenizer.decode(row[row != tokenizer.pad_token_id]) == (
            f"{chain.expression}\n{arithmetic.solution(chain)}{tokenizer.eos_token}"
        )
        assert torch.equal(row[target != -100], target[target != -100])


def test_the_loss_is_that_of_the_full_model_one_row_at_a_time(model, tokenizer):
    tokens, labels = pretrain.make_batch(tokenizer, pretrain.problems_of(1500)[:3], 0.1, "x")
    with torch.no_grad():
        got = pretrain.loss_on(model.model, model.lm_head, tokens, labels)
        total, count = 0.0, 0
        for row, target in zip(tokens, labels, strict=True):
            end = int((row != tokenizer.pad_token_id).sum())
            logits = model(row[None, :end]).logits[0, :-1].double()
            want = target[1:end]
            total += float(F.cross_entropy(logits[want != -100], want[want != -100], reduction="sum"))
            count += int((want != -100).sum())
    assert float(got) == pytest.approx(total / count, abs=1e-5)


def test_resuming_continues_the_same_run(tmp_path, monkeypatch):
    small = (pretrain.Stage(4, 4, range(1, 3), 0.0), pretrain.Stage(6, 4, range(2, 4), 0.5))
    monkeypatch.setattr(pretrain, "STAGES", small)
    monkeypatch.setattr(pretrain, "STEPS", 6)
    monkeypatch.setattr(pretrain, "WARMUP", 2)
    assert pretrain.train(tmp_path / "whole", minutes=9, device="cpu", compile=False)

    ticks = iter(range(1000))
    monkeypatch.setattr(pretrain, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(ticks)))
    halts = 0
    while not pretrain.train(tmp_path / "parts", minutes=3, device="cpu", compile=False):
        halts += 1
    assert halts >= 1
    whole, parts = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").state_dict() for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
