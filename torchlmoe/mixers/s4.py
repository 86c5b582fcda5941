"""S4 in its diagonal form, S4D (arXiv 2111.00396, 2206.11893): a linear time-invariant state space in every channel.

    h_t[d, n] = exp(dt[d] A[d, n]) h_{t-1}[d, n] + x_t[d]          A complex, its real part -exp(A_log)
    o_t[d]    = 2 Re(sum_n C[d, n] (exp(dt[d] A[d, n]) - 1) / A[d, n] h_t[d, n]) + D[d] x_t[d]
    y_t       = GLU(W gelu(o_t))

This is h' = A h + x with x held constant over a step of dt. B is one, since only its product with C matters. The N
state variables are conjugate pairs, of which one is kept: the state is complex [dim, N / 2].
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from tensordict import TensorDict
from torch import Tensor, nn

from torchlmoe.layers.elementwise_recurrence import ElementwiseRecurrence
from torchlmoe.layers.initialization import constant_, fill_, normal_, uniform_
from torchlmoe.layers.linear import RowLinear
from torchlmoe.layers.recurrence import recur
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers.base import Mixer, recurrent_state
from torchlmoe.ops.elementwise_recurrence import elementwise_flops_per_token
from torchlmoe.ops.linear_recurrence import Backend
from torchlmoe.options import InitStd


def hippo_frequencies(state_dim: int) -> Tensor:
    """Imaginary parts > 0, [N / 2] float32, of the eigenvalues -1/2 + i w of HiPPO-LegS's normal part, rising."""
    root = (2 * torch.arange(state_dim, dtype=torch.float64) + 1).sqrt()
    lower = (root[:, None] * root / 2).tril(-1)
    # The normal part is -1/2 minus this skew-symmetric matrix, whose eigenvalues are plus and minus i w.
    frequencies = torch.linalg.eigvalsh(1j * (lower - lower.mT))
    return frequencies[state_dim // 2 :].float()


class DiagonalStateSpace(nn.Module):
    """The discrete form: the vector that reads the state, [dim, N / 2], and the log decay, [dim, N / 2, 1], complex."""

    float32_island = True
    head_dims = {"A_log": 0, "frequency": 0, "C": 0, "log_step": 0}  # channel after channel

    def __init__(self, dim: int, state_dim: int, initialization: str):
        super().__init__()
        self.initialization = initialization
        # Vectors, which have no weight decay.
        self.A_log = nn.Parameter(torch.empty(dim * state_dim // 2))
        self.frequency = nn.Parameter(torch.empty(dim * state_dim // 2))
        self.C = nn.Parameter(torch.empty(dim * state_dim))
        self.log_step = nn.Parameter(torch.empty(dim))

    def init_weights(self) -> None:
        """A by HiPPO, C complex normal of variance one, the step log-uniform in [0.001, 0.1]."""
        dim = self.log_step.shape[0]
        pairs = self.frequency.shape[0] // dim
        linear = torch.pi * torch.arange(pairs, dtype=torch.float32)
        frequencies = hippo_frequencies(2 * pairs) if self.initialization == "legs" else linear
        constant_(self.A_log, math.log(0.5))
        fill_(self.frequency, lambda whole, generator: whole.copy_(frequencies.repeat(dim)))
        normal_(self.C, 0.5**0.5)
        uniform_(self.log_step, math.log(1e-3), math.log(1e-1))

    def forward(self) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        step = self.log_step.to(dtype).exp()[:, None]
        A = torch.complex(-self.A_log.to(dtype).exp(), self.frequency.to(dtype)).view(step.shape[0], -1)
        C = torch.view_as_complex(self.C.to(dtype).view(*A.shape, 2))
        return 2 * C * torch.expm1(step * A) / A, (step * A)[..., None]


class S4(Mixer):
    head_dims = {"D": 0}

    def __init__(
        self,
        dim: int,
        *,
        state_dim: Annotated[
            int, Field(ge=2, multiple_of=2, description="N, real state variables in each channel.")
        ] = 64,
        initialization: Annotated[
            Literal["legs", "linear"],
            Field(description="Frequencies of the state: the eigenvalues of HiPPO-LegS, or pi n (S4D-Lin)."),
        ] = "legs",
        backend: Backend = "auto",
        init_std: InitStd = 0.02,
    ):
        super().__init__()
        if state_dim % 2:
            raise ValueError(f"state_dim = {state_dim} must be even: state variables are conjugate pairs.")
        self.dim = self.units = dim
        self.num_pairs, self.init_std = state_dim // 2, init_std
        self.state_space = DiagonalStateSpace(dim, state_dim, initialization)
        self.recurrence = ElementwiseRecurrence(backend)
        self.D = nn.Parameter(torch.empty(dim))
        self.o_proj = RowLinear(dim, 2 * dim)

    def init_weights(self) -> None:
        super().init_weights()
        normal_(self.D, 1.0)

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        part, num_parts = self.part_of_heads
        x = x.chunk(num_parts, -1)[part]  # there is no projection into the channels
        q, log_decay = self.state_space()
        # One head per channel: its keys are the state variables, and it has one value.
        o = recur(
            self.recurrence,
            q,
            torch.ones_like(q),
            x[..., None],
            log_decay=log_decay,
            sequence=sequence,
            cache=cache,
        )
        return F.glu(self.o_proj(F.gelu(o[..., 0] + self.D * x)))

    def init_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> TensorDict:
        dtype = torch.promote_types(dtype, torch.complex64)
        state = recurrent_state(batch_size, self.dim, self.num_pairs, 1, dtype, device)
        return TensorDict({"state": state}, batch_size=[batch_size])

    def flops_per_token(self, seq_len: int) -> int:
        return self.projection_flops() + elementwise_flops_per_token(self.dim, self.num_pairs, 1, is_complex=True)
