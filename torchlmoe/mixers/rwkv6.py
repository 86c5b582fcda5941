"""RWKV-6, "Finch" (arXiv 2404.05892): a decay per key channel, and a bonus for the current token.

    o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t          S_t = diag(exp g_t) S_{t-1} + k_t v_t^T
    g_t = -exp(w_0 + W_2 tanh(W_1 x^w_t))              y_t = W_o (LayerNorm_per_head(o_t) * silu(W_g x^g_t))

r, k, v, the gate and the decay each use a separate mixture of the token and its predecessor, whose weights depend
on both: x^i_t = x_t + d_t * (mu_i + B_i tanh(A_i (x_t + d_t * mu_x))), d_t = x_{t-1} - x_t. Vectors and low-rank
projections are initialized as in the authors' code, square projections as in the rest of the model.
"""

from typing import Annotated

import torch
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.biased_decay import BiasedDecay
from torchlmoe.layers.group_norms import HeadNorm
from torchlmoe.layers.initialization import constant_, copy_, uniform_
from torchlmoe.layers.linear import ColumnLinear, Linear
from torchlmoe.layers.low_rank import LowRank
from torchlmoe.layers.recurrence import recur
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.layers.token_shift import TokenMix, TokenShift
from torchlmoe.mixers.base import Place
from torchlmoe.mixers.recurrent import RecurrentMixer
from torchlmoe.mixers.widths import HeadDim, NumHeads, width_of_heads


class RWKV6(RecurrentMixer):
    decays = True
    head_dims = {"bonus": 0}

    def __init__(
        self,
        dim: int,
        place: Place = Place(),  # noqa: B008
        *,
        num_heads: NumHeads,
        head_dim: HeadDim = None,
        mix_rank: Annotated[int, Field(ge=1, description="Rank of the mixture of a token and its predecessor.")] = 32,
        decay_rank: Annotated[int, Field(ge=1, description="Rank of the decay's projection.")] = 64,
        **options,
    ):
        width = width_of_heads(dim, num_heads, head_dim)
        super().__init__(dim, width, width, num_heads=num_heads, **options)
        self.depth = place.index / max(place.num_layers - 1, 1)  # from 0 to 1
        late = 1 - place.index / place.num_layers  # from 1 in the first layer to almost 0
        powers = {"r": late / 2, "k": late, "v": late, "g": late / 2, "w": late}
        self.token_shift = TokenShift(dim)
        self.mix_x = TokenMix(dim, late)
        self.mix_down_proj = Linear(dim, len(powers) * mix_rank)
        self.mix_up_proj = nn.ModuleDict({name: Linear(mix_rank, dim) for name in powers})
        self.mix = nn.ModuleDict(
            {name: TokenMix(dim, power, 0.3 * self.depth if name == "v" else 0.0) for name, power in powers.items()}
        )
        self.gate_proj = ColumnLinear(dim, width)
        self.decay_proj = LowRank(dim, decay_rank, width, torch.tanh)
        self.decay = BiasedDecay(width, "exp")
        self.bonus = nn.Parameter(torch.empty(width))
        self.norm = HeadNorm(self.num_heads, self.value_dim, eps=1e-5 * self.value_dim)

    def init_weights(self) -> None:
        super().init_weights()
        channel = torch.arange(len(self.bonus), dtype=torch.float32)
        fraction = channel / max(len(channel) - 1, 1)
        copy_(self.decay.bias, -6 + 5 * fraction ** (0.7 + 1.3 * self.depth))
        copy_(self.bonus, self.depth * (1 - fraction) + 0.1 * ((channel + 1) % 3 - 1))
        for down_proj in (self.mix_down_proj, self.decay_proj.down_proj):
            constant_(down_proj.weight, 0.0)
        for up_proj in (*self.mix_up_proj.values(), self.decay_proj.up_proj):
            uniform_(up_proj.get_parameter("weight"), -0.01, 0.01)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        previous = self.token_shift(x, sequence=sequence, cache=None if cache is None else cache["token_shift"])
        difference = previous - x
        hidden = self.mix_down_proj(self.mix_x(x, difference)).tanh().chunk(len(self.mix), -1)
        r, k, v, gate, w = (
            mix(x, difference, up_proj(part))
            for mix, up_proj, part in zip(self.mix.values(), self.mix_up_proj.values(), hidden, strict=True)
        )
        heads = (-1, self.key_dim)
        o = recur(
            self.recurrence,
            *self.split_heads(self.q_proj(r), self.k_proj(k), self.v_proj(v)),
            log_decay=self.decay(self.decay_proj(w)).unflatten(-1, heads),
            bonus=self.bonus.view(heads),
            sequence=sequence,
            cache=cache,
        )
        return self.o_proj(self.norm(o) * nn.functional.silu(self.gate_proj(gate)))
