"""Feed-forward layers of one hidden layer: SwiGLU (arXiv 2002.05202), or without a gate squared ReLU (2109.08668)."""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from torchlmoe.layers.initialization import normal_
from torchlmoe.layers.linear import ColumnLinear, RowLinear

Activation = Annotated[
    Literal["swiglu", "relu2"],
    Field(description="Hidden layer: silu of a gate times up, or, without a gate, relu(up) squared (Nemotron-H)."),
]


class MLP(nn.Module):
    """x [..., dim] -> down(silu(gate x) * up x), or with activation "relu2" down(relu(up x)^2), [..., dim]."""

    def __init__(self, dim: int, hidden_dim: int, *, activation: Activation = "swiglu", init_std: float = 0.02):
        super().__init__()
        self.init_std, self.units = init_std, hidden_dim
        self.gate_proj = ColumnLinear(dim, hidden_dim) if activation == "swiglu" else None
        self.up_proj = ColumnLinear(dim, hidden_dim)
        self.down_proj = RowLinear(hidden_dim, dim)

    def init_weights(self) -> None:
        for layer in self.children():
            normal_(layer.weight, self.init_std)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(F.relu(self.up_proj(x)).square())
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token."""
        return sum(2 * layer.weight.numel() for layer in self.children())  # type: ignore[operator,union-attr,misc]
