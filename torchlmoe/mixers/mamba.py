"""Mamba (arXiv 2312.00752): a selective state space, whose step, B and C depend on the token.

    h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + dt_t[d] B_t[n] x_t[d]          A = -exp(A_log)
    y_t = W_o ((sum_n C_t[n] h_t[:, n] + D * x_t) * silu(z_t))                       dt = softplus(W_2 W_1 x + dt_bias)

x and z [B, T, channels] are projections of the input; x passes a short convolution with SiLU first. The state is
[channels, N]. Equals `MambaMixer` of transformers.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.decay_gate import draw_step
from torchlmoe.layers.elementwise_recurrence import ElementwiseRecurrence
from torchlmoe.layers.initialization import constant_, fill_, uniform_
from torchlmoe.layers.linear import ColumnLinear, RowLinear
from torchlmoe.layers.recurrence import recur
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.layers.short_convolution import ShortConvolution
from torchlmoe.mixers.base import Mixer, recurrent_state, scaled_width
from torchlmoe.ops.elementwise_recurrence import elementwise_flops_per_token
from torchlmoe.ops.linear_recurrence import Backend
from torchlmoe.options import InitStd


class SelectiveDecay(nn.Module):
    """x [B, T, channels] -> the step, like x, and its rates [N, channels] (<= 0), in at least float32."""

    float32_island = True
    head_dims = {"A_log": 0, "dt_bias": 0}  # channel after channel

    def __init__(self, channels: int, state_dim: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(channels * state_dim))  # a vector, which has no weight decay
        self.dt_bias = nn.Parameter(torch.empty(channels))

    def init_weights(self) -> None:
        """A = -1 .. -N in every channel (S4D-Real); softplus(dt_bias) log-uniform in [0.001, 0.1]."""
        channels = self.dt_bias.shape[0]
        rates = torch.arange(1, self.A_log.shape[0] // channels + 1).repeat(channels)
        fill_(self.A_log, lambda whole, generator: whole.copy_(rates).log_())
        fill_(self.dt_bias, lambda whole, generator: draw_step(whole, 1e-3, 1e-1, generator))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        step = F.softplus(x.to(dtype) + self.dt_bias.to(dtype))
        return step, -self.A_log.to(dtype).exp().view(step.shape[-1], -1).mT


class Mamba(Mixer):
    head_dims = {"D": 0}

    def __init__(
        self,
        dim: int,
        *,
        expand: Annotated[
            float, Field(ge=0.01, le=100, description="Channels of the state space, as a multiple of dim.")
        ] = 2.0,
        state_dim: Annotated[int, Field(ge=1, description="N, the state's width in each channel.")] = 16,
        step_rank: Annotated[
            int | None, Field(ge=1, description="Rank of the step's projection; dim / 16 if unset.")
        ] = None,
        conv_size: Annotated[int, Field(ge=1, description="Tokens that the short convolution sees.")] = 4,
        conv_bias: Annotated[bool, Field(description="A bias on the short convolution.")] = True,
        proj_bias: Annotated[
            bool, Field(description="Biases on the projections of x, of z and of the output.")
        ] = False,
        backend: Backend = "auto",
        init_std: InitStd = 0.02,
    ):
        super().__init__()
        channels, self.step_rank = scaled_width(dim, expand), step_rank or math.ceil(dim / 16)
        if channels == 0:
            raise ValueError(f"expand = {expand} of dim = {dim} gives no channels; make it at least {1 / dim}.")
        self.channels = self.units = channels
        self.state_dim, self.init_std = state_dim, init_std
        self.x_proj = ColumnLinear(dim, channels, proj_bias)
        self.gate_proj = ColumnLinear(dim, channels, proj_bias)
        self.x_conv = ShortConvolution(channels, conv_size, conv_bias)
        self.step_B_C_proj = RowLinear(channels, self.step_rank + 2 * state_dim, to_heads=True)
        self.step_proj = ColumnLinear(self.step_rank, channels)
        self.decay = SelectiveDecay(channels, state_dim)
        self.recurrence = ElementwiseRecurrence(backend)
        self.D = nn.Parameter(torch.empty(channels))
        self.o_proj = RowLinear(channels, dim, bias=proj_bias)

    def init_weights(self) -> None:
        super().init_weights()
        uniform_(self.step_proj.weight, -(self.step_rank**-0.5), self.step_rank**-0.5)
        constant_(self.D, 1.0)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        gate = self.gate_proj(x)
        x = self.x_conv(self.x_proj(x), sequence=sequence, cache=None if cache is None else cache["x_conv"])
        step, B, C = self.step_B_C_proj(x).split([self.step_rank, self.state_dim, self.state_dim], -1)
        step, rates = self.decay(self.step_proj(step))
        # One head, whose keys are the state's width and whose values are the channels.
        o = recur(
            self.recurrence,
            C[:, :, None],
            B[:, :, None],
            (step * x)[:, :, None],
            log_decay=rates[None],
            step=step[:, :, None],
            sequence=sequence,
            cache=cache,
        )
        return self.o_proj((o[:, :, 0] + self.D * x).to(x.dtype) * F.silu(gate))

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        state = recurrent_state(batch_size, 1, self.state_dim, self.channels, dtype, device)
        x_conv = self.x_conv.init_cache(batch_size, dtype, device)
        return TensorDict({"state": state, "x_conv": x_conv}, batch_size=[batch_size])

    def flops_per_token(self, seq_len: int) -> int:
        recurrence = elementwise_flops_per_token(1, self.state_dim, self.channels, step=True)
        return self.projection_flops() + 2 * self.x_conv.weight.numel() + recurrence
