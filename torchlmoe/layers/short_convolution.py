"""Short causal convolution over tokens, as a module with its own decoding cache."""

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.layers.initialization import uniform_
from torchlmoe.layers.sequence import Sequence
from torchlmoe.ops.causal_conv import causal_conv
from torchlmoe.parallel.halo import ConvHalo


class ShortConvolution(nn.Module):
    """Depthwise, `width` tokens, followed by SiLU or nothing: x [B, T, channels] -> like x. Looks across tokens.

    Where memories have projections of their own, x is packed and each memory of a document is a run of its own.
    """

    def __init__(self, channels: int, width: int, bias: bool = False, activation: bool = True):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_weights(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, *, sequence: Sequence, cache: TensorDict | None = None) -> Tensor:
        memories = sequence.packed_memories
        if cache is None:
            return self._convolve(x, cu_seqlens=sequence.cu_seqlens if memories is None else memories.cu_seqlens)
        earlier = cache["inputs"]
        if memories is not None:
            y, last = self.continue_runs(x, memories.cu_seqlens, earlier.to(x.dtype).flatten(0, 1))
            earlier.copy_(last.view_as(earlier))
            return y
        y = self._convolve(x, state=earlier)
        earlier.copy_(torch.cat([earlier.to(x.dtype), x], 1)[:, x.shape[1] :])
        return y

    def continue_runs(self, x: Tensor, bounds: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
        """x [1, M, channels], bounds int32 [runs + 1], and what each run's convolution has seen last.

        earlier: [runs, width - 1, channels]. Returns y like x, and what it has seen last now.
        """
        reach, num_runs = self.weight.shape[1] - 1, len(bounds) - 1
        token_M = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        place_M = token_M + reach * (1 + torch.searchsorted(bounds[1:].contiguous(), token_M, right=True))
        # Each run after the inputs that its convolution has seen last.
        extended_bounds = bounds + reach * torch.arange(num_runs + 1, dtype=torch.int32, device=x.device)
        window = torch.arange(reach, device=x.device)
        extended = x.new_empty(x.shape[1] + num_runs * reach, x.shape[2])
        extended[extended_bounds[:-1, None] + window] = earlier
        extended[place_M] = x[0]
        last = extended[extended_bounds[1:, None] - reach + window]
        return self._convolve(extended[None], cu_seqlens=extended_bounds)[:, place_M], last

    def _convolve(self, x: Tensor, **options: Tensor | None) -> Tensor:
        return causal_conv(x, self.weight, self.bias, activation=self.activation, **options)

    def init_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device | None = None) -> TensorDict:
        """The last width - 1 inputs."""
        channels, width = self.weight.shape
        inputs = torch.zeros(batch_size, width - 1, channels, dtype=dtype, device=device)
        return TensorDict({"inputs": inputs}, batch_size=[batch_size])

    def sequence_parallel_style(self, lsm: str, attention: str) -> ParallelStyle:
        return ConvHalo()
