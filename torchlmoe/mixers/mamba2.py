"""Mamba-2 (arXiv 2405.21060): a state-space model with one decay per head. It is the linear recurrence with

    q = C_t, k = B_t, v = dt_t x_t          S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t x_t)^T
    y_t = W_o RMSNorm((S_t^T C_t + D x_t) * silu(z_t))          dt_t = softplus(W_dt u_t + dt_bias), within limits

x, B and C are projections of the input u that pass a short convolution with SiLU; the heads of a group share B and C.
There is one norm per group. Equals the layer of transformers' Mamba2, whose input projection is split into five here.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.decay_gate import DecayGate
from torchlmoe.layers.group_norms import GroupRMSNorm
from torchlmoe.layers.initialization import constant_
from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.layers.recurrence import recur
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.base import scaled_width
from torchlmoe.mixers.recurrent import ConvolvedMixer
from torchlmoe.mixers.widths import ExpandV, HeadDim, NumHeads, width_of_heads
from torchlmoe.options import NormEps


class Mamba2(ConvolvedMixer):
    decays = True
    head_dims = {"D": 0}

    def __init__(
        self,
        dim: int,
        *,
        num_heads: NumHeads,
        head_dim: HeadDim = None,
        num_groups: Annotated[int, Field(ge=1, description="Groups of heads that share B and C.")] = 1,
        state_dim: Annotated[int, Field(ge=1, description="Width of B and C.")] = 128,
        expand_v: ExpandV = 2.0,
        min_step: Annotated[float, Field(ge=0, le=1000, description="Least dt.")] = 0.0,
        max_step: Annotated[float | None, Field(ge=1e-6, le=1000, description="Largest dt; no limit if unset.")] = None,
        conv_bias: Annotated[bool, Field(description="Biases on the short convolutions.")] = True,
        proj_bias: Annotated[bool, Field(description="Biases on the projections into heads and out of them.")] = False,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        if max_step is not None and max_step < min_step:
            raise ValueError(f"max_step = {max_step} must not be below min_step = {min_step}.")
        value_width = scaled_width(width_of_heads(dim, num_heads, head_dim), expand_v)
        super().__init__(
            dim, num_groups * state_dim, value_width, num_groups, conv_bias,
            num_heads=num_heads, proj_bias=proj_bias, **options,
        )  # fmt: skip
        self.gate_proj = ColumnLinear(dim, value_width, proj_bias)
        self.dt_proj = ColumnLinear(dim, num_heads, proj_bias)
        self.decay = DecayGate(self.num_heads, rates=(1.0, 16.0), step_limits=(min_step, max_step))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GroupRMSNorm(value_width, num_groups, norm_eps)

    def init_weights(self) -> None:
        super().init_weights()
        constant_(self.D, 1.0)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        c, b, v = self.project(x, sequence=sequence, cache=cache)
        log_decay, step = self.decay(self.dt_proj(x))
        written = (v * step[..., None]).to(v.dtype)
        o = recur(self.recurrence, c, b, written, log_decay=log_decay, sequence=sequence, cache=cache)
        y = (o + self.D[:, None] * v).flatten(2)
        return self.o_proj(self.norm(y * F.silu(self.gate_proj(x))))
