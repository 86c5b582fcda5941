"""Log decay from a projected input; on a GPU by kernels/gates.py."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlmoe.layers.initialization import fill_
from torchlmoe.ops.kernel_backend import kernels_serve
from torchlmoe.ops.operation import operation


def draw_step(whole: Tensor, low: float, high: float, generator: torch.Generator | None) -> None:
    """Fills `whole` with biases whose softplus is log-uniform between `low` and `high`, for `fill_`."""
    step = whole.uniform_(math.log(low), math.log(high), generator=generator).exp_()
    whole.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


@operation
def decay_gate(*arguments) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of the kernel."""
    from torchlmoe.kernels import gates as kernels

    return kernels.decay_gate(*arguments)


class DecayGate(nn.Module):
    """A step size and the resulting log decay, in at least float32 (arXiv 2405.21060, 2412.06464, 2510.26692).

        step = softplus(x + dt_bias), clamped to `step_limits`         log_decay = -exp(A_log) * step

    x [..., heads] -> (log_decay, step), each like x. With `channels`, x [..., heads * channels] has a step per channel
    and a rate per head, and both results are [..., heads, channels].
    """

    float32_island = True  # its parameters stay float32 if the rest is cast to bfloat16
    head_dims = {"A_log": 0, "dt_bias": 0}

    def __init__(
        self,
        num_heads: int,
        channels: int | None = None,
        *,
        rates: tuple[float, float] = (1e-2, 16.0),
        step_limits: tuple[float, float | None] | None = None,
    ):
        super().__init__()
        self.channels, self.rates, self.step_limits = channels, rates, step_limits
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads * (channels or 1)))

    def init_weights(self) -> None:
        """exp(A_log) uniform between the two `rates`, softplus(dt_bias) log-uniform in [0.001, 0.1]."""
        fill_(self.A_log, lambda whole, generator: whole.uniform_(*self.rates, generator=generator).log_())
        fill_(self.dt_bias, lambda whole, generator: draw_step(whole, 1e-3, 1e-1, generator))

    def forward(self, x: Tensor, with_step: bool = True) -> tuple[Tensor, Tensor | None]:
        """The step is None if with_step is False."""
        if kernels_serve("auto", x, self.A_log):
            return self._by_kernel(x, with_step)
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        step = F.softplus(x.to(dtype) + self.dt_bias.to(dtype))
        if self.step_limits is not None:
            step = step.clamp(*self.step_limits)
        rate = self.A_log.to(dtype).exp()
        if self.channels is not None:
            step, rate = step.unflatten(-1, (-1, self.channels)), rate[:, None]
        return -rate * step, (step if with_step else None)

    def _by_kernel(self, x: Tensor, with_step: bool) -> tuple[Tensor, Tensor | None]:
        low, high = self.step_limits or (0.0, None)
        limits = [] if self.step_limits is None else [low, math.inf if high is None else high]
        log_decay, step = decay_gate(x, self.dt_bias, self.A_log, "softplus", 1.0, limits, with_step)
        shape = x.shape if self.channels is None else (*x.shape[:-1], -1, self.channels)
        return log_decay.view(shape), (step.view(shape) if with_step else None)
