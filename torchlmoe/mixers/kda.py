"""Kimi Delta Attention (KDA, arXiv 2510.26692): the delta rule with a decay per key channel, and an output gate.

    S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T
    g_t = -exp(A_log) softplus(W_f2 W_f1 x_t + dt_bias)      A_log per head, dt_bias per channel
    y_t = W_o (RMSNorm(o_t) * sigmoid(W_g2 W_g1 x_t))

The projections of decay and gate have rank `gate_rank`, or are one matrix each. With `decay_lower_bound`, the decay is

    g_t = lower_bound * sigmoid(exp(A_log) (W_f x_t + dt_bias))

The rest is as in DeltaNet. Equals the layer of Kimi-Linear, and with these options those of Ling-3.0 and GLM-5.3.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from torchlmoe.layers.bounded_decay import BoundedDecayGate
from torchlmoe.layers.decay_gate import DecayGate
from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.layers.low_rank import LowRank
from torchlmoe.layers.norms import GatedRMSNorm
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.deltanet import DeltaNet
from torchlmoe.options import NormEps


class KimiDeltaAttention(DeltaNet):
    decays = True

    def __init__(
        self,
        dim: int,
        *,
        gate_rank: Annotated[
            int | None, Field(ge=1, description="Rank of the projections of decay and gate; a value head's if unset.")
        ] = None,
        full_rank_decay: Annotated[bool, Field(description="Project the decay by one matrix.")] = False,
        full_rank_gate: Annotated[bool, Field(description="Project the gate by one matrix.")] = False,
        decay_lower_bound: Annotated[
            float | None,
            Field(ge=-1000, le=-1e-6, description="Lower bound of the log decay, by a sigmoid; no bound if unset."),
        ] = None,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        super().__init__(dim, norm_eps=norm_eps, **options)
        if gate_rank is not None and full_rank_decay and full_rank_gate:
            raise ValueError(
                f"gate_rank = {gate_rank} has no effect with full_rank_decay and full_rank_gate; leave it out."
            )
        gate_rank = gate_rank or self.value_dim
        key_width, value_width = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        self.decay_proj = ColumnLinear(dim, key_width) if full_rank_decay else LowRank(dim, gate_rank, key_width)
        self.decay: DecayGate
        if decay_lower_bound is None:
            self.decay = DecayGate(self.num_heads, self.key_dim, rates=(1.0, 16.0))
        else:
            self.decay = BoundedDecayGate(self.num_heads, self.key_dim, decay_lower_bound)
        self.gate_proj = ColumnLinear(dim, value_width) if full_rank_gate else LowRank(dim, gate_rank, value_width)
        self.norm = GatedRMSNorm(self.value_dim, norm_eps, torch.sigmoid)

    def log_decay(self, x: Tensor, sequence: SequenceLayout) -> Tensor:
        return self.decay(sequence.project(self.decay_proj, x), with_step=False)[0]

    def normalize(self, o: Tensor, x: Tensor) -> Tensor:
        return self.norm(o, self.gate_proj(x).view_as(o))
