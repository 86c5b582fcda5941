"""Polynomial feature maps: inner products of features are polynomials of the inner product q . k."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def pair_products(x: Tensor) -> Tensor:
    """x [..., D] -> [..., D (D + 1) / 2], so that pair_products(x) . pair_products(y) = (x . y)^2.

    Each pair of channels once, times sqrt(2) if they differ: about half of the D^2 of an outer product.
    """
    return _PairProducts.apply(x)


def taylor_features(x: Tensor) -> Tensor:
    """x [..., D] -> [..., 1 + D + D (D + 1) / 2], whose inner product is 1 + x . y + (x . y)^2 / 2, near exp(x . y)."""
    return torch.cat([torch.ones_like(x[..., :1]), x, pair_products(x) * 2**-0.5], -1)


class _PairProducts(torch.autograd.Function):
    """Keeps only x for the backward; autograd would keep two gathers of it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        row, column = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        products = x.index_select(-1, row) * x.index_select(-1, column)
        return products * (1 + (row != column).to(x.dtype) * (2**0.5 - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dim = x.shape[-1]
        row, column = torch.triu_indices(dim, dim, device=x.device)
        place = torch.empty(dim, dim, dtype=torch.long, device=x.device)
        place[row, column] = place[column, row] = torch.arange(len(row), device=x.device)
        # d(x_i x_j) reaches x_i through x_j: a symmetric matrix per token, 2 on the diagonal.
        weight = torch.eye(dim, dtype=x.dtype, device=x.device) * (2 - 2**0.5) + 2**0.5
        matrix = grad.index_select(-1, place.flatten()).unflatten(-1, (dim, dim)) * weight
        return (matrix @ x[..., None])[..., 0]
