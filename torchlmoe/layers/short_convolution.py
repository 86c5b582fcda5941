"""Short causal convolution over tokens, as a module with its own decoding cache."""

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.layers.initialization import uniform_
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.ops.causal_conv import causal_conv
from torchlmoe.styles.halo import ConvHalo


class ShortConvolution(nn.Module):
    """Depthwise, `width` tokens, followed by SiLU or nothing: x [B, T, channels] -> like x. Looks across tokens.

    units: see `ColumnLinear`.
    """

    head_dims = {"weight": 0, "bias": 0}

    def __init__(
        self, channels: int, width: int, bias: bool = False, activation: bool = True, units: int | None = None
    ):
        super().__init__()
        self.activation, self.units = activation, units
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_weights(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        if cache is None:
            return self.convolve(x, cu_seqlens=sequence.cu_seqlens)
        earlier = sequence.restarted(cache["inputs"]).to(x.dtype)
        y = self.convolve(x, state=earlier)
        cache["inputs"].copy_(torch.cat([earlier, x], 1)[:, x.shape[1] :])
        return y

    def convolve(self, x: Tensor, **options: Tensor | None) -> Tensor:
        """options: `cu_seqlens` or `state`, see `ops.causal_conv`."""
        return causal_conv(x, self.weight, self.bias, activation=self.activation, **options)

    def init_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device | None = None) -> TensorDict:
        """The last width - 1 inputs."""
        channels, width = self.weight.shape
        inputs = torch.zeros(batch_size, width - 1, channels, dtype=dtype, device=device)
        return TensorDict({"inputs": inputs}, batch_size=[batch_size])

    def context_parallel_style(self, lsm: str, attention: str) -> ParallelStyle:
        return ConvHalo()
