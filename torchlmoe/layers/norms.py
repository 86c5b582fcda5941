"""RMS and L2 norms, computed in at least float32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlmoe.layers.initialization import constant_


class _ScaleToUnit(torch.autograd.Function):
    """y = x / sqrt(factor * sum(x^2) + eps) over the last dim: the one thing that RMS and L2 norms are."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(factor).add_(eps).rsqrt_()
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        y, inverse = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True).mul_(-ctx.factor)
        return torch.addcmul(grad, y, along).mul_(inverse), None, None


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dim, in x's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return _ScaleToUnit.apply(x.to(dtype), 1.0, eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in x's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = _ScaleToUnit.apply(x.to(dtype), 1.0 / x.shape[-1], eps)
    return (y if weight is None else y * weight.to(dtype)).to(x.dtype)


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
