"""Norms of the heads or groups of channels apart, and layer norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlmoe.layers.initialization import constant_
from torchlmoe.layers.norms import RMSNorm, rms_norm


class GroupRMSNorm(RMSNorm):
    """RMS norm of each of `num_groups` equal parts of the channels, with a weight per channel (arXiv 2405.21060)."""

    def __init__(self, dim: int, num_groups: int, eps: float = 1e-6):
        super().__init__(dim, eps, across_heads=True)
        self.group_width = dim // num_groups

    def forward(self, x: Tensor) -> Tensor:
        groups = (-1, self.group_width)
        return rms_norm(x.unflatten(-1, groups), self.weight.view(groups), self.eps).flatten(-2)


class LayerNorm(nn.LayerNorm):
    """Layer norm with a weight and a bias per channel (arXiv 1607.06450); across_heads as of `RMSNorm`."""

    def __init__(self, dim: int, eps: float = 1e-6, *, across_heads: bool = False):
        super().__init__(dim, eps)
        self.head_dims = {"weight": 0, "bias": 0} if across_heads else {}

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def init_weights(self) -> None:
        constant_(self.weight, 1.0)
        constant_(self.bias, 0.0)


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
