"""TTT-Linear (arXiv 2407.04620): the hidden state is a linear model with a layer norm, which learns at test time.

    W_t = W_{t-1} - lr_t dl_t/dW at the mini-batch's first W          l_t(W) = |f(k_t; W) - v_t|^2 / 2
    y_t = W_o (LN(f(q_t; W_t)) * gelu(W_g x_t))                       f(x; W) = x + LN(W^T x + b)

q and k are one projection of x, each through a short convolution of its own and rotated by its place in the mini-batch,
as in the authors' layer for the Mamba backbone. lr_t is max_learning_rate * sigmoid(w x_t), over the mini-batch's size
and the head's width: from one mini-batch to the next the weights move by the mean gradient, as in the authors' code at
its start. Inside a mini-batch it differs: there the token at place i (from 1) reads weights whose whole step so far is
over i, 1/i plus a learned offset of each place, here over the mini-batch's size at every place.
"""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.linear import Linear
from torchlmoe.layers.norms import LayerNorm
from torchlmoe.layers.rotary import check_rotary_dim, rotary_phases, rotate
from torchlmoe.layers.sequence import Sequence
from torchlmoe.layers.short_convolution import ShortConvolution
from torchlmoe.mixers.base import NormEps
from torchlmoe.mixers.fast_weights import FastWeightMixer


class TTT(FastWeightMixer):
    has_bias = True

    def __init__(
        self,
        dim: int,
        *,
        conv_size: Annotated[int, Field(ge=1, description="Tokens that the short convolutions see.")] = 4,
        rope_base: Annotated[float, Field(gt=1, description="Base of the rotary wavelengths.")] = 10_000.0,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        super().__init__(dim, norm_eps=norm_eps, **options)
        check_rotary_dim(self.key_dim, f"dim = {dim} in num_heads = {self.num_heads} heads")
        self.rope_base = rope_base
        del self.k_proj  # q and k share theirs
        self.q_conv = ShortConvolution(dim, conv_size, bias=True, activation=False)
        self.k_conv = ShortConvolution(dim, conv_size, bias=True, activation=False)
        self.gate_proj = Linear(dim, dim)
        self.norm = LayerNorm(dim, norm_eps)

    def forward(self, x: Tensor, *, sequence: Sequence, cache: TensorDict | None = None) -> Tensor:
        caches = {} if cache is None else cache
        shared = self.q_proj(x)
        q = self.q_conv(shared, sequence=sequence, cache=caches.get("q_conv"))
        k = self.k_conv(shared, sequence=sequence, cache=caches.get("k_conv"))
        q, k, v = self.split_heads(q, k, self.v_proj(x))
        phases = rotary_phases(sequence.positions % self.mini_batch_size, self.key_dim, self.rope_base)
        o = self.read(
            rotate(q, phases),
            rotate(k, phases),
            v,
            learning_rate=self.learning_rate(x) / (self.mini_batch_size * self.key_dim),
            sequence=sequence,
            cache=cache,
        )
        return self.o_proj(self.norm(o.flatten(2)) * F.gelu(self.gate_proj(x), approximate="tanh"))
