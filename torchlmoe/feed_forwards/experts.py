"""The routed experts: E layers like `layers.mlp.MLP` with stacked weights, each over its run of rows.

A row's routing weight multiplies the hidden activation instead of the output. The result is the same, but the output
[M, D] need not be kept for the backward, and the combine is a plain sum.

Legend: M rows sorted by expert, E experts, D width, F hidden width of an expert.
"""

import torch
from torch import Tensor, nn

from torchlmoe.layers.initialization import normal_
from torchlmoe.layers.mlp import Activation
from torchlmoe.ops.grouped_matmul import grouped_matmul
from torchlmoe.ops.weighted_relu2 import weighted_relu2
from torchlmoe.ops.weighted_swiglu import weighted_swiglu


class Experts(nn.Module):
    """x [M, D], weight [M], offset [E] -> weight * MLP_e(x), [M, D].

    The rows are sorted by expert. weight_M: in at least float32. offset_E: int32, the row at which each expert's run
    ends; runs may be empty, and the last one ends at M.
    """

    head_dims: dict[str, int] = {}  # split by expert, not by head

    def __init__(
        self,
        dim: int,
        expert_dim: int,
        num_experts: int,
        *,
        activation: Activation = "swiglu",
        init_std: float = 0.02,
    ):
        super().__init__()
        self.init_std = init_std
        self.matmul = grouped_matmul  # float8.experts replaces it
        if activation == "swiglu":
            # One matrix for gate and up: one product over x instead of two narrow ones.
            self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, dim))
        else:
            self.up_proj = nn.Parameter(torch.empty(num_experts, expert_dim, dim))
        self.has_gate = activation == "swiglu"
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, expert_dim))

    def init_weights(self) -> None:
        for weight in self.parameters():
            normal_(weight, self.init_std)

    def forward(self, x_MD: Tensor, weight_M: Tensor, offset_E: Tensor) -> Tensor:
        if self.has_gate:
            gate_up_MF = self.matmul(x_MD, self.gate_up_proj, offset_E)
            hidden_MF = weighted_swiglu(gate_up_MF, weight_M)
        else:
            hidden_MF = weighted_relu2(self.matmul(x_MD, self.up_proj, offset_E), weight_M)
        return self.matmul(hidden_MF, self.down_proj, offset_E)

    def flops_per_row(self) -> int:
        """Forward FLOPs of one row."""
        return (6 if self.has_gate else 4) * self.down_proj[0].numel()
