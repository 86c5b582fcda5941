"""RMS and L2 norms, computed in at least float32; on a GPU by kernels/gated_rms_norm.py."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.layers.initialization import constant_
from torchlmoe.ops.kernel_backend import kernels_serve
from torchlmoe.ops.operation import operation
from torchlmoe.ops.row_sum import row_sum
from torchlmoe.styles.heads import NormOverHeads

Total = Callable[[Tensor], Tensor] | None  # sums over the ranks that have the other channels, if there are any
_GATES: dict[Callable, str] = {F.silu: "silu", torch.sigmoid: "sigmoid"}  # their names in the kernel


class _ScaleToUnit(torch.autograd.Function):
    """x / sqrt(factor * sum(x^2) + eps) * weight over the last dim, of which RMS and L2 norms are special cases.

    The weight has the shape of x's last dim, or last two. Keeps x in its dtype and one number per row.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, factor: float, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().mul_(factor).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.factor = factor
        y = wide * inverse
        return (y if weight is None else y.mul_(weight)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit, grad = x.to(inverse.dtype) * inverse, grad.to(inverse.dtype)
        product = unit * grad
        grad_weight = None
        if weight is not None:
            grad_weight = row_sum(product.reshape(-1, *weight.shape)).to(weight.dtype)
            product, grad = product.mul_(weight), grad * weight
        grad_x = torch.addcmul(grad, unit, product.sum(-1, keepdim=True).mul_(-ctx.factor)).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None, None


@operation
def scale_to_unit(
    x: Tensor, weight: Tensor | None, factor: float, eps: float, gate: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """A gate is only supported if kernels are available."""
    if kernels_serve("auto", x):
        from torchlmoe.kernels import gated_rms_norm as kernels

        return kernels.gated_rms_norm(x, weight, gate, factor, eps, activation)
    return _ScaleToUnit.apply(x, weight, factor, eps)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dim, in x's dtype."""
    return scale_to_unit(x, None, 1.0, eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in x's dtype; weight [D], or x [..., G, D] and [G, D]."""
    return scale_to_unit(x, weight, 1.0 / x.shape[-1], eps)


class RMSNorm(nn.Module):
    """RMS norm with a weight per channel (arXiv 1910.07467).

    across_heads: whether the channels are those of all heads, of which a rank may have a part; otherwise heads share
        the weight. zero_centered: the weight holds offsets from one (Gemma, Qwen3-Next), added in at least float32.
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, across_heads: bool = False, zero_centered: bool = False):
        super().__init__()
        self.width, self.eps, self.zero_centered = dim, eps, zero_centered
        self.head_dims = {"weight": 0} if across_heads else {}
        self.total: Total = None
        self.weight = nn.Parameter(torch.empty(dim))

    def init_weights(self) -> None:
        constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    def scale(self) -> Tensor:
        """The factor of each channel."""
        weight = self.weight
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1 if self.zero_centered else weight

    def forward(self, x: Tensor) -> Tensor:
        if self.total is not None:
            return self._norm_of_parts(x)
        return rms_norm(x, self.scale(), self.eps)

    def _norm_of_parts(self, x: Tensor) -> Tensor:
        """Norm of x if it holds a part of the channels; `total` sums over the ranks that have the others."""
        assert self.total is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = self.total(wide.square().sum(-1, keepdim=True)) / self.width
        return (wide * (mean + self.eps).rsqrt() * self.scale()).to(x.dtype)

    def tensor_parallel_style(self, degree: int) -> ParallelStyle | None:
        return NormOverHeads() if self.head_dims else None


class GatedRMSNorm(RMSNorm):
    """RMS norm times SiLU, or another function, of a gate: x, gate [..., dim] -> [..., dim]; options of `RMSNorm`."""

    def __init__(self, dim: int, eps: float = 1e-6, activation: Callable[[Tensor], Tensor] = F.silu, **options: bool):
        super().__init__(dim, eps, **options)
        self.activation = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        if self.total is None and self.activation in _GATES and kernels_serve("auto", x):
            return scale_to_unit(x, self.scale(), 1.0 / x.shape[-1], self.eps, gate, _GATES[self.activation])
        return super().forward(x) * self.activation(gate)
