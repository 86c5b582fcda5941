"""`nn.Linear` that is fast in bfloat16 on CPUs without bfloat16 instructions and declares the dimension of heads.

Every module with parameters has `head_dims`: for each parameter, the dimension along which heads (or the channels of
heads) lie. A parameter that is not named is shared by all heads. The plan of tensor parallelism is collected from
`head_dims`, so a module without it raises an error there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.ops.host_dtype import cpu_lacks_bfloat16
from torchlmoe.styles.heads import LeaveHeads, SumHeads


class Linear(nn.Linear):
    """x [..., in] -> [..., out], without a bias unless asked. Its weight is shared by all heads."""

    head_dims: dict[str, int] = {}

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class ColumnLinear(Linear):
    """A projection into heads or hidden channels, head after head, along the rows of its weight.

    units: the number of heads or groups, if it differs from the layer's number of heads.
    """

    head_dims = {"weight": 0, "bias": 0}

    def __init__(self, in_features: int, out_features: int, bias: bool = False, units: int | None = None):
        super().__init__(in_features, out_features, bias)
        self.units = units


class RowLinear(Linear):
    """A projection out of heads or hidden channels: a rank that has some of them computes a part of the sum.

    to_heads: whether the result goes back into heads, so that a rank needs it for all tokens.
    """

    head_dims = {"weight": 1}

    def __init__(self, in_features: int, out_features: int, to_heads: bool = False, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        self.to_heads = to_heads

    def tensor_parallel_style(self, degree: int) -> ParallelStyle:
        return SumHeads() if self.to_heads else LeaveHeads()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`; if the CPU would use scalar code, the product runs in float32 and is rounded."""
    if x.dtype is torch.bfloat16 and x.device.type == "cpu" and cpu_lacks_bfloat16():
        y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return y.to(torch.bfloat16)
    return F.linear(x, weight, bias)
