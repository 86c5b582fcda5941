"""Short causal convolution over tokens, as a module with its own decoding cache."""

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.initialization import uniform_
from torchlmoe.layers.sequence import Sequence
from torchlmoe.ops.causal_conv import causal_conv


class ShortConvolution(nn.Module):
    """Depthwise, `width` tokens, followed by SiLU: x [B, T, channels] -> like x. Looks across tokens."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))

    def init_weights(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, *, sequence: Sequence, cache: TensorDict | None = None) -> Tensor:
        if cache is None:
            return causal_conv(x, self.weight, cu_seqlens=sequence.cu_seqlens)
        width = self.weight.shape[1]
        extended = torch.cat([cache["inputs"].to(x.dtype), x], 1)
        cache["inputs"].copy_(extended[:, extended.shape[1] - (width - 1) :])
        return causal_conv(extended, self.weight)[:, width - 1 :]

    def init_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device | None = None) -> TensorDict:
        """The last width - 1 inputs."""
        channels, width = self.weight.shape
        inputs = torch.zeros(batch_size, width - 1, channels, dtype=dtype, device=device)
        return TensorDict({"inputs": inputs}, batch_size=[batch_size])
