"""The specification of a model, resolved from settings once: the decoder reads nothing else."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field
from torch import Tensor

from torchlmoe.feed_forwards.base import FeedForward
from torchlmoe.layers.cross_entropy import linear_cross_entropy
from torchlmoe.layers.group_norms import LayerNorm
from torchlmoe.layers.norms import RMSNorm
from torchlmoe.mixers.base import Mixer


@dataclass(frozen=True)
class Residual:
    """How a block's branches f, its mixer and its feed-forward layer, read the residual stream x and join it.

    With stream weight s and branch weight b, by the place of the norm:

        pre      s x + b f(norm(x))
        post     s x + b norm(f(x))           the attention layers of OLMo-hybrid
        stream   s norm(x) + b f(norm(x))     MiniMax

    Granite's residual multiplier is the weight of both branches. With `mlp_token_shift` the input of the feed-forward
    layer is mixed with that of the preceding token of the document, channel by channel, by a learned weight.
    """

    norm_placement: Annotated[
        Literal["pre", "post", "stream"],
        Field(description="Norm of a branch's input, of its output (OLMo-hybrid), or of the stream (MiniMax)."),
    ] = "pre"
    mixer_stream_weight: Annotated[
        float, Field(ge=1e-6, le=1e6, description="Weight of the stream that the mixer joins.")
    ] = 1.0
    mixer_branch_weight: Annotated[float, Field(ge=1e-6, le=1e6, description="Weight of the mixer's output.")] = 1.0
    mlp_stream_weight: Annotated[
        float, Field(ge=1e-6, le=1e6, description="Weight of the stream that the MLP joins.")
    ] = 1.0
    mlp_branch_weight: Annotated[float, Field(ge=1e-6, le=1e6, description="Weight of the MLP's output.")] = 1.0
    mlp_token_shift: Annotated[
        bool, Field(description="Mix the MLP's input with that of the preceding token (RWKV's channel mix).")
    ] = False

    @classmethod
    def settings(cls) -> dict[str, tuple[Any, Any]]:
        """name -> (type with limits, default), see `Configurable.settings`."""
        hints = get_type_hints(cls, include_extras=True)
        return {name: (hints[name], default) for name, default in asdict(cls()).items()}


@dataclass(frozen=True)
class BlockSpec:
    """One block. letter: its letter in the pattern, for messages. mixer, feed_forward: None for a block without it."""

    letter: str
    mixer: type[Mixer] | None
    mixer_options: dict[str, Any] = field(default_factory=dict)
    feed_forward: type[FeedForward] | None = None
    feed_forward_options: dict[str, Any] = field(default_factory=dict)
    residual: Residual = Residual()


@dataclass(frozen=True)
class ModelSpec:
    """The model around its blocks.

    norm_kind: of the norms of embedding, blocks and head. norm_bias: whether layer norms there have a bias.
    zero_centered_norm: whether RMS norms there hold offsets from one. embedding_norm: whether the embeddings pass a
    norm. embedding_multiplier: of the embeddings. logit_divisor: of the logits. loss: the training loss, see
    `torchlmoe.layers.losses`.
    """

    vocab_size: int
    dim: int
    blocks: tuple[BlockSpec, ...]
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_bias: bool = True
    norm_eps: float = 1e-6
    zero_centered_norm: bool = False
    init_std: float = 0.02
    tie_embeddings: bool = False
    embedding_norm: bool = False
    embedding_multiplier: float = 1.0
    logit_divisor: float = 1.0
    loss_chunk_size: int = 512
    loss: Callable[..., Tensor] = linear_cross_entropy

    def norm(self) -> RMSNorm | LayerNorm:
        """A new norm of the residual stream."""
        if self.norm_kind == "layer":
            return LayerNorm(self.dim, self.norm_eps, bias=self.norm_bias)
        return RMSNorm(self.dim, self.norm_eps, zero_centered=self.zero_centered_norm)
