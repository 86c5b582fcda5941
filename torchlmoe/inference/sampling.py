"""How the next token is chosen: repetition penalty, temperature, top-k and top-p act on the logits, in this order.

Legend: B rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature: divides the logits; 0 is greedy, the likeliest token.
    top_k: only the k likeliest tokens (and those equal to the k-th); None for all.
    top_p: only the likeliest tokens that together reach the probability p (arXiv 1904.09751).
    repetition_penalty: divides the logit of a token that is already in the row, prompt included, where positive, and
        multiplies it where negative, so that above 1 it always makes it less likely (arXiv 1909.05858).

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
    """logits [B, V] -> probabilities, float64 [B, V], zero where a token may not be chosen.

    seen_BV: bool, the tokens of each row so far, to which the repetition penalty applies.
    Raises FloatingPointError where the logits are not finite.
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
    # Relative to the largest, so that no temperature overflows.
    logits_BV = (logits_BV - logits_BV.amax(1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[1]:
        smallest_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    probability_BV = logits_BV.softmax(1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = probability_BV.sort(1, descending=True)
        # A token stays as long as those before it have not reached p; so the likeliest always does.
        sorted_BV = sorted_BV.masked_fill(sorted_BV.cumsum(1) - sorted_BV >= sampling.top_p, 0.0)
        probability_BV = torch.zeros_like(probability_BV).scatter_(1, order_BV, sorted_BV)
        probability_BV = probability_BV / probability_BV.sum(1, keepdim=True)
    return probability_BV


def draw(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """A token of each row, int64 [B]: the first whose cumulative probability is above a number from [0, 1).

    probability_BV, uniform_B: float64. One number per row, so that a row's token does not depend on the other rows.
    """
    cumulative_BV = probability_BV.cumsum(1)
    cumulative_BV = cumulative_BV / cumulative_BV[:, -1:]  # ends with 1, which no number reaches
    return torch.searchsorted(cumulative_BV, uniform_B[:, None], right=True)[:, 0]
