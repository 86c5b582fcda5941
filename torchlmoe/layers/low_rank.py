"""A low-rank projection into heads, used by the data-dependent gates of linear models."""

from collections.abc import Callable

from torch import Tensor, nn

from torchlmoe.layers.linear import ColumnLinear, Linear


class LowRank(nn.Module):
    """x [..., in] -> up(activation(down(x))), [..., out]. All heads share the low-rank part. bias: of the down
    projection."""

    def __init__(
        self,
        in_features: int,
        rank: int,
        out_features: int,
        activation: Callable[[Tensor], Tensor] | None = None,
        bias: bool = False,
    ):
        super().__init__()
        self.activation = activation
        self.down_proj = Linear(in_features, rank, bias)
        self.up_proj = ColumnLinear(rank, out_features)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down_proj(x)
        return self.up_proj(hidden if self.activation is None else self.activation(hidden))
