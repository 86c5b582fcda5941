"""Titans' neural memory (arXiv 2501.00663) in its linear form: fast weights with momentum and forgetting.

    S_t = eta_t S_{t-1} - theta_t dl_t/dM at the mini-batch's first M           l_t(M) = |f(k_t; M) - v_t|^2 / 2
    M_t = (1 - alpha_t) M_{t-1} + S_t                                           f(x; M) = x + LN(M^T x)
    y_t = W_o (RMSNorm(f(q_t; M_t)) * silu(W_g x_t))

q, k and v pass a short convolution with SiLU; q and k have unit length. theta_t is max_learning_rate * sigmoid(W x_t).
The momentum eta_t and the retention 1 - alpha_t are sigmoids of projections; the bias of the latter starts at 5, for a
memory of about 150 tokens. The layer norm and the residual in f are those of TTT, and so are the mini-batches, which
the paper adopts.
"""

from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.biased_decay import LogSigmoidDecay
from torchlmoe.layers.initialization import constant_
from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.layers.norms import GatedRMSNorm, l2_norm
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.fast_weights import FastWeightMixer
from torchlmoe.mixers.recurrent import ConvolvedMixer
from torchlmoe.options import NormEps


class Titans(FastWeightMixer, ConvolvedMixer):
    decays = True
    has_momentum = True
    start_std = 1.0  # of M^T k, for a k of unit length

    def __init__(self, dim: int, *, norm_eps: NormEps = 1e-6, **options):
        super().__init__(dim, norm_eps=norm_eps, **options)
        self.momentum_proj = ColumnLinear(dim, self.num_heads)
        self.momentum = LogSigmoidDecay(self.num_heads)
        self.forget_proj = ColumnLinear(dim, self.num_heads)
        self.decay = LogSigmoidDecay(self.num_heads)
        self.gate_proj = ColumnLinear(dim, self.num_heads * self.value_dim)
        self.norm = GatedRMSNorm(self.value_dim, norm_eps)

    def init_weights(self) -> None:
        super().init_weights()
        constant_(self.decay.bias, 5.0)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        q, k, v = self.project(x, sequence=sequence, cache=cache)
        o = self.read(
            l2_norm(q),
            l2_norm(k),
            v,
            learning_rate=self.learning_rate(x),
            log_decay=self.decay(self.forget_proj(x)),
            log_momentum=self.momentum(self.momentum_proj(x)),
            sequence=sequence,
            cache=cache,
        )
        return self.o_proj(self.norm(o, self.gate_proj(x).view_as(o)).flatten(2))
