"""Dtypes that the host's CPU multiplies natively."""

import logging
from functools import cache

import torch

logger = logging.getLogger(__name__)
stands_for_gpu = False  # True if the planner plans for a GPU on a host without one


@torch.compiler.assume_constant_result
def cpu_lacks_bfloat16() -> bool:
    """Whether this CPU has no bfloat16 matrix instructions; logs it once. A constant to torch.compile."""
    return not stands_for_gpu and _cpu_lacks_bfloat16()


@cache
def _cpu_lacks_bfloat16() -> bool:
    lacks = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if lacks:
        logger.warning(
            "This CPU has no bfloat16 matrix instructions: bfloat16 products (those of Muon too) are computed in "
            "float32 and rounded to bfloat16 (same numbers or better, no gain in speed)."
        )
    return lacks
