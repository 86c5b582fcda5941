"""One block of the decoder: x + mixer(norm(x)), then x + feed_forward(norm(x))."""

from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.norms import RMSNorm
from torchlmoe.layers.sequence import Sequence
from torchlmoe.mixers import Mixer
from torchlmoe.moe import MoE


class Block(nn.Module):
    """x [B, T, dim] -> like x, and with `shared` a pair of both (see `Mixer.shared_width`).

    feed_forward: a mixture of experts or a dense MLP.
    """

    def __init__(self, dim: int, mixer: Mixer, feed_forward: nn.Module, norm_eps: float):
        super().__init__()
        self.mixer_norm = RMSNorm(dim, norm_eps)
        self.mixer = mixer
        self.feed_forward_norm = RMSNorm(dim, norm_eps)
        self.feed_forward = feed_forward

    def forward(
        self, x: Tensor, *, sequence: Sequence, cache: TensorDict | None = None, shared: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        mixed = self.mixer_norm(x)
        if shared is not None and self.mixer.shared_width:
            mixed, shared = self.mixer(mixed, sequence=sequence, cache=cache, shared=shared)
        else:
            mixed = self.mixer(mixed, sequence=sequence, cache=cache)
        x = x + mixed
        normed = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, MoE):
            x = x + self.feed_forward(normed, sequence=sequence)
        else:
            x = x + self.feed_forward(normed)
        return x if shared is None else (x, shared)

    def init_weights(self) -> None:
        for module in (self.mixer_norm, self.mixer, self.feed_forward_norm, self.feed_forward):
            module.init_weights()  # type: ignore[operator]

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of one token."""
        return self.mixer.flops_per_token(seq_len) + self.feed_forward.flops_per_token()  # type: ignore[operator]
