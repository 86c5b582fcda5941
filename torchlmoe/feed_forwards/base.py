"""Defines the interface of feed-forward layers."""

from typing import get_args

from torch import Tensor, nn

from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.options import Configurable


class FeedForward(Configurable, nn.Module):
    """Base class: x [B, T, dim] -> [B, T, dim], token by token.

    The constructor takes dim and keyword arguments, which are the layer's settings. Annotate each with its type and,
    through `pydantic.Field`, its range and meaning.
    """

    def forward(self, x: Tensor, *, sequence: SequenceLayout) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define forward(x, *, sequence).")

    def init_weights(self) -> None:
        """Initialize the parameters."""
        raise TypeError(f"{type(self).__name__} must define init_weights().")

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token; a multiply-add counts as two."""
        raise TypeError(f"{type(self).__name__} must define flops_per_token().")

    def idle_parameters(self) -> int:
        """Number of parameters that a token does not use."""
        return 0

    @classmethod
    def check_choices(cls, **values: str) -> None:
        """Raises ValueError for a value that its setting, a Literal, does not list."""
        for name, value in values.items():
            choices = get_args(cls.settings()[name][0].__origin__)
            if value not in choices:
                raise ValueError(f"{name} = {value!r} is unknown: choose from {', '.join(choices)}.")
