"""HGRN2 (arXiv 2404.07904): a forget gate per key channel, whose complement is the key.

    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T          f_t = b + (1 - b) sigmoid(W_f x_t)
    y_t = W_o RMSNorm(S_t^T silu(W_q x_t))             the norm is over all heads

The lower bounds b rise from layer to layer, from zero: b_i = p_1 + ... + p_i, where p is the softmax over the layers of
one parameter of the model, [layers, key width]. So later layers forget more slowly.
"""

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.initialization import constant_
from torchlmoe.layers.norms import RMSNorm
from torchlmoe.layers.recurrence import recur
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.base import scaled_width
from torchlmoe.mixers.recurrent import RecurrentMixer
from torchlmoe.mixers.widths import ExpandK, HeadDim, NumHeads, width_of_heads
from torchlmoe.options import NormEps


class LowerBounds(nn.Module):
    """-> the bounds of every layer, [num_layers, width] in at least float32; those of the first are zero."""

    float32_island = True

    head_dims: dict[str, int] = {}  # rows are layers; a rank uses its heads' part of the result

    def __init__(self, num_layers: int, width: int):
        super().__init__()
        self.num_layers = num_layers
        self.weight = nn.Parameter(torch.empty(num_layers * width))  # a vector, which has no weight decay

    def init_weights(self) -> None:
        constant_(self.weight, 0.0)

    def forward(self) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        share = self.weight.to(dtype).view(self.num_layers, -1).softmax(0)
        return F.pad(share[1:].cumsum(0), (0, 0, 1, 0))


class HGRN2(RecurrentMixer):
    decays = True

    def __init__(
        self,
        dim: int,
        *,
        num_heads: NumHeads,
        head_dim: HeadDim = None,
        expand_k: ExpandK = 1.0,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        width = width_of_heads(dim, num_heads, head_dim)
        super().__init__(dim, scaled_width(width, expand_k), width, num_heads=num_heads, **options)
        self.norm = RMSNorm(width, norm_eps, across_heads=True)

    def common(self, num_layers: int) -> LowerBounds:
        return LowerBounds(num_layers, self.num_heads * self.key_dim)

    def forward(
        self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None, common: Tensor | None = None
    ) -> Tensor:
        q, f, v = self.project(x, sequence=sequence)
        log_forget = F.logsigmoid(f.to(torch.promote_types(f.dtype, torch.float32)))
        if common is not None:
            part, num_parts = self.part_of_heads
            bound = common.chunk(num_parts)[part].view(-1, self.key_dim)
            limits = torch.finfo(bound.dtype)
            bound = bound.clamp(limits.tiny, 1 - limits.eps)  # log 0 has no gradient
            log_forget = torch.logaddexp(bound.log(), torch.log1p(-bound) + log_forget)
        o = recur(
            self.recurrence,
            F.silu(q),
            -torch.expm1(log_forget).to(x.dtype),
            v,
            log_decay=log_forget,
            scale=self.key_dim**-0.5,
            sequence=sequence,
            cache=cache,
        )
        return self.o_proj(self.norm(o.flatten(2)))
