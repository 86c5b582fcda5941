"""TTT-Linear (arXiv 2407.04620): the hidden state is a linear model with a layer norm, which learns at test time.

    W_t = W_a - max(0, 1 / i + c_i) sum_{s=a+1..t} eta_s dl_s/dW (W_a)          l_s(W) = |f(k_s; W) - v_s|^2 / 2
    y_t = W_o (LN(f(q_t; W_t)) * gelu(W_g x_t))                                 f(x; W) = x + LN(W^T x + b)

with W_a the weights at the start of t's mini-batch and i the place of t in it, from 1. A token reads weights that have
moved by the mean gradient so far, and the next mini-batch starts from the weights of the last place. The offset c_i
of each place is learned. eta_s is max_learning_rate * sigmoid(w x_s + w_0), divided by the head's width. q and k come
from one projection of x, with separate short convolutions, and are rotated by the place in the mini-batch, as in the
authors' layer for the Mamba backbone.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.group_norms import LayerNorm
from torchlmoe.layers.initialization import constant_
from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.layers.rotary import check_rotary_dim, rotary_phases, rotate
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.layers.short_convolution import ShortConvolution
from torchlmoe.mixers.fast_weights import FastWeightMixer
from torchlmoe.options import NormEps


class StepSize(nn.Module):
    """-> the learning rate's bias [H], and the weight of the step so far at each place of a mini-batch, [1, places]:
    one over the place, from 1, plus a learned offset, at least 0. Both in at least float32.
    """

    float32_island = True
    head_dims = {"bias": 0}

    def __init__(self, num_heads: int, mini_batch_size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(num_heads))
        self.offset = nn.Parameter(torch.empty(mini_batch_size))

    def init_weights(self) -> None:
        constant_(self.bias, 0.0)
        constant_(self.offset, 0.0)

    def forward(self) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.bias.dtype, torch.float32)
        place = torch.arange(1, len(self.offset) + 1, dtype=dtype, device=self.offset.device)
        return self.bias.to(dtype), (1 / place + self.offset.to(dtype)).clamp_min(0)[None]


class TTT(FastWeightMixer):
    shares_qk = True
    has_bias = True
    scales_steps = True

    def __init__(
        self,
        dim: int,
        *,
        conv_size: Annotated[int, Field(ge=1, description="Tokens that the short convolutions see.")] = 4,
        rope_base: Annotated[float, Field(gt=1, le=1e12, description="Base of the rotary wavelengths.")] = 10_000.0,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        super().__init__(dim, norm_eps=norm_eps, **options)
        width = self.num_heads * self.key_dim
        check_rotary_dim(self.key_dim, f"a width of {width} in num_heads = {self.num_heads} heads")
        self.rope_base = rope_base
        self.q_conv = ShortConvolution(width, conv_size, bias=True, activation=False)
        self.k_conv = ShortConvolution(width, conv_size, bias=True, activation=False)
        self.step_size = StepSize(self.num_heads, self.mini_batch_size)
        self.gate_proj = ColumnLinear(dim, width)
        self.norm = LayerNorm(width, norm_eps, across_heads=True)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        caches = {} if cache is None else cache
        shared = self.q_proj(x)
        q = self.q_conv(shared, sequence=sequence, cache=caches.get("q_conv"))
        k = self.k_conv(shared, sequence=sequence, cache=caches.get("k_conv"))
        q, k, v = self.split_heads(q, k, self.v_proj(x))
        phases = rotary_phases(sequence.positions % self.mini_batch_size, self.key_dim, self.rope_base)
        bias, step_scale = self.step_size()
        o = self.read(
            rotate(q, phases),
            rotate(k, phases),
            v,
            learning_rate=self.learning_rate(x, bias) / self.key_dim,
            step_scale=step_scale,
            sequence=sequence,
            cache=cache,
        )
        return self.o_proj(self.norm(o.flatten(2)) * F.gelu(self.gate_proj(x), approximate="tanh"))
