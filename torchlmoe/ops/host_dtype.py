"""What the host's CPU can multiply natively."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
_stands_for_gpu = False


def on_cpu(x: Tensor) -> bool:
    """Whether a CPU is to compute with x."""
    return x.device.type == "cpu" and not _stands_for_gpu


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within it, CPU tensors without values are laid out as a GPU's would be; for planning without one."""
    global _stands_for_gpu
    _stands_for_gpu = True
    try:
        yield
    finally:
        _stands_for_gpu = False


@torch.compiler.assume_constant_result
def cpu_lacks_bfloat16() -> bool:
    """Whether this CPU has no bfloat16 matrix instructions; says so once. A constant to torch.compile."""
    return _cpu_lacks_bfloat16()


@cache
def _cpu_lacks_bfloat16() -> bool:
    lacks = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if lacks:
        logger.warning(
            "This CPU has no bfloat16 matrix instructions: products run in float32 on bfloat16 values and "
            "are rounded to bfloat16 (same numbers or better, no gain in speed)."
        )
    return lacks
