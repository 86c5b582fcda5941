"""Log decay per head from a projected input, as in Mamba-2 and Gated DeltaNet."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlmoe.layers.initialization import fill_


def draw_step(whole: Tensor, low: float, high: float, generator: torch.Generator | None) -> None:
    """Fills `whole` with biases whose softplus is log-uniform between `low` and `high`, for `fill_`."""
    step = whole.uniform_(math.log(low), math.log(high), generator=generator).exp_()
    whole.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


class DecayGate(nn.Module):
    """x [..., heads] -> -exp(A_log) * softplus(x + dt_bias), in at least float32 (arXiv 2405.21060, 2412.06464)."""

    float32_island = True  # its parameters stay float32 where the rest is cast down

    def __init__(self, num_heads: int, *, min_step: float = 1e-3, max_step: float = 1e-1, max_rate: float = 16.0):
        super().__init__()
        self.min_step, self.max_step, self.max_rate = min_step, max_step, max_rate
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))

    def init_weights(self) -> None:
        """exp(A_log) uniform in (0, max_rate), softplus(dt_bias) log-uniform between the two steps."""
        fill_(self.A_log, lambda whole, generator: whole.uniform_(1e-2, self.max_rate, generator=generator).log_())
        fill_(self.dt_bias, lambda whole, generator: draw_step(whole, self.min_step, self.max_step, generator))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        return -self.A_log.to(dtype).exp() * F.softplus(x.to(dtype) + self.dt_bias.to(dtype))
