"""DeltaNet (arXiv 2406.06484): each write replaces the value that the state holds at the token's key.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T       beta_t = sigmoid(W_b x_t), q, k of unit length
    y_t = W_o RMSNorm(S_t^T q_t)

q, k and v pass a short convolution with SiLU first. Gated DeltaNet and Kimi Delta Attention are this layer with a
decay and an output gate.
"""

from typing import Annotated

from pydantic import Field
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.linear import ColumnLinear
from torchlmoe.layers.norms import RMSNorm, l2_norm
from torchlmoe.layers.recurrence import recur
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.base import scaled_width, split_heads
from torchlmoe.mixers.recurrent import ConvolvedMixer
from torchlmoe.options import NormEps


class DeltaNet(ConvolvedMixer):
    erases = True

    def __init__(
        self,
        dim: int,
        *,
        num_heads: Annotated[int, Field(ge=1, description="Value heads.")],
        num_key_heads: Annotated[
            int | None, Field(ge=1, description="Query and key heads; num_heads if unset.")
        ] = None,
        head_dim: Annotated[
            int | None, Field(ge=1, description="Width of a key head; dim / num_heads if unset.")
        ] = None,
        expand_v: Annotated[
            float, Field(ge=0.01, le=100, description="Width of a value head, as a multiple of head_dim.")
        ] = 1.0,
        negative_eigenvalues: Annotated[
            bool, Field(description="beta in (0, 2) in place of (0, 1) (arXiv 2411.12537).")
        ] = False,
        norm_eps: NormEps = 1e-6,
        **options,
    ):
        head_dim = head_dim or split_heads(dim, num_heads)
        key_width, value_width = (num_key_heads or num_heads) * head_dim, num_heads * scaled_width(head_dim, expand_v)
        super().__init__(dim, key_width, value_width, num_key_heads, num_heads=num_heads, **options)
        self.max_beta = 2.0 if negative_eigenvalues else 1.0
        self.b_proj = ColumnLinear(dim, num_heads)
        self.norm: nn.Module = RMSNorm(self.value_dim, norm_eps)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        q, k, v = self.project(x, sequence=sequence, cache=cache)
        beta = sequence.project(self.b_proj, x).sigmoid() * self.max_beta
        o = recur(
            self.recurrence,
            l2_norm(q),
            l2_norm(k),
            v * beta[..., None],
            log_decay=self.log_decay(x, sequence),
            erase=beta,
            scale=self.key_dim**-0.5,
            sequence=sequence,
            cache=cache,
        )
        return self.o_proj(self.normalize(o, x).flatten(2))

    def log_decay(self, x: Tensor, sequence: SequenceLayout) -> Tensor | None:
        """x [B, T, dim] -> [B, T, heads] or [B, T, heads, K], by `sequence.project`; None for no decay."""
        return None

    def normalize(self, o: Tensor, x: Tensor) -> Tensor:
        """o [B, T, heads, V] -> like o; x is the mixer's input, for a gate."""
        return self.norm(o)
