"""Gated linear attention (arXiv 2312.06635): a decay per key channel, from a low-rank projection of the input.

g_t = logsigmoid(W_2 W_1 x_t + b) / gate_normalizer        S_t = diag(exp g_t) S_{t-1} + k_t v_t^T
y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))
"""

from typing import Annotated

from pydantic import Field
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.biased_decay import LogSigmoidDecay
from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.layers.low_rank import LowRank
from torchlmoe.layers.norms import GatedRMSNorm
from torchlmoe.layers.recurrence import recur
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.base import scaled_width
from torchlmoe.mixers.recurrent import RecurrentMixer
from torchlmoe.mixers.widths import ExpandK, ExpandV, HeadDim, NumHeads, width_of_heads
from torchlmoe.options import NormEps


class GatedLinearAttention(RecurrentMixer):
    decays = True

    def __init__(
        self,
        dim: int,
        *,
        num_heads: NumHeads,
        head_dim: HeadDim = None,
        expand_k: ExpandK = 0.5,
        expand_v: ExpandV = 1.0,
        gate_rank: Annotated[int, Field(ge=1, description="Rank of the decay's projection.")] = 16,
        gate_normalizer: Annotated[float, Field(ge=1e-3, le=1e4, description="Divides the log decay.")] = 16.0,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        width = width_of_heads(dim, num_heads, head_dim)
        key_width, value_width = scaled_width(width, expand_k), scaled_width(width, expand_v)
        super().__init__(dim, key_width, value_width, num_heads=num_heads, **options)
        self.decay_proj = LowRank(dim, gate_rank, key_width)
        self.decay = LogSigmoidDecay(key_width, gate_normalizer)
        self.gate_proj = ColumnLinear(dim, value_width)
        self.norm = GatedRMSNorm(self.value_dim, norm_eps)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        q, k, v = self.project(x, sequence=sequence)
        log_decay = self.decay(sequence.project(self.decay_proj, x)).view_as(k)
        o = recur(
            self.recurrence, q, k, v, log_decay=log_decay, scale=self.key_dim**-0.5, sequence=sequence, cache=cache
        )
        return self.o_proj(self.norm(o, self.gate_proj(x).view_as(o)).flatten(2))
