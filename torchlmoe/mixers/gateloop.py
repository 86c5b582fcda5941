"""GateLoop (arXiv 2311.01927): a complex decay per key channel, magnitude and phase from the input.

    S_t = diag(exp(g_t + i theta_t)) S_{t-1} + k_t v_t^T          o_t = Re(conj(S_t)^T q_t)
    g_t = logsigmoid(W_a x_t + b), theta_t = W_p x_t              y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))

Channel i of q and k is the real part and channel i + K / 2 the imaginary part of a complex channel. Let Phi_t be the
sum of theta over the document up to t. Then S_t = exp(i Phi_t) S'_t, where S'_t decays by exp(g_t) only and adds
exp(-i Phi_t) k_t. So q and k are turned by Phi_t, as by rotary phases, and the recurrence is real.

Phi itself is computed by the recurrence, with keys and queries of one, so it restarts at documents, continues in
decoding and can be split over ranks.
"""

import math

import torch
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.layers.biased_decay import LogSigmoidDecay
from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.layers.norms import GatedRMSNorm
from torchlmoe.layers.recurrence import LinearRecurrence, recur
from torchlmoe.layers.rotary import check_rotary_dim, rotate
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.base import scaled_width
from torchlmoe.mixers.recurrent import RecurrentMixer
from torchlmoe.mixers.widths import ExpandK, ExpandV, HeadDim, NumHeads, width_of_heads
from torchlmoe.ops.linear_recurrence import recurrence_flops_per_token
from torchlmoe.options import NormEps


class GateLoop(RecurrentMixer):
    decays = True

    def __init__(
        self,
        dim: int,
        *,
        num_heads: NumHeads,
        head_dim: HeadDim = None,
        expand_k: ExpandK = 1.0,
        expand_v: ExpandV = 1.0,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        width = width_of_heads(dim, num_heads, head_dim)
        key_width, value_width = scaled_width(width, expand_k), scaled_width(width, expand_v)
        super().__init__(dim, key_width, value_width, num_heads=num_heads, **options)
        check_rotary_dim(self.key_dim, f"a width of {key_width} in num_heads = {num_heads} heads")
        self.decay_proj = ColumnLinear(dim, key_width // 2)
        self.decay = LogSigmoidDecay(key_width // 2)
        self.phase_proj = ColumnLinear(dim, key_width // 2)
        self.phase_sum = LinearRecurrence(self.backend)
        self.gate_proj = ColumnLinear(dim, value_width)
        self.norm = GatedRMSNorm(self.value_dim, norm_eps)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        q, k, v = self.project(x, sequence=sequence)
        phase = self._phase(x, sequence, None if cache is None else cache["phase_sum"])
        log_decay = self.decay(self.decay_proj(x)).unflatten(-1, (-1, self.key_dim // 2))
        o = recur(
            self.recurrence,
            rotate(q, phase),
            rotate(k, phase),
            v,
            log_decay=torch.cat([log_decay, log_decay], -1),
            scale=self.key_dim**-0.5,
            sequence=sequence,
            cache=cache,
        )
        return self.o_proj(self.norm(o, self.gate_proj(x).view_as(o)).flatten(2))

    def _phase(self, x: Tensor, sequence: SequenceLayout, cache: TensorDict | None) -> tuple[Tensor, Tensor]:
        """cos and sin of Phi, each [B, T, heads, K / 2] in at least float32."""
        # The sum is float64: over a long document it would lose digits in float32. Its remainder does not.
        step = self.phase_proj(x).double().unflatten(-1, (-1, self.key_dim // 2))
        one = torch.ones_like(step[:, :, :1, :1])
        phase = recur(self.phase_sum, one, one, step, sequence=sequence, cache=cache).remainder(2 * math.pi)
        phase = phase.to(torch.promote_types(x.dtype, torch.float32))
        return phase.cos(), phase.sin()

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        cache = super().init_cache(batch_size, max_length, dtype, device)
        phase = torch.zeros(batch_size, self.num_heads, 1, self.key_dim // 2, dtype=torch.float64, device=device)
        cache["phase_sum"] = TensorDict({"state": phase}, batch_size=[batch_size])
        return cache

    def flops_per_token(self, seq_len: int) -> int:
        return super().flops_per_token(seq_len) + recurrence_flops_per_token(self.num_heads, 1, self.key_dim // 2)
