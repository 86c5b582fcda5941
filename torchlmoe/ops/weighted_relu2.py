"""relu(up)^2 * weight (arXiv 2109.08668), with one weight per row: the hidden layer of an expert without a gate.

Legend: M rows, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchlmoe.ops.operation import operation


@operation
def weighted_relu2(up: Tensor, weight: Tensor) -> Tensor:
    """up [M, F]; weight [M], at least float32 -> [M, F] in up's dtype. Rounds once and keeps only its inputs."""
    return _WeightedReLU2.apply(up, weight)


class _WeightedReLU2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(up, weight)
        active = F.relu(up).to(torch.promote_types(up.dtype, weight.dtype))
        return active.square().mul_(weight[:, None]).to(up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        up, weight = ctx.saved_tensors
        active = F.relu(up).to(torch.promote_types(up.dtype, weight.dtype))
        flow = active * grad
        grad_weight = (flow * active).sum(-1).to(weight.dtype)
        return flow.mul_(2 * weight[:, None]).to(up.dtype), grad_weight
