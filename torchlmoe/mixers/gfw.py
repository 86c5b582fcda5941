"""Gated (decaying) fast weights (arXiv 2210.04243): linear attention with a gate of rank one on the state.

    S_t = G_t * S_{t-1} + k_t v_t^T          G_t = sigmoid(W_f x_t + b_f) sigmoid(W_z x_t + b_z)^T per head
    y_t = W_o RMSNorm(S_t^T q_t)

So the state decays on the key side by the one and on the value side by the other factor. There is no feature map. The
biases start at 5, for a state that lasts about 75 tokens. The norm, per head, is ours: the paper starts from trained
softmax attention.
"""

from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.decay_gate import LogSigmoidDecay
from torchlmoe.layers.initialization import constant_
from torchlmoe.layers.linear import Linear
from torchlmoe.layers.norms import RMSNorm
from torchlmoe.layers.recurrence import recur
from torchlmoe.layers.sequence import Sequence
from torchlmoe.mixers.recurrent import ExpandK, ExpandV, RecurrentMixer


class GatedFastWeights(RecurrentMixer):
    decays = True

    def __init__(
        self, dim: int, *, expand_k: ExpandK = 1.0, expand_v: ExpandV = 1.0, norm_eps: float = 1e-6, **options
    ):
        key_width, value_width = int(dim * expand_k), int(dim * expand_v)
        super().__init__(dim, key_width, value_width, **options)
        self.key_gate_proj = Linear(dim, key_width)
        self.key_decay = LogSigmoidDecay(key_width)
        self.value_gate_proj = Linear(dim, value_width)
        self.value_decay = LogSigmoidDecay(value_width)
        self.norm = RMSNorm(self.value_dim, norm_eps)

    def init_weights(self) -> None:
        super().init_weights()
        constant_(self.key_decay.bias, 5.0)
        constant_(self.value_decay.bias, 5.0)

    def forward(self, x: Tensor, *, sequence: Sequence, cache: TensorDict | None = None) -> Tensor:
        q, k, v = self.project(x, sequence=sequence)
        o = recur(
            self.recurrence,
            q,
            k,
            v,
            log_decay=self.key_decay(self.key_gate_proj(x)).view_as(k),
            value_log_decay=self.value_decay(self.value_gate_proj(x)).view_as(v),
            scale=self.key_dim**-0.5,
            sequence=sequence,
            cache=cache,
        )
        return self.o_proj(self.norm(o).flatten(2))
