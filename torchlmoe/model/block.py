"""One block of the decoder: x + mixer(norm(x)), then x + feed_forward(norm(x))."""

from typing import Any

from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.feed_forwards.base import FeedForward
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.base import Mixer
from torchlmoe.model.spec import ModelSpec


class Block(nn.Module):
    """x [B, T, dim] -> like x, and with `shared` a pair of both (see `Mixer.shared_width`).

    feed_forward: None for a block that is a mixer alone. common: what its letter's layers have in common, for the
        mixer.
    """

    def __init__(self, spec: ModelSpec, mixer: Mixer, feed_forward: FeedForward | None):
        super().__init__()
        self.mixer_norm = spec.norm()
        self.mixer = mixer
        self.feed_forward_norm = None if feed_forward is None else spec.norm()
        self.feed_forward = feed_forward

    def forward(
        self,
        x: Tensor,
        *,
        sequence: SequenceLayout,
        cache: TensorDict | None = None,
        shared: Tensor | None = None,
        common: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        handed: dict[str, Any] = {} if common is None else {"common": common}
        mixed = self.mixer_norm(x)
        if shared is not None and self.mixer.shared_width:
            mixed, shared = self.mixer(mixed, sequence=sequence, cache=cache, shared=shared, **handed)
        else:
            mixed = self.mixer(mixed, sequence=sequence, cache=cache, **handed)
        x = x + mixed
        if self.feed_forward_norm is not None and self.feed_forward is not None:
            x = x + self.feed_forward(self.feed_forward_norm(x), sequence=sequence)
        return x if shared is None else (x, shared)

    def init_weights(self) -> None:
        for module in self.children():
            module.init_weights()  # type: ignore[operator]

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of one token."""
        feed_forward = 0 if self.feed_forward is None else self.feed_forward.flops_per_token()
        return self.mixer.flops_per_token(seq_len) + feed_forward
