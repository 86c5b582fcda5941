"""A block of the decoder: a mixer, then a feed-forward layer, or only one of the two, with a norm for each."""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.feed_forwards.base import FeedForward
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.layers.token_shift import ShiftedMix
from torchlmoe.mixers.base import Mixer, Place
from torchlmoe.model.spec import ModelSpec, Residual


class Block(nn.Module):
    """x [B, T, dim] -> like x, and with `shared` a pair of both (see `Mixer.shared_width`).

    mixer, feed_forward: None for a block without it. residual: how their outputs join the stream. common: the entry of
    the module that the letter's layers share, for the mixer. place: of the block in the model. Raises ValueError for a
    block with neither.
    """

    def __init__(
        self,
        spec: ModelSpec,
        mixer: Mixer | None,
        feed_forward: FeedForward | None,
        residual: Residual | None = None,
        place: Place = Place(),  # noqa: B008
    ):
        super().__init__()
        if mixer is None and feed_forward is None:
            raise ValueError("A block needs a mixer, a feed-forward layer or both; it has neither.")
        self.residual = residual or Residual()
        self.mixer_norm = None if mixer is None else spec.norm()
        self.mixer = mixer
        self.feed_forward_norm = None if feed_forward is None else spec.norm()
        self.feed_forward_shift = None
        if self.residual.mlp_token_shift:
            late = 1 - place.index / place.num_layers  # from 1 in the first block to almost 0
            self.feed_forward_shift = ShiftedMix(spec.dim, late**4)  # as in RWKV-7 (arXiv 2503.14456)
        self.feed_forward = feed_forward

    @property
    def shared_width(self) -> int:
        """See `Mixer.shared_width`."""
        return 0 if self.mixer is None else self.mixer.shared_width

    def forward(
        self,
        x: Tensor,
        *,
        sequence: SequenceLayout,
        cache: TensorDict | None = None,
        shared: Tensor | None = None,
        common: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        residual = self.residual
        of_shift = None
        if cache is not None and self.feed_forward_shift is not None:
            cache, of_shift = cache.get("mixer", None), cache["feed_forward_shift"]
        if self.mixer is not None and self.mixer_norm is not None:
            x, given = self._enter(x, self.mixer_norm)
            handed: dict[str, Any] = {} if common is None else {"common": common}
            if shared is not None and self.mixer.shared_width:
                branch, shared = self.mixer(given, sequence=sequence, cache=cache, shared=shared, **handed)
            else:
                branch = self.mixer(given, sequence=sequence, cache=cache, **handed)
            weights = residual.mixer_stream_weight, residual.mixer_branch_weight
            x = self._join(x, branch, self.mixer_norm, *weights)
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            x, given = self._enter(x, self.feed_forward_norm)
            if self.feed_forward_shift is not None:
                given = self.feed_forward_shift(given, sequence=sequence, cache=of_shift)
            branch = self.feed_forward(given, sequence=sequence)
            weights = residual.mlp_stream_weight, residual.mlp_branch_weight
            x = self._join(x, branch, self.feed_forward_norm, *weights)
        return x if shared is None else (x, shared)

    def _enter(self, x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the stream and the input of the branch."""
        if self.residual.norm_placement == "post":
            return x, x
        normed = norm(x)
        return (normed if self.residual.norm_placement == "stream" else x), normed

    def _join(self, x: Tensor, branch: Tensor, norm: nn.Module, stream_weight: float, branch_weight: float) -> Tensor:
        if self.residual.norm_placement == "post":
            branch = norm(branch)
        # Multiplying by one would cost a pass over the tensor.
        return (x if stream_weight == 1 else x * stream_weight) + (
            branch if branch_weight == 1 else branch * branch_weight
        )

    def init_weights(self) -> None:
        for module in self.children():
            module.init_weights()  # type: ignore[operator]

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict | None:
        """Decoding state: the mixer's or, with a token shift, `feed_forward_shift` and, if there is a mixer, `mixer`.

        Arguments: see `Mixer.init_cache`. None for a block that looks at one token alone.
        """
        of_mixer = None if self.mixer is None else self.mixer.init_cache(batch_size, max_length, dtype, device)
        if self.feed_forward_shift is None:
            return of_mixer
        caches = {"feed_forward_shift": self.feed_forward_shift.init_cache(batch_size, dtype, device)}
        if of_mixer is not None:
            caches["mixer"] = of_mixer
        return TensorDict(caches, batch_size=[batch_size])

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of one token."""
        mixer = 0 if self.mixer is None else self.mixer.flops_per_token(seq_len)
        return mixer + (0 if self.feed_forward is None else self.feed_forward.flops_per_token())
