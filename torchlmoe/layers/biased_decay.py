"""Log decay from a projected input and a bias; on a GPU by kernels/gates.py."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlmoe.layers.decay_gate import decay_gate
from torchlmoe.layers.initialization import constant_
from torchlmoe.ops.kernel_backend import kernels_serve

MAX_LOG_RATE = 5.0  # exp(-exp(5)) is 1e-64, practically zero, and sums of log decays keep the digits of the others
LOG_DECAYS = {  # of x + bias, by the names of the kernel's activations
    "logsigmoid": F.logsigmoid,
    "exp": lambda x: -x.clamp(max=MAX_LOG_RATE).exp(),
    "sigmoid": lambda x: -x.sigmoid(),
}


class BiasedDecay(nn.Module):
    """x [..., channels] -> rate * f(x + bias), like x, in at least float32; f is named in `LOG_DECAYS`.

    The bias starts at zero.
    """

    float32_island = True
    head_dims = {"bias": 0}

    def __init__(self, channels: int, activation: str, rate: float = 1.0):
        super().__init__()
        self.activation, self.rate = activation, rate
        self.bias = nn.Parameter(torch.empty(channels))

    def init_weights(self) -> None:
        constant_(self.bias, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        if kernels_serve("auto", x, self.bias):
            limits = [0.0, math.exp(MAX_LOG_RATE)] if self.activation == "exp" else []
            return decay_gate(x, self.bias, None, self.activation, self.rate, limits, False)[0]
        dtype = torch.promote_types(self.bias.dtype, torch.float32)
        return self.rate * LOG_DECAYS[self.activation](x.to(dtype) + self.bias.to(dtype))


class LogSigmoidDecay(BiasedDecay):
    """x [..., channels] -> logsigmoid(x + bias) / normalizer (arXiv 2312.06635)."""

    def __init__(self, channels: int, normalizer: float = 1.0):
        super().__init__(channels, "logsigmoid", 1 / normalizer)
