"""Gated linear attention (arXiv 2312.06635): a decay per key channel, from a low-rank projection of the input.

g_t = logsigmoid(W_2 W_1 x_t + b) / gate_normalizer        S_t = diag(exp g_t) S_{t-1} + k_t v_t^T
y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.initialization import constant_
from torchlmoe.layers.linear import Linear
from torchlmoe.layers.norms import GatedRMSNorm
from torchlmoe.layers.recurrence import LinearRecurrence, recur
from torchlmoe.layers.sequence import Sequence
from torchlmoe.mixers.base import Mixer, recurrent_state, split_heads
from torchlmoe.ops.linear_recurrence import Backend, recurrence_flops_per_token


class LogSigmoidDecay(nn.Module):
    """x [..., channels] -> logsigmoid(x + bias) / normalizer, in at least float32."""

    float32_island = True

    def __init__(self, channels: int, normalizer: float):
        super().__init__()
        self.normalizer = normalizer
        self.bias = nn.Parameter(torch.empty(channels))

    def init_weights(self) -> None:
        constant_(self.bias, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.bias.dtype, torch.float32)
        return F.logsigmoid(x.to(dtype) + self.bias.to(dtype)) / self.normalizer


class GatedLinearAttention(Mixer):
    def __init__(
        self,
        dim: int,
        *,
        num_heads: Annotated[int, Field(ge=1, description="Heads.")],
        expand_k: Annotated[float, Field(gt=0, description="Width of all keys together, as a multiple of dim.")] = 0.5,
        expand_v: Annotated[
            float, Field(gt=0, description="Width of all values together, as a multiple of dim.")
        ] = 1.0,
        gate_rank: Annotated[int, Field(ge=1, description="Rank of the decay's projection.")] = 16,
        gate_normalizer: Annotated[float, Field(gt=0, description="Divides the log decay.")] = 16.0,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
        init_std: float = 0.02,
    ):
        super().__init__()
        key_width, value_width = int(dim * expand_k), int(dim * expand_v)
        self.num_heads, self.init_std = num_heads, init_std
        self.key_dim = split_heads(key_width, num_heads, "dim * expand_k")
        self.value_dim = split_heads(value_width, num_heads, "dim * expand_v")
        self.q_proj = Linear(dim, key_width)
        self.k_proj = Linear(dim, key_width)
        self.v_proj = Linear(dim, value_width)
        self.decay_down_proj = Linear(dim, gate_rank)
        self.decay_up_proj = Linear(gate_rank, key_width)
        self.decay = LogSigmoidDecay(key_width, gate_normalizer)
        self.recurrence = LinearRecurrence(backend)
        self.gate_proj = Linear(dim, value_width)
        self.norm = GatedRMSNorm(self.value_dim, norm_eps)
        self.o_proj = Linear(value_width, dim)

    def forward(self, x: Tensor, *, sequence: Sequence, cache: TensorDict | None = None) -> Tensor:
        log_decay = self.decay(self.decay_up_proj(self.decay_down_proj(x)))
        o = recur(
            self.recurrence,
            self.q_proj(x).unflatten(-1, (-1, self.key_dim)),
            self.k_proj(x).unflatten(-1, (-1, self.key_dim)),
            self.v_proj(x).unflatten(-1, (-1, self.value_dim)),
            log_decay=log_decay.unflatten(-1, (-1, self.key_dim)),
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
        return TensorDict({"state": state}, batch_size=[batch_size])

    def flops_per_token(self, seq_len: int) -> int:
        recurrence = recurrence_flops_per_token(self.num_heads, self.key_dim, self.value_dim, decay=True)
        return self.projection_flops() + recurrence
