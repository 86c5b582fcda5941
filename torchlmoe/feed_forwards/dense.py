"""The dense feed-forward layer: one SwiGLU MLP for every token (arXiv 2002.05202)."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from torchlmoe.feed_forwards.base import FeedForward
from torchlmoe.layers.mlp import MLP
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.options import InitStd


class Dense(MLP, FeedForward):
    def __init__(
        self,
        dim: int,
        *,
        mlp_dim: Annotated[int | None, Field(ge=1, description="Hidden width; 8/3 of dim if unset.")] = None,
        init_std: InitStd = 0.02,
    ):
        # 8/3 keeps the parameters of a SwiGLU those of a plain MLP of width 4.
        super().__init__(dim, mlp_dim or 16 * max(1, round(dim * 8 / 3 / 16)), init_std=init_std)

    def forward(self, x: Tensor, *, sequence: SequenceLayout) -> Tensor:  # type: ignore[override]
        return super().forward(x)
