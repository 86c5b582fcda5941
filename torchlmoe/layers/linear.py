"""`nn.Linear` that stays fast in bfloat16 on a CPU without bfloat16 matrix instructions."""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class Linear(nn.Linear):
    """x [..., in] -> [..., out], without a bias unless asked."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`; where the CPU would take scalar code, the product runs in float32 and is rounded to bfloat16."""
    if x.dtype is torch.bfloat16 and x.device.type == "cpu" and cpu_lacks_bfloat16():
        y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return y.to(torch.bfloat16)
    return F.linear(x, weight, bias)


@cache
def cpu_lacks_bfloat16() -> bool:
    """Whether this CPU has no bfloat16 matrix instructions; says so once."""
    lacks = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if lacks:
        logger.warning(
            "This CPU has no bfloat16 matrix instructions: products run in float32 on bfloat16 values and are rounded "
            "to bfloat16 (same numbers or better, no gain in speed)."
        )
    return lacks
