"""A linear recurrence whose outputs are divided by the sum of their attention weights."""

import torch
from torch import Tensor, nn

from torchlmoe.layers.recurrence import recur


def recur_normalized(
    recurrence: nn.Module, q: Tensor, k: Tensor, v: Tensor, *, normalizer_eps: float, **others
) -> Tensor:
    """Run `recur` and divide by the sum of the attention weights, which a column of ones on v reads.

    No weight is negative, but an inner product of features may round to a number below zero.
    """
    o = recur(recurrence, q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1), **others)
    return o[..., :-1] / (o[..., -1:].clamp(min=0) + normalizer_eps)
