r"""Makes a small mixture of experts that can do something: the built-in model, upcycled to a Qwen3-MoE.

    python -m tenbit.models.upcycle --out models/mixture     some ten minutes on one core, for recipes/cpu/moe.toml

A random mixture routes at random and has nothing to learn from; how often a *trained* router is near a tie is what the
mismatch of mixtures depends on. So the dense model's weights are taken over (sparse upcycling, arXiv 2212.05055): each
of 8 experts begins with a random half of its layer's neurons, of which a token takes 2 experts, so that a token costs
what it did; what is new (routers, the norms of queries and keys) and what is gone (the biases of Qwen2) is made up for
by a few hundred more steps of `pretrain`, on the same data, with the usual loss for balance. 5.2M parameters, of which
1.6M work for a token.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tenbit.models import pretrain
from tenbit.precision import Format

EXPERTS, TAKEN, STEPS, PEAK_LR, WARMUP, BALANCE = 8, 2, 500, 2e-3, 30, 0.01


def build_config(dense: Any) -> Qwen3MoeConfig:
    """Of a mixture with `EXPERTS` experts of half of the dense layer's neurons each."""
    return Qwen3MoeConfig(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        moe_intermediate_size=dense.intermediate_size // 2,
        num_experts=EXPERTS,
        num_experts_per_tok=TAKEN,
        norm_topk_prob=True,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        head_dim=dense.hidden_size // dense.num_attention_heads,  # pyright: ignore
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters=dense.rope_parameters,
        router_aux_loss_coef=BALANCE,
        tie_word_embeddings=dense.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
    )


@torch.no_grad()
def upcycled(dense: Any, tokens: Tensor) -> Any:
    """The mixture before it is trained further. `tokens` ``[B, L]`` tell how large queries and keys are."""
    model: Any = Qwen3MoeForCausalLM(build_config(dense.config))
    model.load_state_dict(dense.state_dict(), strict=False)
    half = model.config.moe_intermediate_size
    for new, old in zip(model.model.layers, dense.model.layers, strict=True):
        for expert in range(EXPERTS):
            kept = torch.randperm(2 * half)[:half]
            gate, up = old.mlp.gate_proj.weight[kept], old.mlp.up_proj.weight[kept]
            new.mlp.experts.gate_up_proj[expert] = torch.cat([gate, up])
            # two experts that weigh one half each stand for a quarter of the layer twice: times 2 it is as large again
            new.mlp.experts.down_proj[expert] = 2 * old.mlp.down_proj.weight[:, kept]
    for norm, size in zip(_norms(model), _sizes(dense, tokens), strict=True):
        norm.weight.fill_(size)
    return model


def _norms(model: Any) -> list[Any]:
    return [n for layer in model.model.layers for n in (layer.self_attn.q_norm, layer.self_attn.k_norm)]


def _sizes(dense: Any, tokens: Tensor) -> list[float]:
    """Root mean square of the queries and of the keys of each layer, on average over heads and tokens."""
    sizes: list[float] = []

    def note(_part: Any, _given: Any, out: Tensor) -> None:
        sizes.append(out.square().mean().sqrt().item())

    parts = [p for layer in dense.model.layers for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)]
    hooks = [part.register_forward_hook(note) for part in parts]
    dense.model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sizes


def loss_on(model: Any, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the labelled tokens, and transformers' loss for balance among experts."""
    out = model(input_ids=tokens, use_cache=False, output_router_logits=True)
    wanted = labels[:, 1:] != -100
    return F.cross_entropy(out.logits[:, :-1][wanted].float(), labels[:, 1:][wanted]), out.aux_loss


def train(out: Path, steps: int = STEPS) -> None:
    """Upcycles the built-in model, trains the mixture for `steps` steps in FP32, and saves it in `out`."""
    torch.manual_seed(pretrain.SEED)
    tokenizer = pretrain.build_tokenizer()
    dense: Any = AutoModelForCausalLM.from_pretrained(pretrain.BUILTIN, dtype=Format.FP32.dtype)
    model = upcycled(dense, batch(tokenizer, 0, steps)[0])
    optimizers = pretrain.build_optimizers(model, PEAK_LR)
    begin, losses = time.monotonic(), []
    for step in range(steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = PEAK_LR * min((step + 1) / WARMUP, max(0.01, 1 - step / steps))
        loss, balance = loss_on(model, *batch(tokenizer, step, steps))
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            minutes = (time.monotonic() - begin) / 60
            print(f"step {step + 1}/{steps}  loss {sum(losses) / len(losses):.4f}  {minutes:.1f} min", flush=True)
            losses = []
    pretrain.export(model, tokenizer, out)


def batch(tokenizer: Any, step: int, steps: int) -> tuple[Tensor, Tensor]:
    """The problems that ended the dense model's training, with new slips in their solutions."""
    problems = pretrain.problems_of(pretrain.STEPS - steps + step)
    return pretrain.make_batch(tokenizer, problems, pretrain.MISTAKE, f"{pretrain.SEED}/upcycle/{step}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tenbit.models.upcycle", description="Makes a small mixture.")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"up to {pretrain.STEPS}")
    args = parser.parse_args()
    train(args.out, args.steps)


if __name__ == "__main__":
    main()
