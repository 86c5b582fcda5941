"""Kimi Delta Attention (KDA, arXiv 2510.26692): the delta rule with a decay per key channel, and an output gate.

    S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T
    g_t = -exp(A_log) softplus(W_f2 W_f1 x_t + dt_bias)      A_log per head, dt_bias per channel
    y_t = W_o (RMSNorm(o_t) * sigmoid(W_g2 W_g1 x_t))

The projections of decay and gate have rank `gate_rank`. All else as in DeltaNet; equals the layer of Kimi-Linear.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from torchlmoe.layers.decay_gate import DecayGate
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
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        super().__init__(dim, norm_eps=norm_eps, **options)
        gate_rank = gate_rank or self.value_dim
        self.decay_proj = LowRank(dim, gate_rank, self.num_heads * self.key_dim)
        self.decay = DecayGate(self.num_heads, self.key_dim, rates=(1.0, 16.0))
        self.gate_proj = LowRank(dim, gate_rank, self.num_heads * self.value_dim)
        self.norm = GatedRMSNorm(self.value_dim, norm_eps, torch.sigmoid)

    def log_decay(self, x: Tensor, sequence: SequenceLayout) -> Tensor:
        return self.decay(sequence.project(self.decay_proj, x), with_step=False)[0]

    def normalize(self, o: Tensor, x: Tensor) -> Tensor:
        return self.norm(o, self.gate_proj(x).view_as(o))
