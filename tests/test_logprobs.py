"""Chunked log-probabilities against plain autograd through the full logits, and their memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import small_module

from tenbit.models.logprobs import Head, batch_logprobs, token_logprobs


def direct(hidden, weight, bias, targets, temperature, softcap, scale):
    """What the chunked function must equal, written out with the full logits."""
    z = hidden @ weight.T + (0 if bias is None else bias)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z * scale / temperature
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp[torch.arange(len(targets)), targets], entropy


@pytest.mark.parametrize("chunk", [7, 40, 10**6])
@pytest.mark.parametrize(("with_bias", "softcap", "scale"), [(False, None, 1.0), (True, None, 1.0), (True, 3.0, 0.5)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_full_logits_in_value_and_gradient(chunk, with_bias, softcap, scale, temperature):
    torch.manual_seed(0)
    n, d, v = 23, 8, 11
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=True)
    bias = torch.randn(v, requires_grad=True) if with_bias else None
    targets = torch.randint(v, (n,))
    g = torch.randn(n)
    head = Head(weight, bias, torch.float32, softcap, scale)
    logp, entropy = token_logprobs(hidden, head, targets, temperature, chunk_elements=chunk)
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    ours = torch.autograd.grad((logp * g).sum(), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want, want_entropy = direct(
        exact[0], exact[1], exact[2] if with_bias else None, targets, temperature, softcap, scale
    )
    theirs = torch.autograd.grad((want * g.double()).sum(), exact)
    assert torch.allclose(logp.double(), want, atol=1e-5)
    assert torch.allclose(entropy.double(), want_entropy, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.double(), b, atol=2e-5)


def test_results_are_fp32_for_16_bit_operands():
    hidden, weight = torch.randn(5, 8).half(), torch.randn(11, 8).half()
    for dtype in (torch.float16, torch.float32):
        logp, _ = token_logprobs(hidden, Head(weight, None, dtype), torch.zeros(5, dtype=torch.int64))
        assert logp.dtype == torch.float32
    # an FP32 head keeps what a 16-bit product would round away
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[:, 0]
    assert (logp.double() - exact).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_batch_logprobs_picks_the_response_positions(family):
    """Right padding without an attention mask: each row as if it were alone, position by position."""
    module = small_module(family)
    rows = [([5, 6, 7], [8, 9]), ([11], [12, 13, 14, 15]), ([1, 2, 3, 4, 5, 6], [7])]
    tokens = torch.full((3, 7), 257)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    for i, (p, r) in enumerate(rows):
        tokens[i, : len(p) + len(r)] = torch.tensor(p + r)
        mask[i, : len(r)] = True
    head = Head.of(module, torch.float32)
    with torch.no_grad():
        lengths = torch.tensor([len(p) for p, _ in rows])
        logp, entropy = batch_logprobs(module, head, tokens, lengths, mask, temperature=0.7)
        for i, (p, r) in enumerate(rows):
            alone = (module(torch.tensor([p + r])).logits[0] / 0.7).log_softmax(-1)
            for t, token in enumerate(r):
                assert abs(float(logp[i, t]) - float(alone[len(p) - 1 + t, token])) < 1e-5
            assert (logp[i, len(r) :] == 0).all()
    assert entropy.shape == (7,)


MEMORY = """
import resource, sys, torch
from tenbit.models.logprobs import Head, token_logprobs
torch.set_num_threads(2)
n, d, v = int(sys.argv[1]), 16, 150_000
torch.manual_seed(0)
weight = torch.randn(v, d, requires_grad=True)
hidden = torch.randn(n, d, requires_grad=True)
logp, _ = token_logprobs(hidden, Head(weight, None, torch.float32), torch.zeros(n, dtype=torch.int64))
logp.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_stays_flat_with_a_large_vocabulary():
    """4 times the tokens would be 690 MB more of logits alone; the peak may grow by no more than 60 MB."""
    peaks = [
        int(subprocess.run([sys.executable, "-c", MEMORY, str(n)], capture_output=True, text=True, check=True).stdout)
        for n in (384, 1536)
    ]
    assert peaks[1] - peaks[0] < 60, peaks
