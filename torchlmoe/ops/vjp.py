"""Gradients by `torch.func` within an operation, for backwards that are not written as formulas."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


def vjp(function: Callable[..., Any], *inputs: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """Return function(*inputs), and a function from the gradients of that to those of `inputs`.

    Autograd is off within an operation.
    """
    with _transforms():
        outputs, pull_back = torch.func.vjp(function, *inputs)[:2]

    def gradients(grads: Any) -> tuple[Any, ...]:
        with _transforms():
            return pull_back(grads)

    return outputs, gradients


@contextmanager
def _transforms() -> Iterator[None]:
    with ExitStack() as stack:
        for key in _TURNED_OFF:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield
