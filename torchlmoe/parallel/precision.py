"""Mixed precision for a single process, like FSDP2's policy on many ranks but without its buffers and copies."""

from functools import cache

import torch
from torch import nn


def compute_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Makes every read of a parameter return a cast to `dtype`. `parameters()` does not change.

    Modules marked `float32_island` are left out. Each read makes a new cast, so recompute need not keep casts.
    Gradients have the dtype of the parameters. Initialize parameters before this.
    """
    for module in model.modules():
        names = tuple(name for name, _ in module.named_parameters(recurse=False))
        if names and not getattr(module, "float32_island", False):
            module.__class__ = _reading_casts(type(module), names, dtype)  # type: ignore[arg-type]  # classes are hashable


@cache
def _reading_casts(kind: type, names: tuple[str, ...], dtype: torch.dtype) -> type:
    """A subclass whose parameters read as casts; one per kind of module, so that `torch.compile` reuses code."""

    def cast(name: str) -> property:
        return property(lambda self: self._parameters[name].to(dtype))

    return type(kind.__name__, (kind,), {name: cast(name) for name in names})
