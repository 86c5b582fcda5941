"""What a model is made of, resolved from settings once: the decoder reads nothing else."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torchlmoe.feed_forwards.base import FeedForward
from torchlmoe.layers.cross_entropy import linear_cross_entropy
from torchlmoe.layers.norms import RMSNorm
from torchlmoe.mixers.base import Mixer


@dataclass(frozen=True)
class BlockSpec:
    """One block. letter: of the pattern, by which messages name it. feed_forward: None for a block without one."""

    letter: str
    mixer: type[Mixer]
    mixer_options: dict[str, Any] = field(default_factory=dict)
    feed_forward: type[FeedForward] | None = None
    feed_forward_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSpec:
    """The model around its blocks.

    zero_centered_norm: whether the norms of blocks and head hold offsets from one. loss: what training minimises, see
    `torchlmoe.layers.losses`.
    """

    vocab_size: int
    dim: int
    blocks: tuple[BlockSpec, ...]
    norm_eps: float = 1e-6
    zero_centered_norm: bool = False
    init_std: float = 0.02
    tie_embeddings: bool = False
    loss_chunk_size: int = 512
    loss: Callable[..., Tensor] = linear_cross_entropy

    def norm(self) -> RMSNorm:
        """A new norm of the residual stream."""
        return RMSNorm(self.dim, self.norm_eps, zero_centered=self.zero_centered_norm)
