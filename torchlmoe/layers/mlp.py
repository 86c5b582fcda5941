"""SwiGLU feed-forward layer (arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor, nn

from torchlmoe.layers.initialization import normal_
from torchlmoe.layers.linear import ColumnLinear, RowLinear


class MLP(nn.Module):
    """x [..., dim] -> down(silu(gate x) * up x), [..., dim]."""

    def __init__(self, dim: int, hidden_dim: int, *, init_std: float = 0.02):
        super().__init__()
        self.init_std, self.units = init_std, hidden_dim
        self.gate_proj = ColumnLinear(dim, hidden_dim)
        self.up_proj = ColumnLinear(dim, hidden_dim)
        self.down_proj = RowLinear(hidden_dim, dim)

    def init_weights(self) -> None:
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            normal_(layer.weight, self.init_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token."""
        return 6 * self.gate_proj.weight.numel()
