"""Keys and values of multi-head latent attention (MLA, arXiv 2405.04434), computed from one narrow latent per token.

    c_t = RMSNorm(W_c x_t)        k_th = [W_r x_t, W_kh c_t]        v_th = W_vh c_t

The first part of a key, `shared_dim` channels that may have rotary phases, is the same in all heads. Decoding keeps
[W_r x_t, c_t] of each token and computes no keys and values: W_k is applied to the queries and W_v to the outputs. This
is softmax attention with the latent as its only key and value head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlmoe.layers.linear import ColumnLinear, Linear
from torchlmoe.layers.norms import RMSNorm


class LatentKeyValues(nn.Module):
    """x [B, T, dim] -> latent [B, T, rank] and the shared part of the keys [B, T, 1, shared_dim].

    bias: whether the two projections of x have one.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rank: int,
        *,
        key_dim: int,
        shared_dim: int,
        value_dim: int,
        norm_eps: float,
        bias: bool = False,
    ):
        super().__init__()
        self.rank = rank
        self.key_dim, self.shared_dim, self.value_dim = key_dim, shared_dim, value_dim
        self.shared_key_proj = Linear(dim, shared_dim, bias)
        self.down_proj = Linear(dim, rank, bias)
        self.norm = RMSNorm(rank, norm_eps)
        self.up_proj = ColumnLinear(rank, num_heads * (key_dim - shared_dim + value_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(self.down_proj(x)), self.shared_key_proj(x)[:, :, None]

    def expand(self, latent: Tensor, shared_key: Tensor) -> tuple[Tensor, Tensor]:
        """k [B, T, heads, key_dim], and v like k, its channels beyond value_dim zero: fused kernels need equal
        widths."""
        own_key, v = self.up_proj(latent).unflatten(-1, (-1, sum(self._widths()))).split(self._widths(), -1)
        k = torch.cat([shared_key.expand(-1, -1, own_key.shape[2], -1), own_key], -1)
        return k, v if self.value_dim == self.key_dim else F.pad(v, (0, self.key_dim - self.value_dim))

    def to_latent(self, q: Tensor) -> Tensor:
        """q [B, T, heads, key_dim] -> [B, T, heads, shared_dim + rank], to multiply the cache."""
        shared, own = q.split([self.shared_dim, self.key_dim - self.shared_dim], -1)
        return torch.cat([shared, torch.einsum("bthk,hkr->bthr", own, self._up_weights()[0])], -1)

    def from_latent(self, o: Tensor) -> Tensor:
        """Output of attention to the cache, [B, T, heads, shared_dim + rank] -> [B, T, heads, value_dim]."""
        return torch.einsum("bthr,hvr->bthv", o[..., self.shared_dim :], self._up_weights()[1])

    def _up_weights(self) -> tuple[Tensor, ...]:
        """[heads, own key channels, rank] and [heads, value_dim, rank]."""
        return self.up_proj.weight.unflatten(0, (-1, sum(self._widths()))).split(self._widths(), 1)

    def _widths(self) -> list[int]:
        return [self.key_dim - self.shared_dim, self.value_dim]
