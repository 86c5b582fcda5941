"""Decides whether Triton kernels run: on a GPU except in float64; on a CPU in Triton's interpreter, on request."""

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
FURTHEST = 1 << 24  # elements from a token to the next, of which a kernel's tile has up to 64


def kernels_serve(backend: str, *tensors: Tensor | None, refusal: str | None = None) -> bool:
    """Whether `backend` selects the Triton kernels for these tensors.

    "auto" uses Triton on a GPU; if the kernels cannot run there, it logs the reason once. Raises ValueError for
    "triton" if they cannot run. refusal: a reason that the caller knows why they cannot.
    """
    given = [x.is_cuda for x in tensors if x is not None]
    on_gpu = all(given)
    if backend == "auto" and any(given):
        if reason := refusal or _refusal(on_gpu, *tensors):
            _say_once(reason)
        return reason is None
    if backend == "triton" and (reason := refusal or _refusal(on_gpu, *tensors)):
        raise ValueError(f"backend = 'triton' is not available here, since {reason}; use 'chunked'.")
    return backend == "triton"


def within_reach(x: Any) -> Any:
    """x, a tensor [B, T, ..] copied if its tokens are so far apart that a tile's addresses would exceed 32 bits."""
    far = isinstance(x, Tensor) and x.dim() > 2 and x.shape[1] > 1 and x.stride(1) > FURTHEST
    return x.contiguous() if far else x


def _refusal(on_gpu: bool, *tensors: Tensor | None) -> str | None:
    if any(x is not None and x.dtype in (torch.float64, torch.complex128) for x in tensors):
        return "its kernels do not compute in float64"
    missing, interpreted = _triton()
    if missing is not None:
        return missing
    if not on_gpu and any(x is not None and x.is_cuda for x in tensors):
        return "some of its tensors are on a GPU and some are not"
    if not on_gpu and not interpreted:
        return "on a CPU its kernels run only with TRITON_INTERPRET=1"
    if interpreted and any(x is not None and x.dtype is torch.bfloat16 for x in tensors):
        return "triton's interpreter computes bfloat16 wrongly"
    return None


@torch.compiler.assume_constant_result
def _triton() -> tuple[str | None, bool]:
    """Return what the kernels need but is missing, if anything, and whether they are interpreted."""
    if find_spec("torchlmoe.kernels") is None:
        return "the kernels are not part of this copy (made without --kernels)", False
    if find_spec("triton") is None:
        return "triton is not installed", False
    from triton import knobs

    return None, knobs.runtime.interpret


@cache
def _say_once(reason: str) -> None:
    logger.warning(f"Plain PyTorch runs instead of Triton kernels, since {reason}.")
