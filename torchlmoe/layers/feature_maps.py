"""Polynomial feature maps: inner products of features are polynomials of the inner product q . k."""

import torch
from torch import Tensor

from torchlmoe.ops.pair_products import pair_products


def taylor_features(x: Tensor) -> Tensor:
    """x [..., D] -> [..., 1 + D + D (D + 1) / 2], whose inner product is 1 + x . y + (x . y)^2 / 2, near exp(x . y)."""
    return torch.cat([torch.ones_like(x[..., :1]), x, pair_products(x) * 2**-0.5], -1)
