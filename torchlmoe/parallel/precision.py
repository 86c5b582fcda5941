"""Mixed precision of a single process: what FSDP2's policy does on many ranks, without its buffers and copies."""

import torch
from torch import Tensor, nn


def compute_in(dtype: torch.dtype, unit: nn.Module, inner_units: list[nn.Module]) -> None:
    """While `unit` runs, its parameters are casts to `dtype`; outside, and for the optimizer, they are as they were.

    Left out are modules marked `float32_island`, and the `inner_units`, which see to themselves: so that a block's
    parameters are cast anew where activations are computed again. Gradients reach the parameters in their own dtype.
    """
    inner = {module for inner_unit in inner_units for module in inner_unit.modules()}
    owned = [
        (module, name, parameter)
        for module in unit.modules()
        if module not in inner and not getattr(module, "float32_island", False)
        for name, parameter in module.named_parameters(recurse=False)
    ]

    def put(tensors: list[Tensor]) -> None:
        for (module, name, _), tensor in zip(owned, tensors, strict=True):
            module._parameters[name] = tensor  # type: ignore[assignment]  # a cast is no Parameter

    unit.register_forward_pre_hook(lambda *_: put([parameter.to(dtype) for _, _, parameter in owned]))
    unit.register_forward_hook(lambda *_: put([parameter for _, _, parameter in owned]), always_call=True)
