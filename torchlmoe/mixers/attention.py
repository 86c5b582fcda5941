"""Softmax attention (arXiv 1706.03762): grouped queries (2305.13245), rotary phases (2104.09864) on all, some or none
of the channels. Options are scaled rotary wavelengths for longer documents, RMS norm of q and k (2302.05442), a
sigmoid gate on the output (2505.06708), a sliding window (2004.05150), biases, and keys and values from a latent (MLA,
2405.04434) as in DeepSeek-V2 and Kimi-Linear.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.layers.group_norms import AllHeadsRMSNorm
from torchlmoe.layers.linear import ColumnLinear, RowLinear
from torchlmoe.layers.low_rank import LowRank
from torchlmoe.layers.norms import RMSNorm
from torchlmoe.layers.rope_scaling import RopeScalingTable, rope_scaling_of
from torchlmoe.layers.rotary import check_rotary_dim, rotary_phases, rotate
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.base import Mixer, split_heads
from torchlmoe.mixers.latent_attention import LatentKeyValues
from torchlmoe.ops.packed_attention import cached_attention, packed_attention
from torchlmoe.options import InitStd, NormEps
from torchlmoe.styles.attention import AttentionSequenceParallel

Rotation = Callable[[Tensor], Tensor]
ZeroCenteredNorm = Annotated[
    bool, Field(description="Weights of the norms of blocks, head, q and k are offsets from one (Qwen3-Next).")
]


class InnerAttention(nn.Module):
    """`packed_attention` as a submodule, so that a context-parallel plan can name it. Looks across tokens."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return packed_attention(q, k, v, **options)

    def context_parallel_style(self, lsm: str, attention: str) -> ParallelStyle:
        """attention: "all_gather" or "ulysses", which raises ValueError if heads cannot be split over ranks."""
        return AttentionSequenceParallel(attention, self.num_heads)


