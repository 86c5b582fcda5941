"""Matrix products over groups of rows, each group with its own matrix: the experts' linear layers.

    y[rows of e] = x[rows of e] @ weight[e]^T          grouped_matmul
    g[rows of e]^T @ x[rows of e]                      its gradient in weight[e], `torchlmoe::grouped_outer`

Each of the two is one operation to torch and the derivative of the other, so gradients of any order consist of
these two. They run on `torch.nn.functional.grouped_mm`, or one group at a time if it does not support the operands:
float64, and matrices whose rows are not a multiple of 16 bytes.

Legend: M rows, E groups, D input width, F output width.
"""

import itertools
import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchlmoe.ops import host_dtype
from torchlmoe.ops.host_dtype import cpu_lacks_bfloat16
from torchlmoe.ops.operation import custom_op, operation

logger = logging.getLogger(__name__)


@operation
def grouped_matmul(x_MD: Tensor, weight_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """x [M, D], weight [E, F, D] (laid out as E `nn.Linear` weights, any strides) -> [M, F] in x's dtype.

    offsets_E: int32, the row at which each group ends. Groups may be empty, and the last must end at M, so that every
    row belongs to a group. Raises ValueError for shapes or dtypes that do not fit together.
    """
    if x_MD.dim() != 2 or weight_EFD.dim() != 3 or x_MD.shape[1] != weight_EFD.shape[2]:
        raise ValueError(
            f"grouped_matmul takes x [M, D] and weight [E, F, D], got {list(x_MD.shape)} and "
            f"{list(weight_EFD.shape)}: give weight one [F, D] matrix per group."
        )
    if x_MD.dtype != weight_EFD.dtype:
        raise ValueError(f"x is {x_MD.dtype} and weight is {weight_EFD.dtype}: cast one to the other's dtype.")
    if offsets_E.dtype != torch.int32 or offsets_E.shape != weight_EFD.shape[:1]:
        raise ValueError(
            f"offsets_E is {offsets_E.dtype} {list(offsets_E.shape)}, but must be int32 "
            f"[{weight_EFD.shape[0]}]: the row at which each group ends."
        )
    return _matmul(x_MD, weight_EFD, offsets_E)


def run_alignment(x: Tensor) -> int:
    """Return the number of which the groups' row counts should be multiples, for products of rows like x.

    A CPU compiles bfloat16 products for each number of rows, which costs more than some rows of padding.
    """
    of_cpu = x.device.type == "cpu" and not host_dtype.stands_for_gpu
    return 32 if of_cpu and _product_dtype(x) is torch.bfloat16 else 1


def _native(dtype: torch.dtype, num_rows: int, *widths: int) -> bool:
    """Whether `F.grouped_mm` takes these operands: dtype, some rows, and widths of a multiple of 16 bytes."""
    if dtype is torch.float64 or num_rows == 0:
        return False
    if any(width * dtype.itemsize % 16 for width in widths):
        _say_misaligned(dtype, widths)
        return False
    return True


@cache
def _say_misaligned(dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    multiple = 16 // dtype.itemsize
    logger.warning(
        f"grouped_matmul runs one group at a time (slower): the widths {widths} are not all multiples of "
        f"{multiple}, which grouped_mm needs in {dtype}."
    )


def _groups(offsets_E: Tensor, num_rows: int) -> list[tuple[int, int]]:
    bounds = [0, *offsets_E.tolist()]
    assert bounds[-1] == num_rows
    return list(itertools.pairwise(bounds))


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return float32 if this CPU would run bfloat16 in scalar code, else the dtype of x."""
    scalar = x.dtype is torch.bfloat16 and x.device.type == "cpu" and cpu_lacks_bfloat16()
    return torch.float32 if scalar else x.dtype


@custom_op("torchlmoe::grouped_matmul")
def _matmul(x_MD: Tensor, weight_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    # Only on a CPU: reading the offsets would wait for a GPU.
    if offsets_E.device.type == "cpu" and offsets_E[-1] != x_MD.shape[0]:
        raise ValueError(
            f"The last group ends at row {int(offsets_E[-1])}, but x has {x_MD.shape[0]} rows: give every "
            "row a group, or cut x."
        )
    dtype = _product_dtype(x_MD)
    # Either dim of the weight may be the contiguous one (the backward uses the transposed weight).
    x, weight = x_MD.to(dtype).contiguous(), weight_EFD.to(dtype)
    if weight.stride(1) != 1 and weight.stride(2) != 1:
        weight = weight.contiguous()
    if _native(dtype, x.shape[0], *weight.shape[1:]):
        return F.grouped_mm(x, weight.mT, offs=offsets_E).to(x_MD.dtype)
    y = x.new_empty(x.shape[0], weight.shape[1])
    for group, (start, end) in enumerate(_groups(offsets_E, x.shape[0])):
        torch.mm(x[start:end], weight[group].T, out=y[start:end])
    return y.to(x_MD.dtype)


@_matmul.register_fake
def _(x_MD, weight_EFD, offsets_E):
    return x_MD.new_empty(x_MD.shape[0], weight_EFD.shape[1])


@custom_op("torchlmoe::grouped_outer")
def _outer(g_MF: Tensor, x_MD: Tensor, offsets_E: Tensor) -> Tensor:
    """g [M, F], x [M, D] -> [E, F, D]; zeros for an empty group."""
    dtype = _product_dtype(x_MD)
    g, x = g_MF.to(dtype).contiguous(), x_MD.to(dtype).contiguous()
    if _native(dtype, x.shape[0], g.shape[1], x.shape[1]):
        return F.grouped_mm(g.T, x, offs=offsets_E).to(x_MD.dtype)
    out = x.new_empty(offsets_E.shape[0], g.shape[1], x.shape[1])
    for group, (start, end) in enumerate(_groups(offsets_E, x.shape[0])):
        torch.mm(g[start:end].T, x[start:end], out=out[group])
    return out.to(x_MD.dtype)


@_outer.register_fake
def _(g_MF, x_MD, offsets_E):
    return x_MD.new_empty(offsets_E.shape[0], g_MF.shape[1], x_MD.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_autograd(ctx, grad_MF):
    x_MD, weight_EFD, offsets_E = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    return (
        _matmul(grad_MF, weight_EFD.mT, offsets_E) if needs_x else None,
        _outer(grad_MF, x_MD, offsets_E) if needs_weight else None,
        None,
    )


def _outer_autograd(ctx, grad_EFD):
    g_MF, x_MD, offsets_E = ctx.saved_tensors
    needs_g, needs_x, _ = ctx.needs_input_grad
    return (
        _matmul(x_MD, grad_EFD, offsets_E) if needs_g else None,
        _matmul(g_MF, grad_EFD.mT, offsets_E) if needs_x else None,
        None,
    )


torch.library.register_autograd("torchlmoe::grouped_matmul", _matmul_autograd, setup_context=_setup_context)
torch.library.register_autograd("torchlmoe::grouped_outer", _outer_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.torchlmoe.grouped_matmul)
def _matmul_flops(x_shape, weight_shape, offsets_shape, *args, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.torchlmoe.grouped_outer)
def _outer_flops(g_shape, x_shape, offsets_shape, *args, **kwargs) -> int:
    return 2 * g_shape[0] * g_shape[1] * x_shape[1]
