"""Gated slot attention (arXiv 2409.07146): softmax attention over a fixed number of slots.

    K_t = K_{t-1} diag(alpha_t) + k_t (1 - alpha_t)^T          alpha_t = sigmoid(W_f x_t + b)^(1 / gate_normalizer)
    V_t = diag(alpha_t) V_{t-1} + (1 - alpha_t) v_t^T          o_t = V_t^T softmax(K_t^T q_t)
    y_t = W_o RMSNorm(silu(o_t))                               q, k, v with SiLU; alpha per head and slot

The recurrence runs twice. The first run, with its decay on the value side, computes each token's scores of the slots.
After the softmax they are the queries of the second run.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.biased_decay import LogSigmoidDecay
from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.layers.norms import RMSNorm
from torchlmoe.layers.recurrence import LinearRecurrence, recur
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.base import scaled_width
from torchlmoe.mixers.recurrent import RecurrentMixer
from torchlmoe.mixers.widths import ExpandK, ExpandV, HeadDim, NumHeads, width_of_heads
from torchlmoe.ops.linear_recurrence import recurrence_flops_per_token
from torchlmoe.options import NormEps


class GatedSlotAttention(RecurrentMixer):
    decays = True

    def __init__(
        self,
        dim: int,
        *,
        num_heads: NumHeads,
        head_dim: HeadDim = None,
        expand_k: ExpandK = 1.0,
        expand_v: ExpandV = 1.0,
        num_slots: Annotated[
            int | None, Field(ge=1, description="Slots of a head; a key head's width if unset.")
        ] = None,
        gate_normalizer: Annotated[float, Field(ge=1e-3, le=1e4, description="Divides the log decay.")] = 8.0,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        width = width_of_heads(dim, num_heads, head_dim)
        key_width, value_width = scaled_width(width, expand_k), scaled_width(width, expand_v)
        super().__init__(dim, key_width, value_width, num_heads=num_heads, **options)
        self.head_dim, self.key_dim = self.key_dim, num_slots or self.key_dim  # the second pass's keys are the slots
        self.slot_proj = ColumnLinear(dim, self.num_heads * self.key_dim)
        self.decay = LogSigmoidDecay(self.num_heads * self.key_dim, gate_normalizer)
        self.slot_scores = LinearRecurrence(self.backend)
        self.norm = RMSNorm(value_width, norm_eps, across_heads=True)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        q, k, v = (F.silu(part) for part in self.project(x, sequence=sequence))
        log_decay = self.decay(self.slot_proj(x)).unflatten(-1, (-1, self.key_dim))
        write = -torch.expm1(log_decay)  # 1 - alpha
        scores = recur(
            self.slot_scores,
            q,
            k,
            write,
            value_log_decay=log_decay,
            sequence=sequence,
            cache=None if cache is None else cache["slot_scores"],
        )
        o = recur(self.recurrence, scores.softmax(-1), write, v, log_decay=log_decay, sequence=sequence, cache=cache)
        return self.o_proj(self.norm(F.silu(o).flatten(2)))

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        cache = super().init_cache(batch_size, max_length, dtype, device)
        keys = cache["state"].new_zeros(batch_size, self.num_heads, self.head_dim, self.key_dim)
        cache["slot_scores"] = TensorDict({"state": keys}, batch_size=[batch_size])
        return cache

    def flops_per_token(self, seq_len: int) -> int:
        scores = recurrence_flops_per_token(self.num_heads, self.head_dim, self.key_dim, decay=True)
        return super().flops_per_token(seq_len) + scores
