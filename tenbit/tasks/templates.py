r"""Prompt templates: the text around a problem, and its one tokenisation.

    encode_prompt("r1-distill", problem.prompt, tokenizer)      -> token ids
    encode_prompt("Q: {problem}\nA:", problem.prompt, tokenizer)   a template of your own, as text

A template is a name of `TEMPLATES` or any text with ``{problem}`` in it. Other braces mean nothing, neither in the
template (``\boxed{}``) nor in the problem. Special tokens that the text writes out (``<|im_start|>``) become the single
ids the tokenizer has for them.

The beginning-of-sequence token stands there exactly once: where the template writes it, and else where the tokenizer
itself would put it. A chat template is taken as it is: it writes its own. The ids are what is sampled from, scored
and trained on; nothing is tokenised a second time.

`r1-distill`, `r1-zero`, `qwen-math`, `qwen3` and `llama3` are, character for character, those of the paper's
authors (`oat/main.py` of sail-sg/Precision-RL). `dapo` is the wording of DAPO-Math-17k, put through the chat template.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "{problem}"
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass(frozen=True)
class Text:
    """A template as plain text with `MARK` where the problem goes. `special` must be tokens of the tokenizer."""

    text: str
    special: tuple[str, ...] = ()

    def render(self, problem: str, tokenizer: PreTrainedTokenizerBase) -> str:
        for token in self.special:
            if not _is_token(token, tokenizer):
                raise ValueError(
                    f"the template writes the special token {token!r}, but this model's tokenizer does not have it: "
                    "the model was trained with another format. Use 'chat' or 'plain', or give a template of your "
                    f"own, a text with {MARK} in it."
                )
        return self.text.replace(MARK, problem)


@dataclass(frozen=True)
class Chat:
    """The tokenizer's own chat template with one user turn, `message`, and the assistant's turn opened."""

    message: str = MARK

    def render(self, problem: str, tokenizer: PreTrainedTokenizerBase) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "this model's tokenizer has no chat template. Use 'plain', or give a template of your own, a text with "
                f"{MARK} in it."
            )
        turn = {"role": "user", "content": self.message.replace(MARK, problem)}
        rendered = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        assert isinstance(rendered, str)
        return rendered


Template = Text | Chat

TEMPLATES: dict[str, Template] = {
    "plain": Text("{problem}\n"),
    "r1-distill": Text(
        f"<｜begin▁of▁sentence｜><｜User｜>{MARK} {BOXED}\n<｜Assistant｜><think>\n",
        special=("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    ),
    "r1-zero": Text(
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
        "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
        "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> "
        "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
        f"User: {MARK}\nAssistant: <think>"
    ),
    "qwen-math": Text(
        f"<|im_start|>system\n{BOXED}<|im_end|>\n<|im_start|>user\n{MARK}<|im_end|>\n<|im_start|>assistant\n",
        special=("<|im_start|>", "<|im_end|>"),
    ),
    "qwen3": Text(
        f"<|im_start|>user\nQuestion: {MARK}\n{BOXED}<|im_end|>\n<|im_start|>assistant\n",
        special=("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": Text(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\n<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{MARK} {BOXED}\n<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "chat": Chat(),
    "chat-boxed": Chat(f"{MARK}\n\n{BOXED}"),
    "dapo": Chat(
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
        f'{MARK}\n\nRemember to put your answer on its own line after "Answer:".'
    ),
}


def find_template(template: str) -> Template:
    """The template of that name, or the text itself as one. Raises ValueError for a text without ``{problem}``."""
    if template in TEMPLATES:
        return TEMPLATES[template]
    if MARK in template:
        return Text(template)
    near = difflib.get_close_matches(template, TEMPLATES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"there is no template {template!r}.{hint} Write one of {', '.join(TEMPLATES)}, or a text of your own with "
        f"{MARK} where the problem goes."
    )


def render_prompt(template: str, problem: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as text, without a beginning-of-sequence token that the tokenizer adds by itself."""
    return find_template(template).render(problem, tokenizer)


def encode_prompt(template: str, problem: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The prompt's token ids, with the beginning-of-sequence token once if the tokenizer has one at all.

    Raises ValueError for an unknown template, a tokenizer without a chat template, or one that lacks the special
    tokens that a model's format is made of.
    """
    text = render_prompt(template, problem, tokenizer)
    ids = _ids(tokenizer, text, False)
    if not isinstance(find_template(template), Chat):
        ids = [*_opening(tokenizer, ids), *ids]
    if not ids:
        raise ValueError(f"template {template!r} makes no token at all of the problem {problem[:60]!r}")
    return tuple(ids)


def _opening(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """What the tokenizer itself puts in front of every text, unless the text has begun with it.

    Taken from what it makes of an empty text, and only the beginning-of-sequence token: some close it with an
    end-of-sequence token too, after which there would be nothing to answer.
    """
    bos = tokenizer.bos_token_id
    added = _ids(tokenizer, "", True)
    return [bos] if isinstance(bos, int) and added[:1] == [bos] and ids[:1] != [bos] else []


def _is_token(token: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = _ids(tokenizer, token, False)
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    return cast("list[int]", tokenizer.encode(text, add_special_tokens=add_special_tokens))
