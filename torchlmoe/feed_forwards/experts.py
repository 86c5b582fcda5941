"""The routed experts: E SwiGLU layers (arXiv 2002.05202) with stacked weights, each over its own run of rows.

A row's routing weight is applied to the hidden activation rather than to the output: the same product, but
the output [M, D] need not be kept for the backward, and the way back to the tokens is a plain sum.

Legend: M rows sorted by expert, E experts, D width, F hidden width of an expert.
"""

import torch
from torch import Tensor, nn

from torchlmoe.layers.initialization import normal_
from torchlmoe.ops.grouped_matmul import grouped_matmul
from torchlmoe.ops.weighted_swiglu import weighted_swiglu


class Experts(nn.Module):
    """x [M, D], weight [M], offset [E] -> weight * SwiGLU_e(x), [M, D].

    The rows are sorted by expert, the weights in at least float32. offset_E: int32, the row at which each
    expert's run ends; runs may be empty, and the last ends at M.
    """

    head_dims: dict[str, int] = {}  # they are spread by expert

    def __init__(self, dim: int, expert_dim: int, num_experts: int, *, init_std: float = 0.02):
        super().__init__()
        self.init_std = init_std
        # Gate and up in one matrix: one product over x instead of two narrow ones.
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, expert_dim))

    def init_weights(self) -> None:
        normal_(self.gate_up_proj, self.init_std)
        normal_(self.down_proj, self.init_std)

    def forward(self, x_MD: Tensor, weight_M: Tensor, offset_E: Tensor) -> Tensor:
        gate_up_MF = grouped_matmul(x_MD, self.gate_up_proj, offset_E)
        hidden_MF = weighted_swiglu(gate_up_MF, weight_M)
        return grouped_matmul(hidden_MF, self.down_proj, offset_E)

    def flops_per_row(self) -> int:
        """Forward FLOPs of one row."""
        return 6 * self.down_proj[0].numel()
