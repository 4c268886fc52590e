r"""Makes the built-in model: a 1.7M-parameter Qwen2 that does arithmetic in steps, from a fixed seed.

    python -m tenbit.models.pretrain --out DIR                  train from scratch and save; resumes if stopped
    python -m tenbit.models.pretrain --out DIR --minutes 10     stop after ten minutes; the same command goes on

`python -m tenbit.studies.builtin` measures the result and writes the perfectible set that it defines.

The model learns by next-token prediction on solutions of `tenbit.tasks.arithmetic`, short problems first. The
solutions of the last stage are **imperfect on purpose**: each operation's result is off by one in one digit with
probability `MISTAKE`, and the solution carries on from it. Real pre-training text has mistakes too, and a model of
it reproduces their rate when it is sampled at temperature 1, although it knows better: its most likely token is
still the right one. That is the state reinforcement learning starts from. The competence is there (greedy accuracy
98%), the policy is noisy (50% at temperature 1), and RL has the noise to remove. No problem of the shipped sets is
in the training data.

The tokenizer is byte-level without merges: 256 bytes, whose ids are their values, and four special tokens. Any
text can be encoded, and comes back in Unicode's composed form (NFC), in which nearly all text already is.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from tenbit.precision import Precision
from tenbit.tasks import arithmetic

BUILTIN = Path(__file__).parent / "builtin"
SEED = 26788
MISTAKE = 0.10
PEAK_LR = 3e-3
WARMUP = 100
POOL = 10
"""Problems are drawn for so many steps at a time and sorted by length, so that little is padding."""


@dataclass(frozen=True)
class Stage:
    """Training up to step `until` on `rows` problems a step, of some numbers of operations (None: the task's)."""

    until: int
    rows: int
    operations: range | None
    mistake: float


STAGES = (
    Stage(500, 128, range(1, 4), 0.0),
    Stage(1000, 64, range(2, 7), 0.0),
    Stage(1250, 32, None, 0.0),
    Stage(1700, 16, None, 0.0),
    Stage(2000, 16, None, MISTAKE),
)
"""Short problems first, which makes the steps learnable; mistakes last."""
STEPS = STAGES[-1].until
PAD, EOS, IM_START, IM_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STATE = "pretrain_state.pt"


def build_tokenizer() -> Qwen2Tokenizer:
    """256 bytes with ids 0..255, then pad, end of sequence and the two markers of the chat template.

    The class is Qwen2's own, because `AutoTokenizer` loads that for a Qwen2 folder whatever the folder says.
    Its unknown token is the end of sequence, and never occurs.
    """
    # The byte-level alphabet stands for byte b by a printable character: itself where b is one, else 256, 257, ...
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocabulary = {alphabet[b]: b for b in range(256)}
    vocabulary |= {token: 256 + i for i, token in enumerate((PAD, EOS, IM_START, IM_END))}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[IM_START, IM_END],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def build_config(tokenizer: Any) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=264,  # 260 tokens, rounded up to a multiple of 8 for tensor cores
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_batch(tokenizer: Any, chains: Sequence[arithmetic.Chain], mistake: float, seed: str) -> tuple[Tensor, Tensor]:
    """tokens [B, L] padded on the right, labels [B, L] with -100 on prompt and padding; `seed` draws the slips."""
    rng = random.Random(seed)
    pairs = []
    for chain in chains:
        prompt = tokenizer.encode(arithmetic.TEMPLATE.format(problem=chain.expression))
        response = [*tokenizer.encode(arithmetic.solution(chain, rng, mistake)), tokenizer.eos_token_id]
        pairs.append((prompt, response))
    shape = len(pairs), max(len(p) + len(r) for p, r in pairs)
    tokens, labels = torch.full(shape, tokenizer.pad_token_id), torch.full(shape, -100)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
    return tokens, labels


def stage_of(step: int) -> Stage:
    return next(stage for stage in STAGES if step < stage.until)


def problems_of(step: int) -> list[arithmetic.Chain]:
    """The problems of one step, of similar length. A function of `SEED` and `step`; none is in a shipped set."""
    stage, (pool, index) = stage_of(step), divmod(step, POOL)
    rng = random.Random(f"{SEED}/{pool}")
    chains: list[arithmetic.Chain] = []
    while len(chains) < POOL * stage.rows:
        chain = arithmetic.draw(rng, rng.choice(stage.operations)) if stage.operations else arithmetic.generate(rng)
        if not arithmetic.is_held_out(chain):
            chains.append(chain)
    chains.sort(key=lambda chain: len(arithmetic.solution(chain)))
    turn = rng.sample(range(POOL), POOL)[index]
    return chains[turn * stage.rows : (turn + 1) * stage.rows]


def loss_on(body: Any, head: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled tokens. Right padding needs no attention mask under causal attention."""
    hidden = body(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    target = labels[:, 1:]
    wanted = target != -100
    logits = head(hidden[wanted]).float()
    return F.cross_entropy(logits, target[wanted])


def schedule(step: int) -> float:
    """The learning rate as a part of the peak: a short warm-up, then a straight line down to a hundredth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return max(0.01, (STEPS - step) / (STEPS - WARMUP))


def train(out: Path, minutes: float, device: str, compile: bool) -> bool:
    """Trains until `STEPS` are done (True) or `minutes` are over (False); goes on from what `out` holds."""
    precision = Precision.parse({"preset": "bf16", "casting": "autocast"})
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    model: Any = Qwen2ForCausalLM(build_config(tokenizer))
    model.to(device)
    model.set_attn_implementation("eager")  # on short rows faster than the fused kernel's backward on a CPU
    optimizers = build_optimizers(model)
    out.mkdir(parents=True, exist_ok=True)
    saved = out / STATE
    step = _load_state(saved, model, optimizers, device) if saved.exists() else 0
    body = torch.compile(model.model, dynamic=True) if compile else model.model
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {step} to {STEPS}", flush=True)

    begin = shown = time.monotonic()
    tokens_seen, losses = 0, []
    while step < STEPS and time.monotonic() - begin < 60 * minutes:
        tokens, labels = make_batch(tokenizer, problems_of(step), stage_of(step).mistake, f"{SEED}/{step}/slips")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * schedule(step)
        with precision.autocast(device):
            loss = loss_on(body, model.lm_head, tokens.to(device), labels.to(device))
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        losses.append(loss.item())
        tokens_seen += tokens.numel()
        if step % 50 == 0 or step == STEPS:
            now = time.monotonic()
            print(
                f"step {step}/{STEPS}  loss {sum(losses) / len(losses):.4f}  "
                f"{tokens_seen / (now - shown):,.0f} tokens/s  {(now - begin) / 60:.1f} min",
                flush=True,
            )
            shown, tokens_seen, losses = now, 0, []
        if step % 250 == 0:
            _save_state(saved, step, model, optimizers)
    _save_state(saved, step, model, optimizers)
    export(model, tokenizer, out)
    if step == STEPS:
        saved.unlink()  # four times the size of the model, and no part of it
    return step == STEPS


def build_optimizers(model: Any, lr: float = PEAK_LR) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest."""
    inside = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = set(map(id, inside))
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inside, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _plan() -> str:
    return f"{STAGES} lr={PEAK_LR} seed={SEED}"


def _save_state(path: Path, step: int, model: Any, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Written next to its place, then moved there, so that a killed run leaves the earlier state."""
    fresh = path.with_suffix(".new")
    state = {"plan": _plan(), "step": step, "model": model.state_dict()}
    torch.save(state | {"optimizers": [o.state_dict() for o in optimizers]}, fresh)
    fresh.replace(path)


def _load_state(path: Path, model: Any, optimizers: Sequence[torch.optim.Optimizer], device: str) -> int:
    state = torch.load(path, map_location=device, weights_only=True)
    if state["plan"] != _plan():
        raise ValueError(f"{path}: belongs to a run of {state['plan']}, not of {_plan()}; delete it to start anew")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def export(model: Any, tokenizer: Any, out: Path) -> None:
    """Saves weights in the format of the FP16 plan, with configuration and tokenizer, as a Hugging Face folder."""
    half = Precision.parse("fp16").export.dtype
    copy: Any = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(half)
    copy.config.dtype = half
    copy.generation_config.update(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tenbit.models.pretrain", description="Makes the built-in model.")
    parser.add_argument("--out", type=Path, default=BUILTIN, help="the checkpoint folder")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then; the same command goes on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile, faster; needs a C++ compiler")
    args = parser.parse_args()
    if not train(args.out, args.minutes, args.device, args.compile):
        print(f"stopped after {args.minutes:g} minutes; the same command goes on from here")


if __name__ == "__main__":
    main()
