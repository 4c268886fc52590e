"""Prompt templates with real tokenizers: what ids come out, and that the first token is never doubled or lost."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tenbit.tasks.templates import TEMPLATES, encode_prompt, find_template, render_prompt

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
TRICKY = r"Let $f(x)=\left\{\begin{array}{c}x\end{array}\right.$, {problem} {0} %s {x}. Find \boxed{f}."

R1 = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(special: list[str], bos: str | None, eos: str, *, adds: str = "", chat: str | None = None):
    """A byte-level tokenizer with these special tokens; `adds` is what it puts around every text by itself."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(letters)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    if adds:
        ids = [(t, core.token_to_id(t)) for t in special if t in adds]
        core.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, chat_template=chat)


@pytest.fixture
def r1():
    return make_tokenizer(R1, R1[0], R1[1], adds=f"{R1[0]} $A")


@pytest.fixture
def qwen():
    return make_tokenizer(QWEN, None, QWEN[2])


@pytest.fixture
def llama():
    return make_tokenizer(LLAMA, LLAMA[0], LLAMA[1], adds=f"{LLAMA[0]} $A")


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_r1_distill_is_the_authors_format(r1):
    ids = encode_prompt("r1-distill", "What is 1+1?", r1)
    assert decode(r1, ids) == (f"<｜begin▁of▁sentence｜><｜User｜>What is 1+1? {BOXED}\n<｜Assistant｜><think>\n")


def test_r1_distill_begins_with_one_bos_though_template_and_tokenizer_both_write_it(r1):
    text = render_prompt("r1-distill", "x", r1)
    assert r1(text)["input_ids"][:2] == [r1.bos_token_id] * 2  # the mistake that is avoided
    ids = encode_prompt("r1-distill", "x", r1)
    assert ids[0] == r1.bos_token_id
    assert ids.count(r1.bos_token_id) == 1


def test_special_tokens_of_a_template_become_single_ids(r1, qwen):
    assert encode_prompt("r1-distill", "x", r1)[1] == r1.convert_tokens_to_ids("<｜User｜>")
    ids = encode_prompt("qwen-math", "x", qwen)
    assert ids.count(qwen.convert_tokens_to_ids("<|im_start|>")) == 3
    assert ids.count(qwen.convert_tokens_to_ids("<|im_end|>")) == 2


def test_qwen_math_is_qwens_chat_prompt_with_the_authors_system_prompt(qwen):
    assert decode(qwen, encode_prompt("qwen-math", "1+1?", qwen)) == (
        f"<|im_start|>system\n{BOXED}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_bos_that_the_tokenizer_adds_is_kept_for_a_template_without_one(llama, qwen):
    assert encode_prompt("plain", "x", llama) == (
        llama.bos_token_id,
        *llama("x\n", add_special_tokens=False)["input_ids"],
    )
    assert encode_prompt("plain", "x", qwen) == tuple(qwen("x\n")["input_ids"])


def test_a_prompt_never_ends_in_the_eos_that_a_tokenizer_adds():
    tokenizer = make_tokenizer(LLAMA, LLAMA[0], LLAMA[1], adds=f"{LLAMA[0]} $A {LLAMA[1]}")
    ids = encode_prompt("plain", "x", tokenizer)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids


def test_bos_is_not_invented_for_a_tokenizer_that_has_one_and_does_not_add_it():
    tokenizer = make_tokenizer(LLAMA, LLAMA[0], LLAMA[1])
    assert tokenizer.bos_token_id not in encode_prompt("plain", "x", tokenizer)


@pytest.mark.parametrize("adds", ["", f"{LLAMA[0]} $A"])
def test_a_chat_template_is_taken_as_transformers_itself_encodes_it(adds):
    tokenizer = make_tokenizer(LLAMA, LLAMA[0], LLAMA[1], adds=adds, chat=CHAT)
    turns = [{"role": "user", "content": TRICKY}]
    theirs = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    ids = encode_prompt("chat", TRICKY, tokenizer)
    assert list(ids) == list(theirs)
    assert ids.count(tokenizer.bos_token_id) == 1
    asked = decode(tokenizer, encode_prompt("chat-boxed", "x", tokenizer))
    assert asked == f"<|begin_of_text|>[user]x\n\n{BOXED}[assistant]"


def test_chat_without_a_chat_template_is_refused_with_the_remedy(qwen):
    with pytest.raises(ValueError, match=r"no chat template.*'plain'.*\{problem\}"):
        encode_prompt("chat", "x", qwen)


def test_a_format_whose_tokens_the_tokenizer_lacks_is_refused_with_the_remedy(qwen):
    with pytest.raises(ValueError, match=r"<｜begin▁of▁sentence｜>.*'chat' or 'plain'"):
        encode_prompt("r1-distill", "x", qwen)


def test_braces_mean_nothing_in_problems_and_templates(qwen):
    assert decode(qwen, encode_prompt("plain", TRICKY, qwen)) == TRICKY + "\n"
    own = r"Put {it} in \boxed{}: {problem} {}"
    assert decode(qwen, encode_prompt(own, TRICKY, qwen)) == r"Put {it} in \boxed{}: " + TRICKY + " {}"


def test_every_template_holds_the_problem_once(r1, qwen, llama):
    everything = make_tokenizer([*R1, *QWEN, *LLAMA], R1[0], R1[1], chat=CHAT)
    for name in TEMPLATES:
        assert render_prompt(name, "⟨the problem⟩", everything).count("⟨the problem⟩") == 1, name


def test_an_unknown_template_names_the_near_one_and_the_way_to_write_ones_own():
    with pytest.raises(ValueError, match=r"'qwen_math'.*Did you mean 'qwen-math'.*\{problem\}"):
        find_template("qwen_math")


def test_a_prompt_of_no_tokens_is_refused(qwen):
    with pytest.raises(ValueError, match="no token"):
        encode_prompt("{problem}", "", qwen)
