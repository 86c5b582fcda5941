"""RMS and L2 norms, computed in at least float32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchlmoe.layers.initialization import constant_


class _ScaleToUnit(torch.autograd.Function):
    """x / sqrt(factor * sum(x^2) + eps) * weight over the last dim: the one thing that RMS and L2 norms are.

    Keeps x itself, in its own dtype, and one number a row.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, factor: float, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        inverse = norm.square_().mul_(factor).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.factor = factor
        y = x * inverse
        return (y if weight is None else y.mul_(weight)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = x * inverse
        product = unit * grad
        if weight is None:
            grad_weight, along = None, product.sum(-1, keepdim=True)
        else:
            grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
            along = (product @ weight.to(product.dtype))[..., None]
            grad = grad.to(product.dtype) * weight
        grad_x = unit.mul_(along.mul_(-ctx.factor)).add_(grad).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None, None


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dim, in x's dtype."""
    return _ScaleToUnit.apply(x, None, 1.0, eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in x's dtype."""
    return _ScaleToUnit.apply(x, weight, 1.0 / x.shape[-1], eps)


class RMSNorm(nn.Module):
    """RMS norm with a weight per channel (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def init_weights(self) -> None:
        constant_(self.weight, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """RMS norm of each head, times SiLU of a gate: x, gate [..., dim] -> [..., dim]."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * F.silu(gate)
