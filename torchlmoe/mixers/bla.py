"""Basic linear attention (BLA): o_t = S_t^T phi(q_t), S_t = S_{t-1} + phi(k_t) v_t^T (arXiv 2006.16236, 2503.05447).

The outputs are normalised per head, by RMS as in arXiv 2210.10340, or by the sum of the attention weights as in the
first of the papers (`normalizer`), which is a column of ones on v.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.linear import Linear
from torchlmoe.layers.norms import RMSNorm
from torchlmoe.layers.recurrence import LinearRecurrence, recur
from torchlmoe.layers.sequence import Sequence
from torchlmoe.mixers.base import Mixer, recurrent_state, split_heads
from torchlmoe.ops.linear_recurrence import Backend, recurrence_flops_per_token

FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "silu": F.silu,
    "softmax": lambda x: x.softmax(-1),
}


class BasicLinearAttention(Mixer):
    def __init__(
        self,
        dim: int,
        *,
        num_heads: Annotated[int, Field(ge=1, description="Heads.")],
        feature_map: Annotated[
            Literal["identity", "elu", "relu", "silu", "softmax"], Field(description="phi, applied to q and k.")
        ] = "silu",
        normalizer: Annotated[bool, Field(description="Divide by the sum of the attention weights.")] = False,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
        init_std: float = 0.02,
    ):
        super().__init__()
        if normalizer and feature_map in ("identity", "silu"):
            raise ValueError(
                f"normalizer = true divides by a sum that feature_map = {feature_map!r} can make zero or negative; "
                "use 'elu', 'relu' or 'softmax'."
            )
        self.num_heads, self.head_dim = num_heads, split_heads(dim, num_heads)
        self.feature_map, self.normalizer, self.norm_eps, self.init_std = feature_map, normalizer, norm_eps, init_std
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.recurrence = LinearRecurrence(backend)
        self.norm = RMSNorm(self.head_dim, norm_eps)
        self.o_proj = Linear(dim, dim)

    def forward(self, x: Tensor, *, sequence: Sequence, cache: TensorDict | None = None) -> Tensor:
        feature_map = FEATURE_MAPS[self.feature_map]
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.normalizer:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        o = recur(
            self.recurrence,
            feature_map(q),
            feature_map(k),
            v,
            scale=self.head_dim**-0.5,
            sequence=sequence,
            cache=cache,
        )
        if self.normalizer:
            o = o[..., :-1] / (o[..., -1:] + self.norm_eps)
        return self.o_proj(self.norm(o).flatten(2))

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        value_dim = self.head_dim + self.normalizer
        state = recurrent_state(batch_size, self.num_heads, self.head_dim, value_dim, dtype, device)
        return TensorDict({"state": state}, batch_size=[batch_size])

    def flops_per_token(self, seq_len: int) -> int:
        return self.projection_flops() + recurrence_flops_per_token(self.num_heads, self.head_dim, self.head_dim)
