"""The distribution of the next token against the logits processors of transformers; edges; refusals."""

import pytest
import torch
from transformers.generation import logits_process as theirs

from torchlmoe.inference.sampling import Sampling, draw, next_token_distribution


def logits():
    return torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, 40, 1000])
@pytest.mark.parametrize("top_p", [0.01, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("repetition_penalty", [0.7, 1.0, 1.3])
def test_equals_transformers(temperature, top_k, top_p, repetition_penalty):
    tokens = torch.tensor([[0, 1, 2, 3], [5, 5, 5, 5], [39, 38, 37, 0]])
    expected = theirs.RepetitionPenaltyLogitsProcessor(repetition_penalty)(tokens, logits())
    expected = theirs.TemperatureLogitsWarper(temperature)(tokens, expected)
    expected = theirs.TopKLogitsWarper(top_k or 40)(tokens, expected)
    expected = theirs.TopPLogitsWarper(top_p)(tokens, expected).softmax(-1)
    seen = torch.zeros(3, 40, dtype=torch.bool).scatter(1, tokens, True)
    found = next_token_distribution(logits(), Sampling(temperature, top_k, top_p, repetition_penalty), seen)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_greedy_is_certain():
    found = next_token_distribution(logits(), Sampling(temperature=0))
    assert torch.equal(found.argmax(1), logits().argmax(1))
    assert torch.equal(found.sum(1), torch.ones(3, dtype=torch.float64))
    assert found.count_nonzero() == 3


def test_extremes_stay_finite():
    for temperature in (1e-300, 1e300):
        found = next_token_distribution(logits().float() * 1e30, Sampling(temperature))
        torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64))


def test_logits_that_are_not_finite_are_refused():
    bad = logits()
    bad[1, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        next_token_distribution(bad, Sampling(temperature=0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1 must be 0"),
        ({"temperature": float("nan")}, "temperature = nan must be 0"),
        ({"top_k": 0}, "top_k = 0 must be at least 1"),
        ({"top_p": 0.0}, "top_p = 0.0 must lie above 0"),
        ({"top_p": 1.1}, "top_p = 1.1 must lie above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0 must be a positive number"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_draws_follow_the_distribution():
    """Every token with the share of numbers that its probability is; never one of probability zero."""
    probability = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    numbers = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = draw(probability.expand(1000, -1), numbers)
    assert torch.bincount(drawn, minlength=6).tolist() == [0, 250, 0, 500, 250, 0]
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for scale in (1.0, 1 + 2**-50):  # a sum that rounding has moved
        assert draw(probability.expand(2, -1) * scale, edges).tolist() == [1, 4]
