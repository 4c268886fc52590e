"""Drawing tokens: against transformers' own truncation, exact softmax, and chi-square."""

import math

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tenbit.engines import sampling as sampler
from tenbit.types import Sampling

SETTINGS = [
    Sampling(1),
    Sampling(1, temperature=0.6),
    Sampling(1, top_p=0.7),
    Sampling(1, top_k=5),
    Sampling(1, temperature=1.7, top_k=40, top_p=0.9),
    Sampling(1, temperature=0.6, top_p=0.95),
    Sampling(1, top_p=1e-6),
    Sampling(1, top_k=10_000, top_p=0.999),
]


def reference(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution by transformers' warpers, in float64."""
    scores, ids = logits.double(), torch.empty(len(logits), 0, dtype=torch.int64)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1.0:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.log_softmax(-1)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("vocabulary", [7, 3000])
def test_pitfalls_9_and_10_log_mu_is_of_the_truncated_and_renormalised_distribution(sampling, vocabulary):
    torch.manual_seed(0)
    logits = torch.randn(4, vocabulary) * 3
    expected = reference(logits, sampling)
    for row in range(4):
        tokens = torch.arange(vocabulary)
        got = sampler.log_mu(logits[row].expand(vocabulary, -1), tokens, sampling).double()
        assert torch.equal(got.isinf(), expected[row].isinf())
        inside = expected[row].isfinite()
        assert torch.allclose(got[inside], expected[row][inside], atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_frequencies_follow_the_distribution(sampling):
    """Chi-square over 40,000 draws; the limit is 5 standard deviations above its mean."""
    torch.manual_seed(1)
    logits = torch.randn(1, 12) * 1.5
    probability = reference(logits, sampling).exp()[0]
    n = 40_000
    tokens, logp = sampler.draw(logits.expand(n, -1), sampler.uniforms(7, n), sampling)
    counts = torch.bincount(tokens, minlength=12).double()
    inside = probability > 0
    assert counts[~inside].sum() == 0
    chi = ((counts - n * probability)[inside] ** 2 / (n * probability[inside])).sum()
    freedom = int(inside.sum()) - 1
    assert chi <= freedom + 5 * math.sqrt(2 * freedom) + 1e-6
    assert torch.allclose(logp.double(), probability[tokens].log(), atol=1e-5)


def test_inverse_cdf_takes_the_first_token_that_exceeds_u():
    logits = torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3]).log().expand(8, -1).clamp_min(-1e4)
    u = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.6999, 0.7001, 1.0 - 2.0**-24])
    tokens, _ = sampler.draw(logits, u, Sampling(1))
    assert tokens.tolist() == [0, 0, 1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("u", [0.0, 0.5, 1.0 - 2.0**-24, 1.0])
@pytest.mark.parametrize("place", [0, 1, 499, 998, 999])
def test_a_token_of_probability_zero_is_never_drawn(u, place):
    """All but one token underflow in FP32, wherever it stands and whatever the random number."""
    logits = torch.full((1, 1000), -300.0)
    logits[0, place] = 0.0
    tokens, logp = sampler.draw(logits, torch.tensor([u]), Sampling(1))
    assert tokens.tolist() == [place]
    assert logp.item() == 0.0


def test_greedy_is_a_point_mass():
    logits = torch.tensor([[0.0, 3.0, 2.0]])
    tokens, logp = sampler.draw(logits, torch.tensor([0.99]), Sampling(1, temperature=0.0))
    assert (tokens.item(), logp.item()) == (1, 0.0)
    given = sampler.log_mu(logits.expand(2, -1), torch.tensor([1, 2]), Sampling(1, temperature=0.0))
    assert given.tolist() == [0.0, -math.inf]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_pitfall_13_logits_that_are_not_finite_give_nan_for_that_row_only(bad):
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    for sampling in (Sampling(1), Sampling(1, temperature=0.0), Sampling(1, top_p=0.5, top_k=3)):
        tokens, logp = sampler.draw(logits, torch.full((3,), 0.3), sampling)
        assert logp.isnan().tolist() == [False, True, False]
        assert ((tokens >= 0) & (tokens < 5)).all()


def test_uniforms_are_a_function_of_the_seed():
    assert torch.equal(sampler.uniforms(3, 5), sampler.uniforms(3, 5))
    assert not torch.equal(sampler.uniforms(3, 5), sampler.uniforms(4, 5))
    assert torch.equal(sampler.uniforms(3, 100)[:5], sampler.uniforms(3, 5))


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(0), "max_tokens"),
        (Sampling(1, temperature=-1.0), "temperature"),
        (Sampling(1, temperature=math.nan), "temperature"),
        (Sampling(1, top_p=0.0), "top_p"),
        (Sampling(1, top_p=1.5), "top_p"),
        (Sampling(1, top_k=-1), "top_k"),
    ],
)
def test_settings_that_describe_no_distribution_are_refused(sampling, words):
    with pytest.raises(ValueError, match=words):
        sampler.check(sampling)
