"""Norms over each head, each group of channels or all heads, and layer norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.layers.initialization import constant_
from torchlmoe.layers.norms import RMSNorm, Total, rms_norm
from torchlmoe.styles.heads import NormOverHeads


class GroupRMSNorm(RMSNorm):
    """RMS norm of each of `num_groups` equal parts of the channels, with a weight per channel (arXiv 2405.21060)."""

    def __init__(self, dim: int, num_groups: int, eps: float = 1e-6):
        super().__init__(dim, eps, across_heads=True)
        self.num_groups, self.width = num_groups, dim // num_groups

    def forward(self, x: Tensor) -> Tensor:
        if self.total is not None:
            return self._norm_of_parts(x)
        groups = (-1, self.width)
        return rms_norm(x.unflatten(-1, groups), self.weight.view(groups), self.eps).flatten(-2)

    def tensor_parallel_style(self, degree: int) -> ParallelStyle | None:
        """A rank has whole groups, or a group spans ranks."""
        return NormOverHeads(self.num_groups) if self.num_groups % degree else None


class AllHeadsRMSNorm(RMSNorm):
    """RMS norm over the channels of all heads together; several ranks may hold one head (arXiv 2409.02060)."""

    def __init__(self, num_heads: int, head_dim: int, eps: float = 1e-6, *, zero_centered: bool = False):
        super().__init__(num_heads * head_dim, eps, across_heads=True, zero_centered=zero_centered)
        self.units = num_heads

    def tensor_parallel_style(self, degree: int) -> ParallelStyle:
        return NormOverHeads(num_copies=max(1, degree // self.units))


class LayerNorm(nn.LayerNorm):
    """Layer norm with a weight and, unless `bias` is False, a bias per channel (arXiv 1607.06450).

    across_heads: see `RMSNorm`.
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, across_heads: bool = False, bias: bool = True):
        super().__init__(dim, eps, bias=bias)
        self.width = dim
        self.head_dims = {"weight": 0, "bias": 0} if across_heads else {}
        self.total: Total = None

    def forward(self, x: Tensor) -> Tensor:
        if self.total is not None:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            centered = wide - self.total(wide.sum(-1, keepdim=True)) / self.width
            variance = self.total(centered.square().sum(-1, keepdim=True)) / self.width
            y = centered * (variance + self.eps).rsqrt() * self.weight
            return (y if self.bias is None else y + self.bias).to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def init_weights(self) -> None:
        constant_(self.weight, 1.0)
        if self.bias is not None:
            constant_(self.bias, 0.0)

    def tensor_parallel_style(self, degree: int) -> ParallelStyle | None:
        return NormOverHeads() if self.head_dims else None


class HeadNorm(nn.Module):
    """Layer norm of each head, with a weight and a bias per channel: x [..., heads, V] -> [..., heads * V]."""

    head_dims = {"weight": 0, "bias": 0}

    def __init__(self, num_heads: int, head_dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_heads * head_dim))
        self.bias = nn.Parameter(torch.empty(num_heads * head_dim))

    def init_weights(self) -> None:
        constant_(self.weight, 1.0)
        constant_(self.bias, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * self.weight + self.bias
