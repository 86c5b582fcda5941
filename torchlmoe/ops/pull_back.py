"""Gradients by `torch.func` within an operation, for backwards that are not written as formulas."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch._C import DispatchKey

# A TorchDispatchMode, such as FlopCounterMode, turns these off in the operations that it calls: `torch.func` with its
# views, and lazy conjugation, without which a conjugate would be read as the number itself.
_TURNED_OFF = (
    DispatchKey.FuncTorchDynamicLayerFrontMode,
    DispatchKey.FuncTorchDynamicLayerBackMode,
    DispatchKey.FuncTorchGradWrapper,
    DispatchKey.Conjugate,
    DispatchKey.Negative,
    DispatchKey.ADInplaceOrView,
)


def pull_back(function: Callable[..., Any], inputs: tuple[Any, ...], grads: Any) -> tuple[Any, ...]:
    """Return the gradients of `inputs`, from those of function(*inputs). Autograd is off within an operation."""
    with ExitStack() as stack:
        for key in _TURNED_OFF:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        return torch.func.vjp(function, *inputs)[1](grads)
