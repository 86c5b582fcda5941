"""Checks of the arguments of operations: shapes that fit together and valid document bounds."""

from collections.abc import Sequence

import torch
from torch import Tensor


def num_documents(v: Tensor, cu_seqlens: Tensor | None) -> int:
    """Count the documents of v [B, T, ...]. Raises ValueError unless cu_seqlens is int32 [N + 1] and B is 1."""
    if cu_seqlens is None:
        return v.shape[0]
    # Not len(), which would make a constant of a size that is dynamic under torch.export.
    if v.shape[0] != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens (shape {list(cu_seqlens.shape)}, {cu_seqlens.dtype}) must be int32 [N + 1], with B = 1 "
            f"(B is {v.shape[0]})."
        )
    return cu_seqlens.shape[0] - 1


def check_shape(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor, if there is one, has one of the shapes."""
    # Size by size: a comparison of whole tuples may compare traced sizes by identity.
    if tensor is None:
        return
    sizes = tensor.shape
    if not any(len(sizes) == len(s) and all(a == b for a, b in zip(sizes, s, strict=True)) for s in shapes):
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; with this k and v it must be {wanted}.")


def check_not_empty(k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless k and v [..., heads, width] have at least one head and one channel. T may be 0."""
    if 0 in (*k.shape[-2:], *v.shape[-2:]):
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} must have at least one head, one key and one value.")


def check_bounds(bounds: Sequence[int], length: int, name: str = "cu_seqlens") -> None:
    """Raises ValueError unless they rise from 0 to `length`."""
    if bounds[0] != 0 or bounds[-1] != length or list(bounds) != sorted(bounds):
        raise ValueError(
            f"{name} must rise from 0 to the number of tokens, {length}; it is {list(bounds[:8])} ... {bounds[-1]}."
        )


def check_bounds_at_hand(bounds: Tensor | None, length: int, name: str = "cu_seqlens") -> None:
    """`check_bounds` of a tensor, or of each row of one, for code that does not read the values itself.

    It does not wait for a device: on a GPU it is a device-side assertion, which ends the process. Bounds
    without values, traced or on the meta device, are not checked.
    """
    if type(bounds) is not Tensor or bounds.is_meta or torch.compiler.is_compiling():
        return
    if bounds.device.type == "cpu":
        for row in bounds.reshape(-1, bounds.shape[-1]).tolist():
            check_bounds(row, length, name)
        return
    # Checked once for all layers that receive the tensor: the attribute lives as long as the tensor.
    checked = (length, None if bounds.is_inference() else bounds._version)
    if getattr(bounds, "_rise_to", None) != checked:
        bounds._rise_to = checked  # type: ignore[attr-defined]
        rises = (bounds[..., 0] == 0).all() & (bounds[..., -1] == length).all() & (bounds.diff() >= 0).all()
        torch._assert_async(rises, f"{name} must rise from 0 to the number of tokens, {length}.")
