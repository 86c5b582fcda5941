"""ReBased (arXiv 2402.10644): linear attention with a learned quadratic kernel.

    o_t = sum_s w_ts v_s / sum_s w_ts          w_ts = (phi(q_t) . phi(k_s))^2 / feature_dim, phi = LayerNorm with affine

The affine part moves the parabola, so that a weight can be zero. The rest is as in Based.

A weight near zero is the remainder of features that cancel, so its rounding error is that of features of size one. If
all weights of a token are small, as may happen at the start of a document, this error would matter. So features
and their recurrence use the next wider dtype than x: float32 for bfloat16, float64 for float32.
"""

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.group_norms import LayerNorm
from torchlmoe.mixers.based import Based
from torchlmoe.ops.pair_products import pair_products
from torchlmoe.options import NormEps

NORMALIZER_EPS = 1e-5  # the sum of the weights is rounded by up to 1e-6 in float32


def wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else torch.float64


class FeatureNorm(LayerNorm):
    """Layer norm whose result is in the wider dtype."""

    float32_island = True

    def forward(self, x: Tensor) -> Tensor:
        dtype = wider(x.dtype)
        return F.layer_norm(x.to(dtype), x.shape[-1:], self.weight.to(dtype), self.bias.to(dtype), self.eps)


class ReBased(Based):
    def __init__(self, dim: int, *, norm_eps: NormEps = 1e-6, **options):
        super().__init__(dim, norm_eps=norm_eps, **options)
        if self.feature_dim < 2:
            raise ValueError(f"feature_dim = {self.feature_dim} must be at least 2: a normalised channel is constant.")
        self.normalizer_eps = NORMALIZER_EPS
        self.key_dim = self.feature_dim * (self.feature_dim + 1) // 2
        self.feature_norm = FeatureNorm(self.feature_dim, norm_eps)

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        """The same as in `RecurrentMixer`, in the wider dtype."""
        return super().init_cache(batch_size, max_length, wider(dtype), device)

    def features(self, x: Tensor) -> Tensor:
        return pair_products(self.feature_norm(x) * self.feature_dim**-0.25)
