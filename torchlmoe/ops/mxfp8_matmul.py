"""`grouped_matmul` in MXFP8 (OCP Microscaling Formats 1.0), through torchao's prototype.

Operands of each product, forward and backward, are e4m3 numbers; each 32 consecutive numbers along the summed
dimension share a power of two. Weights, results and gradients keep their dtype.
"""

import inspect

import torch
from torch import Tensor

BLOCK = 32  # numbers that share a scale
_NEEDED = {"kernel_preference", "pad_token_groups_for_grouped_mm"}  # arguments that earlier prototypes did not have


def mxfp8_grouped_matmul(x_MD: Tensor, weight_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """Like `grouped_matmul`, for multiples of 32 as D and F. Results are rounded to bfloat16. A CPU emulates it."""
    from torchao.prototype.moe_training import _to_mxfp8_then_scaled_grouped_mm
    from torchao.quantization.quantize_.common import KernelPreference

    y_MF = _to_mxfp8_then_scaled_grouped_mm(
        x_MD,
        weight_EFD.mT,
        offsets_E,
        out_dtype=torch.bfloat16,
        kernel_preference=KernelPreference.EMULATED if x_MD.device.type == "cpu" else KernelPreference.AUTO,
        pad_token_groups_for_grouped_mm=True,  # the gradient in the weight has blocks along rows
    )
    return y_MF.to(x_MD.dtype)


def why_mxfp8_cannot_run(device: torch.device) -> str | None:
    """Return the missing requirement as "needs ..., but ..."; None if products run."""
    import torchao

    try:
        from torchao.prototype.moe_training.mxfp8_grouped_mm import (
            _SM100_KERNELS_AVAILABLE,
            _to_mxfp8_then_scaled_grouped_mm,
        )
    except ImportError:
        return f"needs torchao's prototype.moe_training, which torchao {torchao.__version__} does not have"
    if not inspect.signature(_to_mxfp8_then_scaled_grouped_mm).parameters.keys() >= _NEEDED:
        return f"needs a newer torchao: that of {torchao.__version__} does not pad groups of rows"
    if device.type != "cpu" and not _SM100_KERNELS_AVAILABLE:
        return "needs a GPU of compute capability 10.0 and a torchao for CUDA 12.8 or later, which are not here"
    return None
