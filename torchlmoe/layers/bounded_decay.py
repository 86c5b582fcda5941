"""A log decay with a lower bound."""

import torch
from torch import Tensor

from torchlmoe.layers.decay_gate import DecayGate


class BoundedDecayGate(DecayGate):
    """x [..., heads * channels] -> lower_bound * sigmoid(exp(A_log) * (x + dt_bias)), [..., heads, channels].

    In at least float32. A_log has one entry per head, dt_bias one per channel. Both are initialized as in
    `DecayGate`, so the decay starts near zero. Equals the gates of Ling-3.0 and GLM-5.3 in transformers.
    """

    def __init__(self, num_heads: int, channels: int, lower_bound: float):
        super().__init__(num_heads, channels, rates=(1.0, 16.0))
        self.lower_bound = lower_bound

    def forward(self, x: Tensor, with_step: bool = True) -> tuple[Tensor, None]:
        """Never returns a step."""
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        shifted = (x.to(dtype) + self.dt_bias.to(dtype)).unflatten(-1, (-1, self.channels))
        return self.lower_bound * (self.A_log.to(dtype).exp()[:, None] * shifted).sigmoid(), None
