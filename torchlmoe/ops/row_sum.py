"""Sum over rows, by the cores that hold them."""

import torch
from torch import Tensor


def row_sum(x: Tensor, num_parts: int = 16) -> Tensor:
    """x [M, ...] -> [...], the sum over its rows; on a CPU over `num_parts` parts first, for any number of threads.

    `x.sum(0)` gives columns to threads, while operations on each element give rows. Then half of every row is in the
    cache of another core, and the next operation that writes there takes many times longer. Compiled, it is fused.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or (size := x.shape[0] // num_parts) < num_parts:
        return x.sum(0)
    parts, rest = x.reshape(x.shape[0], -1).tensor_split([num_parts * size])
    total = torch.bmm(x.new_ones(num_parts, 1, size), parts.unflatten(0, (num_parts, size))).sum((0, 1))
    return (total + rest.sum(0)).view(x.shape[1:])
