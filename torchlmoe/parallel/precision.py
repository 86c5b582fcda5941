"""Mixed precision of a single process: what FSDP2's policy does on many ranks, without its buffers and copies."""

from functools import cache

import torch
from torch import nn


def compute_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Make every read of a parameter return a cast to `dtype`; `parameters()` do not change.

    Modules marked `float32_island` are left out. Each read makes a new cast, so casts need not be kept if
    activations are recomputed. Gradients have the dtype of the parameters. Initialize parameters before.
    """
    for module in model.modules():
        names = tuple(name for name, _ in module.named_parameters(recurse=False))
        if names and not getattr(module, "float32_island", False):
            module.__class__ = _reading_casts(type(module), names, dtype)  # type: ignore[arg-type]  # classes are hashable


@cache
def _reading_casts(kind: type, names: tuple[str, ...], dtype: torch.dtype) -> type:
    """One class for all modules of a kind, so that equal blocks stay equal to `torch.compile`."""

    def cast(name: str) -> property:
        return property(lambda self: self._parameters[name].to(dtype))

    return type(kind.__name__, (kind,), {name: cast(name) for name in names})
