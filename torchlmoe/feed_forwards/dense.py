"""The dense feed-forward layer: one MLP for every token."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from torchlmoe.feed_forwards.base import FeedForward
from torchlmoe.layers.mlp import MLP, Activation
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.options import InitStd


class Dense(MLP, FeedForward):
    """x [B, T, dim] -> [B, T, dim]: one MLP for every token."""

    def __init__(
        self,
        dim: int,
        *,
        mlp_dim: Annotated[
            int | None, Field(ge=1, description="Hidden width; if unset 8/3 of dim, or 4 times dim without a gate.")
        ] = None,
        activation: Activation = "swiglu",
        init_std: InitStd = 0.02,
    ):
        self.check_choices(activation=activation)
        # A SwiGLU of width 8/3 dim has as many parameters as an MLP without a gate of width 4 dim.
        width = 16 * max(1, round(dim * 8 / 3 / 16)) if activation == "swiglu" else 4 * dim
        super().__init__(dim, mlp_dim or width, activation=activation, init_std=init_std)

    def forward(self, x: Tensor, *, sequence: SequenceLayout) -> Tensor:  # type: ignore[override]
        return super().forward(x)
