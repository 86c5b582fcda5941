"""Gated DeltaNet (arXiv 2412.06464): the delta rule with one decay per head and token.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T       g_t = -exp(A_log) softplus(W_a x_t + dt_bias)
    y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))                              q, k of unit length, beta_t = sigmoid(W_b x_t)

q, k and v pass a short convolution with SiLU first. With `num_key_heads` below `num_heads` several value heads share
a key head, as in Qwen3-Next, whose layer this equals.
"""

from typing import Annotated

import torch
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.decay_gate import DecayGate
from torchlmoe.layers.linear import Linear
from torchlmoe.layers.norms import GatedRMSNorm, l2_norm
from torchlmoe.layers.recurrence import LinearRecurrence, recur
from torchlmoe.layers.sequence import Sequence
from torchlmoe.layers.short_convolution import ShortConvolution
from torchlmoe.mixers.base import Mixer, recurrent_state, split_heads
from torchlmoe.ops.linear_recurrence import Backend, recurrence_flops_per_token


class GatedDeltaNet(Mixer):
    def __init__(
        self,
        dim: int,
        *,
        num_heads: Annotated[int, Field(ge=1, description="Value heads.")],
        num_key_heads: Annotated[
            int | None, Field(ge=1, description="Query and key heads; num_heads if unset.")
        ] = None,
        head_dim: Annotated[
            int | None, Field(ge=1, description="Width of a key head; dim / num_heads if unset.")
        ] = None,
        expand_v: Annotated[float, Field(gt=0, description="Width of a value head, as a multiple of head_dim.")] = 1.0,
        conv_size: Annotated[int, Field(ge=1, description="Tokens that the short convolutions see.")] = 4,
        negative_eigenvalues: Annotated[
            bool, Field(description="beta in (0, 2) in place of (0, 1) (arXiv 2411.12537).")
        ] = False,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
        init_std: float = 0.02,
    ):
        super().__init__()
        num_key_heads = num_key_heads or num_heads
        if num_heads % num_key_heads:
            raise ValueError(f"num_heads = {num_heads} must be a multiple of num_key_heads = {num_key_heads}.")
        self.num_heads, self.num_key_heads, self.init_std = num_heads, num_key_heads, init_std
        self.key_dim = head_dim or split_heads(dim, num_heads)
        self.value_dim = int(self.key_dim * expand_v)
        self.max_beta = 2.0 if negative_eigenvalues else 1.0
        key_width, value_width = num_key_heads * self.key_dim, num_heads * self.value_dim
        self.q_proj = Linear(dim, key_width)
        self.k_proj = Linear(dim, key_width)
        self.v_proj = Linear(dim, value_width)
        self.q_conv = ShortConvolution(key_width, conv_size)
        self.k_conv = ShortConvolution(key_width, conv_size)
        self.v_conv = ShortConvolution(value_width, conv_size)
        self.a_proj = Linear(dim, num_heads)
        self.b_proj = Linear(dim, num_heads)
        self.decay = DecayGate(num_heads)
        self.recurrence = LinearRecurrence(backend)
        self.gate_proj = Linear(dim, value_width)
        self.norm = GatedRMSNorm(self.value_dim, norm_eps)
        self.o_proj = Linear(value_width, dim)

    def forward(self, x: Tensor, *, sequence: Sequence, cache: TensorDict | None = None) -> Tensor:
        caches = {} if cache is None else cache
        q = self.q_conv(self.q_proj(x), sequence=sequence, cache=caches.get("q_conv")).unflatten(-1, (-1, self.key_dim))
        k = self.k_conv(self.k_proj(x), sequence=sequence, cache=caches.get("k_conv")).unflatten(-1, (-1, self.key_dim))
        v = self.v_conv(self.v_proj(x), sequence=sequence, cache=caches.get("v_conv")).unflatten(
            -1, (-1, self.value_dim)
        )
        beta = self.b_proj(x).sigmoid() * self.max_beta
        o = recur(
            self.recurrence,
            l2_norm(q),
            l2_norm(k),
            v * beta[..., None],
            log_decay=self.decay(self.a_proj(x)),
            erase=beta,
            scale=self.key_dim**-0.5,
            sequence=sequence,
            cache=cache,
        )
        gate = self.gate_proj(x).unflatten(-1, (-1, self.value_dim))
        return self.o_proj(self.norm(o, gate).flatten(2))

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        state = recurrent_state(batch_size, self.num_heads, self.key_dim, self.value_dim, dtype, device)
        convs = {
            name: getattr(self, name).init_cache(batch_size, dtype, device) for name in ("q_conv", "k_conv", "v_conv")
        }
        return TensorDict({"state": state, **convs}, batch_size=[batch_size])

    def flops_per_token(self, seq_len: int) -> int:
        recurrence = recurrence_flops_per_token(self.num_heads, self.key_dim, self.value_dim, decay=True, erase=True)
        convs = sum(2 * conv.weight.numel() for conv in (self.q_conv, self.k_conv, self.v_conv))
        return self.projection_flops() + convs + recurrence
