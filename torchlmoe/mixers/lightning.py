"""Lightning attention (arXiv 2401.04658, 2501.08313): a constant decay per head, slower in later layers.

    S_t = exp(-s_h f) S_{t-1} + k_t v_t^T          s_h = 2^(-8 h / heads), h from 1; f from 1 in the first layer to 0
    y_t = W_o (RMSNorm(o_t) * sigmoid(W_g x_t))    q, k, v = silu of projections; the norm is over all heads

Equals the layer of transformers' MiniMax.
"""

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.layers.norms import GatedRMSNorm
from torchlmoe.layers.recurrence import recur
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.base import Place
from torchlmoe.mixers.recurrent import RecurrentMixer
from torchlmoe.mixers.widths import HeadDim, NumHeads, width_of_heads
from torchlmoe.options import NormEps


class LightningAttention(RecurrentMixer):
    decays = True

    def __init__(
        self,
        dim: int,
        place: Place | None = None,
        *,
        num_heads: NumHeads,
        head_dim: HeadDim = None,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        width = width_of_heads(dim, num_heads, head_dim)
        super().__init__(dim, width, width, num_heads=num_heads, **options)
        place = place or Place()
        # As published, with a little of the decay left in the last layer.
        self.factor = 1 - place.index / (place.num_layers - 1 + 1e-5) + 1e-5
        self.gate_proj = ColumnLinear(dim, width)
        self.norm = GatedRMSNorm(width, norm_eps, torch.sigmoid, across_heads=True)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        q, k, v = (F.silu(heads) for heads in self.project(x, sequence=sequence))
        head = 1 + self.head_numbers(x.device)
        log_decay = -self.factor * torch.exp2(-8 * head / self.num_heads)
        o = recur(self.recurrence, q, k, v, log_decay=log_decay, sequence=sequence, cache=cache)
        return self.o_proj(self.norm(o.flatten(2), self.gate_proj(x)))
