"""Log-probabilities of given tokens, in FP32, without ever holding the [tokens x vocabulary] logits.

    log pi(y_t) = z[y_t] / T - logsumexp(z / T),    z = head(hidden_t)

The head's product runs over chunks of tokens; the backward pass makes each chunk's logits again. With a vocabulary
of 150,000 and 8,192 tokens the full FP32 logits would take 4.9 GB, and their gradient as much again; a chunk takes
64 MB. Where everything fits one chunk, nothing is computed twice.

The product itself is rounded to the format that the precision plan gives the head (`Precision.head`), on both sides
alike; what comes after, temperature, log-softmax and entropy, is FP32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

CHUNK_ELEMENTS = 1 << 24  # logits in one chunk: 64 MB in FP32


@dataclass(frozen=True)
class Head:
    """An output head: ``softcap(linear(h)) * scale``, multiplied in `dtype`."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype) -> Head:
        """Raises ValueError for an architecture without a plain linear head."""
        head = model.get_output_embeddings()
        config: Any = model.config.get_text_config()
        if not isinstance(head, torch.nn.Linear):
            raise ValueError(f"model.path: {config.model_type} has no linear output head, which training needs")
        scale = 1.0 / getattr(config, "logits_scaling", 1.0) * (getattr(config, "logit_scale", None) or 1.0)
        return cls(head.weight, head.bias, dtype, getattr(config, "final_logit_softcapping", None), scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, V] float32."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # the plan says in what format, autocast does not
            z = F.linear(hidden.to(self.dtype), self.weight.to(self.dtype), bias).float()
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z * self.scale if self.scale != 1.0 else z


def token_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float = 1.0, chunk_elements: int = CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """hidden [N, D], targets [N] -> (log-probabilities [N], entropies [N]), float32.

    Gradients flow from the log-probabilities to `hidden` and to the head's weight and bias; entropies carry none.
    """
    rows = max(1, chunk_elements // head.weight.shape[0])
    logp, entropy = _TokenLogprobs.apply(hidden, head.weight, head.bias, head, targets, temperature, rows)
    return logp, entropy


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, head: Head, targets, temperature: float, rows: int):
        # the head's tensors as autograd hands them over; cast once, not per chunk
        head = Head(weight.to(head.dtype), bias, head.dtype, head.softcap, head.scale)
        logp = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy, lse = torch.empty_like(logp), torch.empty_like(logp)
        z = None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            z = head.logits(hidden[part]).div_(temperature)
            lse[part] = z.logsumexp(-1)
            logp[part] = z.gather(-1, targets[part, None]).squeeze(-1) - lse[part]
            p = (z - lse[part, None]).exp_()
            entropy[part] = lse[part] - p.mul_(z).sum(-1)
        kept = z if len(hidden) <= rows and hidden.requires_grad else None
        ctx.save_for_backward(hidden, head.weight, weight, bias, targets, lse, kept)
        ctx.plan = (head.dtype, head.softcap, head.scale, temperature, rows)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads):
        hidden, cast, weight, bias, targets, lse, kept = ctx.saved_tensors
        dtype, softcap, scale, temperature, rows = ctx.plan
        head = Head(cast, bias, dtype, softcap, scale)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None  # of a frozen head: a product as large as the forward's, for nothing
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            z = head.logits(hidden[part]).div_(temperature) if kept is None else kept
            g = grads[0][part, None]
            p = (z - lse[part, None]).exp_()
            d = p.mul_(-g).scatter_add_(-1, targets[part, None], g).mul_(scale / temperature)
            if softcap is not None:
                d.mul_(1 - (z * (temperature / scale) / softcap).square())
            if grad_bias is not None:
                grad_bias += d.sum(0)
            d = d.to(dtype)
            grad_hidden[part] = (d @ cast).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += d.T @ hidden[part].to(dtype)
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def response_hidden(model: PreTrainedModel, tokens: Tensor, prompt_length: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [N, D] from which the N response tokens (row by row) are predicted.

    `tokens` [B, L] are padded on the right. Attention is causal, so no response token can see padding, and no
    attention mask is passed: that keeps the fastest kernels available.
    """
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    row, t = mask.nonzero(as_tuple=True)
    return hidden[row, prompt_length[row] + t - 1]


def batch_logprobs(
    model: PreTrainedModel, head: Head, tokens: Tensor, prompt_length: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """([B, T] log pi(y_t), zero outside the mask; [N] entropies of the N response tokens)."""
    row, t = mask.nonzero(as_tuple=True)
    targets = tokens[row, prompt_length[row] + t]
    logp, entropy = token_logprobs(response_hidden(model, tokens, prompt_length, mask), head, targets, temperature)
    return torch.zeros(mask.shape, device=mask.device).index_put((row, t), logp), entropy
