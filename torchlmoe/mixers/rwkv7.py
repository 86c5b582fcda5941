"""RWKV-7, "Goose" (arXiv 2503.14456): a decay per key channel, and a generalized delta rule.

    S_t = (diag(exp g_t) - (a_t * c_t) c_t^T) S_{t-1} + k_t v_t^T         o_t = S_t^T r_t
    g_t = -exp(-1/2) sigmoid(w_0 + W_2 tanh(W_1 x^w_t))                   a_t = sigmoid(a_0 + A_2 A_1 x^a_t)
    c_t = k'_t * xi, of unit length                                       k_t = k'_t * (1 + (a_t - 1) * alpha)
    v_t = v'_t + (v^first_t - v'_t) * sigmoid(v_0 + V_2 V_1 x^v_t)        r_t, k'_t, v'_t linear in x^r_t, x^k_t, x^v_t
    y_t = W_o ((LayerNorm_per_head(o_t) + (r_t . (k_t * rho)) v_t) * G_2 sigmoid(G_1 x^g_t))

x^i_t = x_t + (x_{t-1} - x_t) * mu_i. v^first is v' of the model's first RWKV-7 layer, which passes it to the others.
The recurrence has erase_key = a * c and erase = c exp(-g), because it decays S first. Vectors and low-rank
projections are initialized as in the authors' code, square projections as in the rest of the model.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.biased_decay import BiasedDecay
from torchlmoe.layers.group_norms import HeadNorm
from torchlmoe.layers.initialization import constant_, copy_, orthogonal_
from torchlmoe.layers.low_rank import LowRank
from torchlmoe.layers.norms import l2_norm
from torchlmoe.layers.recurrence import recur
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.layers.token_shift import TokenMix, TokenShift
from torchlmoe.mixers.base import Place
from torchlmoe.mixers.recurrent import RecurrentMixer
from torchlmoe.mixers.widths import HeadDim, NumHeads, width_of_heads

HeadNormEps = Annotated[
    float, Field(ge=1e-12, le=0.1, description="Added under the root of the norm of a head, times head_dim.")
]
Rank = Annotated[int | None, Field(ge=1, description="Rank of a low-rank projection; grows with sqrt(dim) if unset.")]


class RWKV7(RecurrentMixer):
    decays = erases = True
    head_dims = dict.fromkeys(("rate_bias", "first_value_bias", "erase_scale", "rate_share", "bonus"), 0)

    def __init__(
        self,
        dim: int,
        place: Place = Place(),  # noqa: B008
        *,
        num_heads: NumHeads,
        head_dim: HeadDim = None,
        decay_rank: Rank = None,
        rate_rank: Rank = None,
        value_rank: Rank = None,
        gate_rank: Rank = None,
        head_norm_eps: HeadNormEps = 1e-5,
        **options,
    ):
        width = width_of_heads(dim, num_heads, head_dim)
        super().__init__(dim, width, width, num_heads=num_heads, **options)

        def rank(given: int | None, factor: float) -> int:
            return given or max(32, 32 * round(factor * dim**0.5 / 32))

        self.place, self.shared_width = place, width
        late = 1 - place.index / place.num_layers  # from 1 in the first layer to almost 0
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        self.token_shift = TokenShift(dim)
        self.mix = nn.ModuleDict({name: TokenMix(dim, power * late) for name, power in powers.items()})
        self.decay_proj = LowRank(dim, rank(decay_rank, 2.5), width, torch.tanh)
        self.decay = BiasedDecay(width, "sigmoid", rate=math.exp(-0.5))
        self.rate_proj = LowRank(dim, rank(rate_rank, 2.5), width)
        self.rate_bias = nn.Parameter(torch.empty(width))
        self.first_value_proj = None if place.first else LowRank(dim, rank(value_rank, 1.7), width)
        self.first_value_bias = None if place.first else nn.Parameter(torch.empty(width))
        self.gate_proj = LowRank(dim, rank(gate_rank, 5.0), width, torch.sigmoid)
        self.erase_scale = nn.Parameter(torch.empty(width))  # xi
        self.rate_share = nn.Parameter(torch.empty(width))  # alpha
        self.bonus = nn.Parameter(torch.empty(width))  # rho
        self.norm = HeadNorm(self.num_heads, self.value_dim, eps=head_norm_eps * self.value_dim)

    def init_weights(self) -> None:
        super().init_weights()
        depth = self.place.index / max(self.place.num_layers - 1, 1)  # from 0 to 1
        channel = torch.arange(len(self.bonus), dtype=torch.float32)
        fraction = channel / max(len(channel) - 1, 1)
        in_head = 2 * (channel % self.key_dim) / max(self.key_dim - 1, 1) - 1  # from -1 to 1 in each head
        zigzag, slope = in_head * in_head.abs(), fraction - 0.5
        copy_(self.decay.bias, -5.5 + 6 * fraction ** (1 + depth**0.3) + 2.5 * zigzag)
        copy_(self.rate_bias, -0.19 + 0.3 * zigzag + 0.4 * slope)
        if self.first_value_bias is not None:
            copy_(self.first_value_bias, 0.73 - 0.4 * slope)
        copy_(self.erase_scale, 0.71 - 0.1 * slope)
        constant_(self.rate_share, 1.02)
        constant_(self.bonus, -0.04)
        for projection in self.children():
            if isinstance(projection, LowRank):
                constant_(projection.down_proj.weight, 0.0)
                orthogonal_(projection.up_proj.weight, 0.1)

    def forward(  # type: ignore[override]  # with `shared` it returns a pair, see `Mixer.shared_width`
        self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None, shared: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        previous = self.token_shift(x, sequence=sequence, cache=None if cache is None else cache["token_shift"])
        difference = previous - x
        x_r, x_w, x_k, x_v, x_a, x_g = (mix(x, difference) for mix in self.mix.values())
        r, k, v = self.q_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        if self.first_value_proj is None:
            first_value = v
        elif shared is None:
            raise ValueError("An RWKV-7 layer after the first needs `shared`, the values of the first layer.")
        else:
            first_value = shared
            share = (self.first_value_proj(x_v) + self.first_value_bias).sigmoid()
            v = torch.lerp(v, shared.to(v.dtype), share.to(v.dtype))  # of one dtype under autocast, too
        log_decay = self.decay(self.decay_proj(x_w))
        rate = (self.rate_proj(x_a) + self.rate_bias).sigmoid()
        heads = (-1, self.key_dim)
        unit = l2_norm((k * self.erase_scale).unflatten(-1, heads), eps=1e-12)
        k = (k * (1 + (rate - 1) * self.rate_share)).unflatten(-1, heads)
        r, v, rate, log_decay = (part.unflatten(-1, heads) for part in (r, v, rate, log_decay))
        o = recur(
            self.recurrence,
            r,
            k,
            v,
            log_decay=log_decay,
            erase=unit * (-log_decay).exp(),  # at most e^0.61
            erase_key=unit * rate,
            sequence=sequence,
            cache=cache,
        )
        own = (r * k * self.bonus.view(heads)).sum(-1, keepdim=True) * v
        y = self.o_proj((self.norm(o) + own.flatten(2)) * self.gate_proj(x_g))
        return y if shared is None else (y, first_value)
