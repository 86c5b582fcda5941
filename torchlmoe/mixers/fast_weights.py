"""The common part of TTT and Titans: per head, a small model that is trained on the sequence while it reads it.

    f(x; W) = x + LN(W^T x)          W_t: a step down the gradient of |f(k_t; W) - v_t|^2 / 2          o_t = f(q_t; W_t)

`ops.online_gradient` computes the steps. The initial W and the layer norm of each head are learned parameters.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.initialization import constant_, normal_
from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.layers.online_gradient import OnlineGradient
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.recurrent import RecurrentMixer
from torchlmoe.mixers.widths import HeadDim, NumHeads, width_of_heads
from torchlmoe.ops.online_gradient import online_gradient_flops_per_token
from torchlmoe.options import NormEps


class FastWeights(nn.Module):
    """The initial weights [H, K, V] (with a bias [H, K + 1, V], the bias in the last row) and the layer norm's weight
    and bias [H * V], in at least float32.
    """

    float32_island = True
    head_dims = {"weight": 0, "bias": 0, "norm_weight": 0, "norm_bias": 0}

    def __init__(self, num_heads: int, head_dim: int, bias: bool, init_std: float):
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(num_heads * head_dim)) if bias else None
        self.norm_weight = nn.Parameter(torch.empty(num_heads * head_dim))
        self.norm_bias = nn.Parameter(torch.empty(num_heads * head_dim))

    def init_weights(self) -> None:
        normal_(self.weight, self.init_std)
        constant_(self.norm_weight, 1.0)
        for bias in (self.bias, self.norm_bias):
            if bias is not None:
                constant_(bias, 0.0)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, norm_weight, norm_bias = self.weight.to(dtype), self.norm_weight.to(dtype), self.norm_bias.to(dtype)
        if self.bias is not None:
            weight = torch.cat([weight, self.bias.to(dtype).view(len(weight), 1, -1)], 1)
        return weight, norm_weight, norm_bias


class FastWeightMixer(RecurrentMixer):
    """Projections and fast weights. A subclass sets options by class attributes, and adds gates and norms."""

    has_bias = False
    has_momentum = False
    scales_steps = False
    start_std = 0.02

    def __init__(
        self,
        dim: int,
        *,
        num_heads: NumHeads,
        head_dim: HeadDim = None,
        mini_batch_size: Annotated[
            int, Field(ge=1, description="Tokens whose gradients are taken at the same weights.")
        ] = 16,
        max_learning_rate: Annotated[
            float, Field(ge=1e-6, le=100, description="Largest learning rate of the fast weights.")
        ] = 1.0,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        width = width_of_heads(dim, num_heads, head_dim)
        super().__init__(dim, width, width, recurrence=OnlineGradient, num_heads=num_heads, **options)
        self.mini_batch_size, self.max_learning_rate, self.norm_eps = mini_batch_size, max_learning_rate, norm_eps
        self.learning_rate_proj = ColumnLinear(dim, self.num_heads)
        self.fast_weights = FastWeights(self.num_heads, self.key_dim, self.has_bias, self.start_std)

    def learning_rate(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """x [B, T, dim] -> max_learning_rate * sigmoid(W x + bias), [B, T, heads], in at least float32."""
        logit = self.learning_rate_proj(x)
        return self.max_learning_rate * (logit.to(torch.promote_types(logit.dtype, torch.float32)) + bias).sigmoid()

    def read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        sequence: SequenceLayout,
        cache: TensorDict | None,
        **terms: Tensor,
    ) -> Tensor:
        """q, k, v [B, T, heads, K] -> f(q), like q; terms: `learning_rate` and the others of `online_gradient`."""
        weight, norm_weight, norm_bias = self.fast_weights()
        norm_weight, norm_bias = (x.view(-1, self.value_dim) for x in (norm_weight, norm_bias))
        inputs, target = q.to(weight.dtype), v.to(weight.dtype) - k
        if self.has_bias:
            q, k = F.pad(q, (0, 1), value=1.0), F.pad(k, (0, 1), value=1.0)
        parts = [weight, weight, torch.zeros_like(weight)]
        state = torch.stack(parts if self.has_momentum else parts[:2], 1)
        options = dict(
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=self.norm_eps,
            mini_batch_size=self.mini_batch_size,
        )
        if cache is None:
            bounds = sequence.cu_seqlens
            num_documents = q.shape[0] if bounds is None else bounds.shape[0] - 1
            state = state.expand(num_documents, *state.shape)
            o, _ = self.recurrence(q, k, target, initial_state=state, cu_seqlens=bounds, **terms, **options)
        else:
            place = sequence.positions[:, 0]
            state = torch.where((place == 0).view(-1, 1, 1, 1, 1), state, cache["state"])
            offset = place % self.mini_batch_size
            o, state = self.recurrence(
                q, k, target, initial_state=state, offset=offset, output_final_state=True, **terms, **options
            )
            cache["state"].copy_(state)
        o = F.layer_norm(o, o.shape[-1:], eps=self.norm_eps) * norm_weight + norm_bias
        return (inputs + o).to(v.dtype)

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        """`state` [batch, num_heads, 2 or 3, K, V] in at least float32, and caches of convolutions."""
        cache = super().init_cache(batch_size, max_length, dtype, device)
        parts, key_dim = 2 + self.has_momentum, self.key_dim + self.has_bias
        cache["state"] = cache["state"].new_zeros(batch_size, self.num_heads, parts, key_dim, self.value_dim)
        return cache

    def recurrence_flops(self) -> int:
        return online_gradient_flops_per_token(
            self.num_heads,
            self.key_dim + self.has_bias,
            self.value_dim,
            decay=self.decays,
            momentum=self.has_momentum,
            step_scale=self.scales_steps,
        )
