"""ReBased (arXiv 2402.10644): linear attention with a learned quadratic kernel.

    o_t = sum_s w_ts v_s / sum_s w_ts          w_ts = (phi(q_t) . phi(k_s))^2 / feature_dim, phi = LayerNorm with affine

The affine part lets the parabola move, so that a weight can be zero. All else as in Based.
"""

from torch import Tensor

from torchlmoe.layers.feature_maps import pair_products
from torchlmoe.layers.norms import LayerNorm
from torchlmoe.mixers.base import NormEps
from torchlmoe.mixers.based import Based


class ReBased(Based):
    def __init__(self, dim: int, *, norm_eps: NormEps = 1e-6, **options):
        super().__init__(dim, norm_eps=norm_eps, **options)
        self.key_dim = self.feature_dim * (self.feature_dim + 1) // 2
        self.feature_norm = LayerNorm(self.feature_dim, norm_eps)

    def features(self, x: Tensor) -> Tensor:
        return pair_products(self.feature_norm(x) * self.feature_dim**-0.25)