class Attention(Mixer):
    def __init__(
        self,
        dim: int,
        *,
        num_heads: Annotated[int, Field(ge=1, description="Query heads.")],
        num_kv_heads: Annotated[int | None, Field(ge=1, description="Key and value heads; num_heads if unset.")] = None,
        head_dim: Annotated[int | None, Field(ge=1, description="Width of a head; dim / num_heads if unset.")] = None,
        rotary_fraction: Annotated[
            float, Field(ge=0, le=1, description="Share of each head's channels with rotary phases; 0 for none.")
        ] = 1.0,
        rope_base: Annotated[float, Field(gt=1, le=1e12, description="Base of the rotary wavelengths.")] = 10_000.0,
        rope_scaling: RopeScalingTable = None,
        softmax_scale: Annotated[
            float | None, Field(ge=1e-6, le=1e6, description="Scale of scores; 1 / sqrt(head_dim) if unset.")
        ] = None,
        qkv_bias: Annotated[
            bool, Field(description="Biases on q, k and v; with kv_rank or q_rank on the down projections.")
        ] = False,
        output_bias: Annotated[bool, Field(description="A bias on the output projection.")] = False,
        qk_norm: Annotated[
            Literal[False, True, "all_heads"],
            Field(description="RMS norm of q and k: none, over each head, or over the channels of all heads."),
        ] = False,
        output_gate: Annotated[
            Literal[False, True, "per_head"],
            Field(description="Multiply the output by a sigmoid gate of the input, per channel or per head."),
        ] = False,
        sliding_window: Annotated[
            int | None, Field(ge=1, description="Tokens that a token sees, itself included; all if unset.")
        ] = None,
        kv_rank: Annotated[
            int | None,
            Field(ge=1, description="Width of the latent of keys and values (MLA); no latent if unset."),
        ] = None,
        q_rank: Annotated[
            int | None, Field(ge=1, description="Rank of the queries' projection, with a norm between; full if unset.")
        ] = None,
        shared_key_dim: Annotated[
            int | None,
            Field(ge=1, description="With kv_rank: key channels that all heads share; the rotary channels if unset."),
        ] = None,
        value_dim: Annotated[
            int | None, Field(ge=1, description="With kv_rank: width of a value head; head_dim if unset.")
        ] = None,
        norm_eps: NormEps = 1e-6,
        zero_centered_norm: ZeroCenteredNorm = False,
        init_std: InitStd = 0.02,
    ):
        super().__init__()
        if kv_rank is not None and (num_kv_heads is not None or qk_norm):
            option = "qk_norm" if qk_norm else "num_kv_heads"
            raise ValueError(f"{option} cannot be combined with kv_rank = {kv_rank}, whose keys come from a latent.")
        if kv_rank is None and (shared_key_dim is not None or value_dim is not None):
            option = "value_dim" if shared_key_dim is None else "shared_key_dim"
            raise ValueError(f"{option} needs latent attention; give kv_rank too.")
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads = {num_heads} must be a multiple of num_kv_heads = {num_kv_heads}.")
        self.num_heads = self.units = num_heads
        self.num_kv_heads, self.init_std = num_kv_heads, init_std
        self.head_dim = head_dim or split_heads(dim, num_heads)
        self.rotary_dim = round(self.head_dim * rotary_fraction)
        check_rotary_dim(self.rotary_dim, f"rotary_fraction = {rotary_fraction} of head_dim = {self.head_dim}")
        self.rope_base, self.sliding_window = rope_base, sliding_window
        self.rope_scaling = rope_scaling_of(rope_scaling)
        self.softmax_scale = self.head_dim**-0.5 if softmax_scale is None else softmax_scale
        if self.rotary_dim:
            self.softmax_scale *= self.rope_scaling.softmax_factor
        if q_rank is None:
            self.q_proj: nn.Module = ColumnLinear(dim, num_heads * self.head_dim, qkv_bias and kv_rank is None)
        else:
            self.q_proj = LowRank(dim, q_rank, num_heads * self.head_dim, RMSNorm(q_rank, norm_eps), qkv_bias)
        self.value_dim = value_dim or self.head_dim
        self.latent: LatentKeyValues | None = None
        if kv_rank is None:
            self.k_proj = ColumnLinear(dim, num_kv_heads * self.head_dim, qkv_bias, units=num_kv_heads)
            self.v_proj = ColumnLinear(dim, num_kv_heads * self.head_dim, qkv_bias, units=num_kv_heads)
        else:
            shared_dim = self.rotary_dim if shared_key_dim is None else shared_key_dim
            if not max(1, self.rotary_dim) <= shared_dim < self.head_dim:
                raise ValueError(
                    f"shared_key_dim = {shared_dim} must be at least the {self.rotary_dim} rotary channels, at least 1 "
                    f"and below head_dim = {self.head_dim}; change it or rotary_fraction."
                )
            if self.value_dim > self.head_dim:
                raise ValueError(f"value_dim = {value_dim} must not be above head_dim = {self.head_dim}.")
            self.latent = LatentKeyValues(
                dim, num_heads, kv_rank,
                key_dim=self.head_dim, shared_dim=shared_dim, value_dim=self.value_dim, norm_eps=norm_eps,
                bias=qkv_bias,
            )  # fmt: skip
        self.qk_norm = qk_norm
        self.q_norm, self.k_norm = (
            self._norm(number, norm_eps, zero_centered_norm) for number in (num_heads, num_kv_heads)
        )
        self.inner = InnerAttention(num_heads)
        gate_dim = 1 if output_gate == "per_head" else self.value_dim
        self.gate_proj = ColumnLinear(dim, num_heads * gate_dim) if output_gate else None
        self.o_proj = RowLinear(num_heads * self.value_dim, dim, bias=output_bias)

    def _norm(self, num_heads: int, eps: float, zero_centered: bool) -> nn.Module:
        if not self.qk_norm:
            return nn.Identity()
        if self.qk_norm == "all_heads":
            return AllHeadsRMSNorm(num_heads, self.head_dim, eps, zero_centered=zero_centered)
        return RMSNorm(self.head_dim, eps, zero_centered=zero_centered)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        turn = self._rotation(sequence.positions)
        q = turn(self._heads(self.q_norm, self.q_proj(x)))
        attend = self._attend if self.latent is None else self._attend_latent
        o = attend(x, q, turn, sequence, cache)
        if self.gate_proj is not None:
            o = o * self.gate_proj(x).sigmoid().unflatten(-1, (o.shape[2], -1))
        return self.o_proj(o.flatten(2))

    def _heads(self, norm: nn.Module, x: Tensor) -> Tensor:
        """x [B, T, heads * head_dim] -> normed, [B, T, heads, head_dim]."""
        heads = (-1, self.head_dim)
        return norm(x).unflatten(-1, heads) if self.qk_norm == "all_heads" else norm(x.unflatten(-1, heads))

    def _rotation(self, positions: Tensor) -> Rotation:
        if not self.rotary_dim:
            return lambda heads: heads
        phases = rotary_phases(positions, self.rotary_dim, self.rope_base, self.rope_scaling)
        return lambda heads: rotate(heads, phases)

    def _attend(
        self, x: Tensor, q: Tensor, turn: Rotation, sequence: SequenceLayout, cache: TensorDict | None
    ) -> Tensor:
        k, v = turn(self._heads(self.k_norm, self.k_proj(x))), self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if cache is None:
            return self.inner(
                q, k, v, cu_seqlens=sequence.cu_seqlens, window=self.sliding_window, scale=self.softmax_scale
            )
        k, v = self._keep(cache, sequence.positions, k=k, v=v)
        return cached_attention(q, k, v, sequence.positions, window=self.sliding_window, scale=self.softmax_scale)

    def _attend_latent(
        self, x: Tensor, q: Tensor, turn: Rotation, sequence: SequenceLayout, cache: TensorDict | None
    ) -> Tensor:
        assert self.latent is not None
        latent, k = self.latent(x)
        k = turn(k)
        if cache is None:
            k, v = self.latent.expand(latent, k)
            o = self.inner(
                q, k, v, cu_seqlens=sequence.cu_seqlens, window=self.sliding_window, scale=self.softmax_scale
            )
            return o[..., : self.value_dim]
        (kept,) = self._keep(cache, sequence.positions, latent=torch.cat([k, latent[:, :, None]], -1))
        o = cached_attention(
            self.latent.to_latent(q),
            kept,
            kept,
            sequence.positions,
            window=self.sliding_window,
            scale=self.softmax_scale,
        )
        return self.latent.from_latent(o)

    def _keep(self, cache: TensorDict, positions: Tensor, **new: Tensor) -> list[Tensor]:
        """Write new tokens to their places in the cache; return all places filled so far."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        # In a compiled step the mask hides empty places: a length that depends on values would break the graph.
        filled = None if torch.compiler.is_compiling() else int(positions.max()) + 1
        for name, x in new.items():
            cache[name][rows, positions] = x.to(cache[name].dtype)
        return [cache[name][:, :filled].to(x.dtype) for name, x in new.items()]

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        """k and v [batch, max_length, key and value heads, head_dim], or `latent` [.., 1, shared_key_dim + kv_rank]."""
        shapes = dict.fromkeys(("k", "v"), (self.num_kv_heads, self.head_dim))
        if self.latent is not None:
            shapes = {"latent": (1, self.latent.shared_dim + self.latent.rank)}
        places = {
            name: torch.zeros(batch_size, max_length, *shape, dtype=dtype, device=device)
            for name, shape in shapes.items()
        }
        return TensorDict(places, batch_size=[batch_size])

    def flops_per_token(self, seq_len: int) -> int:
        # A token sees half of the sequence on average; scores and values are one product each.
        seen = seq_len / 2 if self.sliding_window is None else min(seq_len / 2, self.sliding_window)
        return self.projection_flops() + int(2 * self.num_heads * (self.head_dim + self.value_dim) * seen)
