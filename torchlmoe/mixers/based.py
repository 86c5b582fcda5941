"""Based (arXiv 2402.18668): linear attention whose weights are the second-order Taylor expansion of softmax weights.

    o_t = sum_s w_ts v_s / sum_s w_ts          w_ts = 1 + z + z^2 / 2, z = q_t . k_s / sqrt(feature_dim)

The weights are inner products of `taylor_features` of narrow queries and keys: 153 features for a width of 16.
"""

from typing import Annotated

from pydantic import Field
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.feature_maps import taylor_features
from torchlmoe.layers.normalized_recurrence import recur_normalized
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.recurrent import RecurrentMixer
from torchlmoe.mixers.widths import NumHeads, width_of_heads
from torchlmoe.options import NormEps


class Based(RecurrentMixer):
    def __init__(
        self,
        dim: int,
        *,
        num_heads: NumHeads,
        head_dim: Annotated[
            int | None, Field(ge=1, description="Width of a value head; dim / num_heads if unset.")
        ] = None,
        feature_dim: Annotated[int, Field(ge=1, description="Width of a query or key before its feature map.")] = 16,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        width = width_of_heads(dim, num_heads, head_dim)
        super().__init__(dim, num_heads * feature_dim, width, num_heads=num_heads, **options)
        self.feature_dim, self.normalizer_eps = feature_dim, norm_eps
        self.key_dim = 1 + feature_dim + feature_dim * (feature_dim + 1) // 2
        self.value_dim += 1  # the sum of the weights

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        q, k, v = self.project(x, sequence=sequence)
        q, k = self.features(q), self.features(k)
        o = recur_normalized(
            self.recurrence, q, k, v.to(q.dtype), normalizer_eps=self.normalizer_eps, sequence=sequence, cache=cache
        )
        return self.o_proj(o.flatten(2).to(x.dtype))

    def features(self, x: Tensor) -> Tensor:
        """Heads of q or k [..., feature_dim] -> [..., key_dim]."""
        return taylor_features(x * self.feature_dim**-0.25)
