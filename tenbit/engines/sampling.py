"""Drawing tokens, and the log-probability of the distribution they are drawn from.

mu(y | context) is the softmax of the model's logits, taken to FP32, divided by the temperature, then restricted
to `top_k` and `top_p` (in this order, on the renormalised distribution, as `transformers` and vLLM do it). The
log-probabilities returned here are of exactly that distribution, so a truncated one is renormalised. At
temperature 0 the distribution is a point mass on the largest logit, and log mu is 0.

A token is drawn by inverse CDF from one uniform number: the first token whose cumulated probability exceeds it.
The numbers of a request come from its own generator, `uniforms(seed, n)`, one for each token, on the CPU. Hence a
response is a function of weights, prompt and seed, whatever else is in the batch and on whatever device.

    tokens, logp = draw(logits, uniform, sampling)          logits [n, V], uniform [n]
    logp = log_mu(logits, tokens, sampling)                  the same number for tokens that are given

A row whose logits are not all finite comes back with logp NaN, for the caller to refuse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenbit.types import Sampling


def check(sampling: Sampling) -> None:
    """Refuses settings that describe no distribution."""
    if sampling.max_tokens < 1:
        raise ValueError(f"max_tokens = {sampling.max_tokens}: a response has at least one token; set it to 1 or more.")
    if not 0.0 <= sampling.temperature < float("inf"):
        raise ValueError(f"temperature = {sampling.temperature}: must be 0 (greedy) or a positive number.")
    if not 0.0 < sampling.top_p <= 1.0:
        raise ValueError(f"top_p = {sampling.top_p}: must be above 0 and at most 1 (1 truncates nothing).")
    if sampling.top_k < 0:
        raise ValueError(f"top_k = {sampling.top_k}: must be a positive number, or 0 to truncate nothing.")


def uniforms(seed: int, count: int) -> Tensor:
    """[count] float32 in [0, 1): the random numbers of one request."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def _keep_top_k(scores: Tensor, k: int) -> Tensor:
    """-inf outside the k largest; ties with the k-th stay."""
    if k >= scores.shape[-1]:
        return scores
    return scores.masked_fill(scores < scores.topk(k).values[..., -1:], -torch.inf)


def _keep_top_p(scores: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of most probable tokens whose probability reaches p; the first one stays."""
    probability = scores.softmax(-1)
    vocabulary = scores.shape[-1]
    # A full sort of a large vocabulary is slow and the set is nearly always small: look at ever more of the top.
    width = min(256, vocabulary)
    while True:
        top, index = probability.topk(width)
        before = top.cumsum(-1) - top
        if width == vocabulary or bool((before[..., -1] >= p).all()):
            break
        width = min(8 * width, vocabulary)
    inside = before < p
    inside[..., 0] = True
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, inside)
    return scores.masked_fill(~keep, -torch.inf)


def _scores(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """FP32 logits with temperature and truncation applied, and for each row whether its logits are finite."""
    scores = logits.float()
    low, high = scores.aminmax(dim=-1)
    finite = (low.isfinite()) & (high.isfinite())
    if not bool(finite.all()):
        scores = torch.where(finite[..., None], scores, 0.0)
    if sampling.temperature not in (0.0, 1.0):
        scores = scores / sampling.temperature
    if sampling.top_k:
        scores = _keep_top_k(scores, sampling.top_k)
    if sampling.top_p < 1.0:
        scores = _keep_top_p(scores, sampling.top_p)
    return scores, finite


def _inverse_cdf(scores: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulated weight exceeds u times the total; one with weight 0 is never it."""
    top = scores.amax(-1, keepdim=True)
    cumulated = (scores - top).exp_().cumsum(-1)
    total = cumulated[..., -1]
    # u * total can round up to the total, which no cumulated weight exceeds.
    target = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulated, target[..., None], right=True)[..., 0]


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens ``[n]`` int64 and their log mu ``[n]`` float32, from logits ``[n, V]`` and numbers ``[n]`` in [0, 1)."""
    scores, finite = _scores(logits, sampling)
    tokens = scores.argmax(-1) if sampling.temperature == 0.0 else _inverse_cdf(scores, uniform)
    return tokens, _log_mu(scores, finite, tokens, sampling)


def log_mu(logits: Tensor, tokens: Tensor, sampling: Sampling) -> Tensor:
    """log mu ``[n]`` float32 of given tokens ``[n]``; -inf for one outside what temperature and truncation leave."""
    scores, finite = _scores(logits, sampling)
    return _log_mu(scores, finite, tokens, sampling)


def log_mu_all(logits: Tensor, sampling: Sampling) -> Tensor:
    """log mu ``[n, V]`` float32 of every token: what `log_mu` picks from."""
    scores, finite = _scores(logits, sampling)
    if sampling.temperature == 0.0:
        best = scores.argmax(-1, keepdim=True)
        logp = torch.full_like(scores, -torch.inf).scatter_(-1, best, 0.0)
    else:
        logp = scores.log_softmax(-1)
    return logp.masked_fill(~finite[..., None], torch.nan)


def _log_mu(scores: Tensor, finite: Tensor, tokens: Tensor, sampling: Sampling) -> Tensor:
    if sampling.temperature == 0.0:
        logp = torch.where(scores.argmax(-1) == tokens, 0.0, -torch.inf)
    else:
        logp = scores.gather(-1, tokens[..., None])[..., 0] - scores.logsumexp(-1)
    return logp.masked_fill(~finite, torch.nan)
