"""Retention (RetNet, arXiv 2307.08621): a constant decay per head, and rotary phases on q and k (together: xPos).

S_t = gamma_h S_{t-1} + k_t v_t^T          gamma_h = 1 - 2^(-5 - h), h from 0
y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))
"""

from typing import Annotated

import torch
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.layers.norms import GatedRMSNorm
from torchlmoe.layers.recurrence import recur
from torchlmoe.layers.rope_scaling import RopeScalingTable, rope_scaling_of
from torchlmoe.layers.rotary import check_rotary_dim, rotary_phases, rotate
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.base import scaled_width
from torchlmoe.mixers.recurrent import RecurrentMixer
from torchlmoe.mixers.widths import ExpandV, HeadDim, NumHeads, width_of_heads
from torchlmoe.options import NormEps


class Retention(RecurrentMixer):
    decays = True

    def __init__(
        self,
        dim: int,
        *,
        num_heads: NumHeads,
        head_dim: HeadDim = None,
        expand_v: ExpandV = 2.0,
        rope_base: Annotated[float, Field(gt=1, le=1e12, description="Base of the rotary wavelengths.")] = 10_000.0,
        rope_scaling: RopeScalingTable = None,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        width = width_of_heads(dim, num_heads, head_dim)
        value_width = scaled_width(width, expand_v)
        super().__init__(dim, width, value_width, num_heads=num_heads, **options)
        check_rotary_dim(self.key_dim, f"a width of {width} in num_heads = {num_heads} heads")
        self.rope_base, self.rope_scaling = rope_base, rope_scaling_of(rope_scaling)
        self.gate_proj = ColumnLinear(dim, value_width)
        self.norm = GatedRMSNorm(self.value_dim, norm_eps)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        q, k, v = self.project(x, sequence=sequence)
        positions = sequence.project(lambda _: sequence.positions, x)
        phases = rotary_phases(positions, self.key_dim, self.rope_base, self.rope_scaling)
        o = recur(
            self.recurrence,
            rotate(q, phases),
            rotate(k, phases),
            v,
            log_decay=torch.log1p(-torch.exp2(-5 - self.head_numbers(x.device))),
            scale=self.key_dim**-0.5,
            sequence=sequence,
            cache=cache,
        )
        return self.o_proj(self.norm(o, self.gate_proj(x).view_as(o)).flatten(2))
