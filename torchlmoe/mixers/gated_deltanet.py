"""Gated DeltaNet (arXiv 2412.06464): the delta rule with one decay per head and token, and an output gate.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T       g_t = -exp(A_log) softplus(W_a x_t + dt_bias)
    y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))

The rest is as in DeltaNet. With `num_key_heads` below `num_heads` several value heads share a key head, as in
Qwen3-Next. Equals the layer of Qwen3-Next.
"""

from torch import Tensor

from torchlmoe.layers.decay_gate import DecayGate
from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.layers.norms import GatedRMSNorm
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.deltanet import DeltaNet
from torchlmoe.options import NormEps


class GatedDeltaNet(DeltaNet):
    decays = True

    def __init__(self, dim: int, *, norm_eps: NormEps = 1e-6, **options):
        super().__init__(dim, norm_eps=norm_eps, **options)
        self.a_proj = ColumnLinear(dim, self.num_heads)
        self.decay = DecayGate(self.num_heads)
        self.gate_proj = ColumnLinear(dim, self.num_heads * self.value_dim)
        self.norm = GatedRMSNorm(self.value_dim, norm_eps)

    def log_decay(self, x: Tensor, sequence: SequenceLayout) -> Tensor:
        return self.decay(sequence.project(self.a_proj, x), with_step=False)[0]

    def normalize(self, o: Tensor, x: Tensor) -> Tensor:
        return self.norm(o, self.gate_proj(x).view_as(o))
