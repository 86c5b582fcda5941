"""Settings for the widths of heads in mixers around a recurrence."""

from typing import Annotated

from pydantic import Field

NumHeads = Annotated[int, Field(ge=1, description="Heads.")]
HeadDim = Annotated[
    int | None,
    Field(ge=1, description="Width of a head, before expand_k and expand_v; dim / num_heads if unset."),
]
ExpandK = Annotated[
    float,
    Field(ge=0.01, le=100, description="Width of all keys, as a multiple of dim or of all heads' width."),
]
ExpandV = Annotated[
    float,
    Field(ge=0.01, le=100, description="Width of all values, as a multiple of dim or of all heads' width."),
]


def width_of_heads(dim: int, num_heads: int, head_dim: int | None) -> int:
    """Width of all heads together."""
    return dim if head_dim is None else num_heads * head_dim
