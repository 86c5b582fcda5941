"""Chooses the next token: repetition penalty, temperature, top-k and top-p act on the logits in this order.

Legend: B rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    temperature: divides the logits; 0 is greedy, the likeliest token.
    top_k: sample from the k likeliest tokens (and those equal to the k-th); None for all.
    top_p: sample from the smallest set of likeliest tokens whose probability reaches p (arXiv 1904.09751).
    repetition_penalty: applies to tokens that are already in the row, prompt included. It divides a positive logit and
        multiplies a negative one, so values above 1 make the token less likely (arXiv 1909.05858).

    Raises ValueError for values out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} must be 0 (greedy) or a positive number.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be at least 1; leave it out to keep all tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must lie above 0 and at most at 1, which keeps all tokens.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty = {self.repetition_penalty} must be a positive number; 1 is no penalty."
            )


def next_token_distribution(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None = None) -> Tensor:
    """logits [B, V] -> probabilities, float64 [B, V]; zero for tokens that sampling excludes.

    seen_BV: bool, the tokens that each row contains so far, to which the repetition penalty applies.
    Raises FloatingPointError if logits are not finite.
    """
    if not logits_BV.isfinite().all():
        raise FloatingPointError(
            "The model's logits are not finite: its weights are damaged or its dtype is too narrow."
        )
    logits_BV = logits_BV.double()
    if seen_BV is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        penalized_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = torch.where(seen_BV, penalized_BV, logits_BV)
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(1, logits_BV.argmax(1, keepdim=True), 1.0)
    # Relative to the largest logit, so that no temperature overflows.
    logits_BV = (logits_BV - logits_BV.amax(1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[1]:
        smallest_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    probability_BV = logits_BV.softmax(1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = probability_BV.sort(1, descending=True)
        # A token stays if the tokens before it have not reached p, so the likeliest token always stays.
        sorted_BV = sorted_BV.masked_fill(sorted_BV.cumsum(1) - sorted_BV >= sampling.top_p, 0.0)
        probability_BV = torch.zeros_like(probability_BV).scatter_(1, order_BV, sorted_BV)
        probability_BV = probability_BV / probability_BV.sum(1, keepdim=True)
    return probability_BV


def draw(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draws a token per row, int64 [B]: the first whose cumulative probability exceeds the row's number.

    probability_BV: float64. uniform_B: float64 in [0, 1), one per row, so that rows do not depend on each other.
    """
    cumulative_BV = probability_BV.cumsum(1)
    cumulative_BV = cumulative_BV / cumulative_BV[:, -1:]  # the last is exactly 1, which exceeds every number
    return torch.searchsorted(cumulative_BV, uniform_B[:, None], right=True)[:, 0]
