"""Gated (decaying) fast weights (arXiv 2210.04243): linear attention with a gate on every element of the state.

    S_t = G_t * S_{t-1} + k_t v_t^T          y_t = W_o RMSNorm(S_t^T q_t)
    G_t = sigmoid(W_f x_t + b_f) sigmoid(W_z x_t + b_z)^T, of rank one, per head; or with `gate = "full"`
    G_t = sigmoid(W_2 W_1 x_t + b), K x V numbers per head

With rank one, one factor decays the state on the key side and the other on the value side. There is no feature
map. The biases start at 5, so the state lasts about 75 tokens (150 with a full gate). The norm per head is our
addition: the paper starts from trained softmax attention.
"""

from typing import Annotated, Literal

from pydantic import Field
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.biased_decay import LogSigmoidDecay
from torchlmoe.layers.elementwise_recurrence import ElementwiseRecurrence
from torchlmoe.layers.initialization import constant_
from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.layers.low_rank import LowRank
from torchlmoe.layers.norms import RMSNorm
from torchlmoe.layers.recurrence import LinearRecurrence, recur
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.base import scaled_width
from torchlmoe.mixers.recurrent import RecurrentMixer
from torchlmoe.mixers.widths import ExpandK, ExpandV, HeadDim, NumHeads, width_of_heads
from torchlmoe.ops.elementwise_recurrence import elementwise_flops_per_token
from torchlmoe.options import NormEps


class GatedFastWeights(RecurrentMixer):
    decays = True

    def __init__(
        self,
        dim: int,
        *,
        num_heads: NumHeads,
        head_dim: HeadDim = None,
        expand_k: ExpandK = 1.0,
        expand_v: ExpandV = 1.0,
        gate: Annotated[Literal["rank_one", "full"], Field(description="The gate on the state.")] = "rank_one",
        gate_rank: Annotated[
            int | None, Field(ge=1, description="Rank of a full gate's projection, 16 if unset.")
        ] = None,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        width = width_of_heads(dim, num_heads, head_dim)
        key_width, value_width = scaled_width(width, expand_k), scaled_width(width, expand_v)
        if gate != "full" and gate_rank is not None:
            raise ValueError(f"gate_rank = {gate_rank} needs gate = 'full'; leave it out with gate = {gate!r}.")
        kind = ElementwiseRecurrence if gate == "full" else LinearRecurrence
        super().__init__(dim, key_width, value_width, recurrence=kind, num_heads=num_heads, **options)
        self.gate = gate
        if gate == "full":
            self.gate_proj = LowRank(dim, gate_rank or 16, key_width * self.value_dim)
            self.decay = LogSigmoidDecay(key_width * self.value_dim)
        else:
            self.key_gate_proj = ColumnLinear(dim, key_width)
            self.key_decay = LogSigmoidDecay(key_width)
            self.value_gate_proj = ColumnLinear(dim, value_width)
            self.value_decay = LogSigmoidDecay(value_width)
        self.norm = RMSNorm(self.value_dim, norm_eps)

    def init_weights(self) -> None:
        super().init_weights()
        for decay in self.children():
            if isinstance(decay, LogSigmoidDecay):
                constant_(decay.bias, 5.0)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        q, k, v = self.project(x, sequence=sequence)
        if self.gate == "full":
            gates = {"log_decay": self.decay(self.gate_proj(x)).view(*k.shape, self.value_dim)}
        else:
            gates = {
                "log_decay": self.key_decay(sequence.project(self.key_gate_proj, x)).view_as(k),
                "value_log_decay": self.value_decay(sequence.project(self.value_gate_proj, x)).view_as(v),
            }
        o = recur(self.recurrence, q * self.key_dim**-0.5, k, v, **gates, sequence=sequence, cache=cache)
        return self.o_proj(self.norm(o).flatten(2))

    def recurrence_flops(self) -> int:
        if self.gate == "full":
            return elementwise_flops_per_token(self.num_heads, self.key_dim, self.value_dim)
        return super().recurrence_flops()
