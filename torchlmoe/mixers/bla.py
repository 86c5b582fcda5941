"""Basic linear attention (BLA): o_t = S_t^T phi(q_t), S_t = S_{t-1} + phi(k_t) v_t^T (arXiv 2006.16236, 2503.05447).

The outputs are normalized per head by RMS, as in arXiv 2210.10340, or with `normalizer` by the sum of the attention
weights, as in the first of the papers. The sum is computed by a column of ones on v.
"""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.normalized_recurrence import recur_normalized
from torchlmoe.layers.norms import RMSNorm
from torchlmoe.layers.recurrence import recur
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.recurrent import RecurrentMixer
from torchlmoe.mixers.widths import HeadDim, NumHeads, width_of_heads
from torchlmoe.options import NormEps

FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "silu": F.silu,
    "softmax": lambda x: x.softmax(-1),
}


class BasicLinearAttention(RecurrentMixer):
    def __init__(
        self,
        dim: int,
        *,
        num_heads: NumHeads,
        head_dim: HeadDim = None,
        feature_map: Annotated[
            Literal["identity", "elu", "relu", "silu", "softmax"], Field(description="phi, applied to q and k.")
        ] = "silu",
        normalizer: Annotated[bool, Field(description="Divide by the sum of the attention weights.")] = False,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        if normalizer and feature_map in ("identity", "silu"):
            raise ValueError(
                f"normalizer = true divides by a sum that feature_map = {feature_map!r} can make zero or negative; "
                "use 'elu', 'relu' or 'softmax'."
            )
        width = width_of_heads(dim, num_heads, head_dim)
        super().__init__(dim, width, width, num_heads=num_heads, **options)
        self.feature_map, self.normalizer, self.norm_eps = feature_map, normalizer, norm_eps
        self.norm = RMSNorm(self.value_dim, norm_eps)
        self.value_dim += normalizer  # the sum of the weights

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        q, k, v = self.project(x, sequence=sequence)
        phi = FEATURE_MAPS[self.feature_map]
        options = dict(scale=self.key_dim**-0.5, sequence=sequence, cache=cache)
        if self.normalizer:
            o = recur_normalized(self.recurrence, phi(q), phi(k), v, normalizer_eps=self.norm_eps, **options)
        else:
            o = recur(self.recurrence, phi(q), phi(k), v, **options)
        return self.o_proj(self.norm(o).flatten(2))
