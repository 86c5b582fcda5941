"""Token shift as a module with a decoding cache, and mixtures of a token with its predecessor (arXiv 2305.13048)."""

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.layers.initialization import copy_
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.styles.halo import TokenShiftHalo


class TokenMix(nn.Module):
    """x + (previous - x) * weight, weight from 0 to 1 per channel: [B, T, channels] -> like x.

    power, less: the weight of channel i is initialized to 1 - (i / channels)^power - less.
    """

    head_dims: dict[str, int] = {}  # of the residual stream's channels

    def __init__(self, channels: int, power: float, less: float = 0.0):
        super().__init__()
        self.power, self.less = power, less
        self.weight = nn.Parameter(torch.empty(channels))

    def init_weights(self) -> None:
        channels = len(self.weight)
        copy_(self.weight, 1 - (torch.arange(channels, dtype=torch.float32) / channels) ** self.power - self.less)

    def forward(self, x: Tensor, difference: Tensor, more_weight: Tensor | None = None) -> Tensor:
        """difference: previous - x. more_weight: added to the weight, per token, like x."""
        return torch.addcmul(x, difference, self.weight if more_weight is None else self.weight + more_weight)


class TokenShift(nn.Module):
    """x [B, T, channels] -> like x: each token's predecessor, zero for a document's first. Looks across tokens."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        if cache is None:
            shifted = F.pad(x, (0, 0, 1, 0))[:, :-1]
        else:
            shifted = torch.cat([cache["input"].to(x.dtype), x[:, :-1]], 1)
            cache["input"].copy_(x[:, -1:])
        return shifted.masked_fill(sequence.positions[..., None] == 0, 0)

    def init_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device | None = None) -> TensorDict:
        """The last input."""
        last = torch.zeros(batch_size, 1, self.channels, dtype=dtype, device=device)
        return TensorDict({"input": last}, batch_size=[batch_size])

    def context_parallel_style(self, lsm: str, attention: str) -> ParallelStyle:
        return TokenShiftHalo()


class ShiftedMix(nn.Module):
    """x [B, T, channels] -> like x: each token mixed with its predecessor, as by `TokenMix`. Looks across tokens."""

    def __init__(self, channels: int, power: float):
        super().__init__()
        self.token_shift, self.mix = TokenShift(channels), TokenMix(channels, power)

    def init_weights(self) -> None:
        self.mix.init_weights()

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        return self.mix(x, self.token_shift(x, sequence=sequence, cache=cache) - x)

    def init_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device | None = None) -> TensorDict:
        """See `TokenShift.init_cache`."""
        return self.token_shift.init_cache(batch_size, dtype, device)
