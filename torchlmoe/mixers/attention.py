"""Softmax attention (arXiv 1706.03762): grouped queries (2305.13245), rotary phases (2104.09864) on all, some or none
of the channels, and, on request, RMS norm of q and k (2302.05442), a sigmoid gate on the output (2505.06708) and a
sliding window (2004.05150).
"""

from typing import Annotated

import torch
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.linear import Linear
from torchlmoe.layers.norms import RMSNorm
from torchlmoe.layers.rotary import rotary_phases, rotate
from torchlmoe.layers.sequence import Sequence
from torchlmoe.mixers.base import Mixer, split_heads
from torchlmoe.ops.packed_attention import cached_attention, packed_attention


class InnerAttention(nn.Module):
    """`packed_attention` as a submodule, so that a sequence-parallel plan can name it. Looks across tokens."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return packed_attention(q, k, v, **options)


class Attention(Mixer):
    def __init__(
        self,
        dim: int,
        *,
        num_heads: Annotated[int, Field(ge=1, description="Query heads.")],
        num_kv_heads: Annotated[int | None, Field(ge=1, description="Key and value heads; num_heads if unset.")] = None,
        head_dim: Annotated[int | None, Field(ge=1, description="Width of a head; dim / num_heads if unset.")] = None,
        rotary_fraction: Annotated[
            float, Field(ge=0, le=1, description="Share of each head's channels that rotary phases turn; 0 for none.")
        ] = 1.0,
        rope_base: Annotated[float, Field(gt=1, description="Base of the rotary wavelengths.")] = 10_000.0,
        qk_norm: Annotated[bool, Field(description="RMS norm on each head of q and k.")] = False,
        output_gate: Annotated[bool, Field(description="Multiply the output by a sigmoid gate of the input.")] = False,
        sliding_window: Annotated[
            int | None, Field(ge=1, description="Tokens that a token sees, itself included; all if unset.")
        ] = None,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
    ):
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads = {num_heads} must be a multiple of num_kv_heads = {num_kv_heads}.")
        self.num_heads, self.num_kv_heads, self.init_std = num_heads, num_kv_heads, init_std
        self.head_dim = head_dim or split_heads(dim, num_heads)
        self.rotary_dim = int(self.head_dim * rotary_fraction)
        if self.rotary_dim % 2:
            raise ValueError(
                f"rotary_fraction = {rotary_fraction} turns {self.rotary_dim} of the head's {self.head_dim} channels; "
                "rotary phases turn pairs, so it must be an even number."
            )
        self.rope_base, self.sliding_window = rope_base, sliding_window
        self.q_proj = Linear(dim, num_heads * self.head_dim)
        self.k_proj = Linear(dim, num_kv_heads * self.head_dim)
        self.v_proj = Linear(dim, num_kv_heads * self.head_dim)
        self.q_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else nn.Identity()
        self.inner = InnerAttention()
        self.gate_proj = Linear(dim, num_heads * self.head_dim) if output_gate else None
        self.o_proj = Linear(num_heads * self.head_dim, dim)

    def forward(self, x: Tensor, *, sequence: Sequence, cache: TensorDict | None = None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary_dim:
            phases = rotary_phases(sequence.positions, self.rotary_dim, self.rope_base)
            q, k = rotate(q, phases), rotate(k, phases)
        if cache is None:
            o = self.inner(q, k, v, cu_seqlens=sequence.cu_seqlens, window=self.sliding_window)
        else:
            o = self._attend_to_cache(q, k, v, sequence.positions, cache)
        o = o.flatten(2)
        if self.gate_proj is not None:
            o = o * self.gate_proj(x).sigmoid()
        return self.o_proj(o)

    def _attend_to_cache(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cache: TensorDict) -> Tensor:
        rows = torch.arange(len(q), device=q.device)[:, None]
        cache["k"][rows, positions] = k.to(cache["k"].dtype)
        cache["v"][rows, positions] = v.to(cache["v"].dtype)
        filled = int(positions.max()) + 1
        keys, values = cache["k"][:, :filled].to(q.dtype), cache["v"][:, :filled].to(q.dtype)
        return cached_attention(q, keys, values, positions, window=self.sliding_window)

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        shape = (batch_size, max_length, self.num_kv_heads, self.head_dim)
        places = {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")}
        return TensorDict(places, batch_size=[batch_size])

    def flops_per_token(self, seq_len: int) -> int:
        # A token sees half of the sequence on average: scores and values are two products each way.
        seen = seq_len / 2 if self.sliding_window is None else min(seq_len / 2, self.sliding_window)
        return self.projection_flops() + int(4 * self.num_heads * self.head_dim * seen)
