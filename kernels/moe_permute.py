"""Moves tokens to their experts and back by gathers only, forward and backward, in Triton.

    permute:    y_m = x[token_m]                                   slots m in the order in which the experts work
    unpermute:  y_t = sum_k w_tk x[slot_tk]                        w, the router's weights, are optional

Each is the other's derivative; with weights the backward is dx_m = w_m dy[token_m] and dw_tk = <dy_t, x[slot_tk]>.
Nothing is added in an order that could vary, and there are no atomics:

                channels
             +------------+     A program of unpermute (and of permute's derivative) makes such a tile of tokens and
    rows     |  BLOCK_T x |     goes through their K slots, added up in float32; one of permute moves such a tile of
             |  BLOCK_C   |     slots. The backward with weights goes through all channels, for the sums over them.
             +------------+

Channels are read with a stride of one and rows at one distance; other layouts are copied first.

Legend: T tokens, K experts per token, M = T * K slots, D channels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """The tile of a program and its warps."""

    rows: int
    channels: int
    warps: int


CONFIGS = {  # by architecture
    "sm_80": Config(rows=16, channels=128, warps=4),
    "sm_90": Config(rows=16, channels=128, warps=4),
    "sm_100": Config(rows=16, channels=128, warps=4),
    "gfx942": Config(rows=16, channels=128, warps=4),
    "interpreter": Config(rows=16, channels=16, warps=1),
}


def architecture(x: Tensor) -> str:
    if x.device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    return {8: "sm_80", 9: "sm_90"}.get(torch.cuda.get_device_capability(x.device)[0], "sm_100")


@triton.jit
def _gather_kernel(
    x, index, y, num_rows, dim, x_stride, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """y_m = x[index_m]"""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    source = tl.load(index + row, mask=row < num_rows, other=0).to(tl.int64)
    mask = (row < num_rows)[:, None] & (channel < dim)[None, :]
    values = tl.load(x + (source * x_stride)[:, None] + channel[None, :], mask=mask, other=0)
    tl.store(y + (row.to(tl.int64) * dim)[:, None] + channel[None, :], values, mask=mask)


@triton.jit
def _sum_kernel(
    x, slot, weight, y, num_tokens, dim, x_stride,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """y_t = sum_k w_tk x[slot_tk]"""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (token < num_tokens)[:, None] & (channel < dim)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for k in range(TOP_K):
        choice = token.to(tl.int64) * TOP_K + k
        source = tl.load(slot + choice, mask=token < num_tokens, other=0)
        values = tl.load(x + (source * x_stride)[:, None] + channel[None, :], mask=mask, other=0).to(tl.float32)
        if WEIGHT:
            values *= tl.load(weight + choice, mask=token < num_tokens, other=0).to(tl.float32)[:, None]
        total += values
    tl.store(y + (token.to(tl.int64) * dim)[:, None] + channel[None, :], total, mask=mask)


@triton.jit
def _weighted_gather_kernel(
    grad, x, slot, weight, dx, dweight, num_tokens, dim, grad_stride, x_stride,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx[slot_tk] = w_tk dy_t, each slot being one token's, and dw_tk = <dy_t, x[slot_tk]>"""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    choice = row.to(tl.int64) * TOP_K + tl.program_id(1)
    row_mask = row < num_tokens
    source = tl.load(slot + choice, mask=row_mask, other=0)
    w = tl.load(weight + choice, mask=row_mask, other=0).to(tl.float32)
    product = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, dim, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (channel < dim)[None, :]
        g = tl.load(grad + (row.to(tl.int64) * grad_stride)[:, None] + channel[None, :], mask=mask, other=0)
        values = tl.load(x + (source * x_stride)[:, None] + channel[None, :], mask=mask, other=0)
        product += tl.sum(g.to(tl.float32) * values.to(tl.float32), 1)
        tl.store(dx + (source * dim)[:, None] + channel[None, :], w[:, None] * g.to(tl.float32), mask=mask)
    tl.store(dweight + choice, product, mask=row_mask)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _grid_and_flags(num_rows: int, x: Tensor) -> tuple[tuple[int, int], dict]:
    config = CONFIGS[architecture(x)]
    grid = (triton.cdiv(num_rows, config.rows), triton.cdiv(x.shape[1], config.channels))
    return grid, dict(BLOCK_T=config.rows, BLOCK_C=config.channels, num_warps=config.warps)


@torch.library.custom_op("torchlmoe::permute_triton", mutates_args=())
def permute(x_TD: Tensor, token_M: Tensor, slot_TK: Tensor) -> Tensor:
    """x [T, D] -> [M, D]: every slot's token.

    token_M: int64, the token of each slot. slot_TK: int64, the slots of each token.
    """
    y_MD = x_TD.new_empty(token_M.shape[0], x_TD.shape[1])
    if y_MD.numel():
        grid, flags = _grid_and_flags(y_MD.shape[0], y_MD)
        x = _rows(x_TD)
        _gather_kernel[grid](x, token_M.contiguous(), y_MD, *y_MD.shape, x.stride(0), **flags)
    return y_MD


@permute.register_fake
def _(x_TD, token_M, slot_TK):
    return x_TD.new_empty(token_M.shape[0], x_TD.shape[1])


@torch.library.custom_op("torchlmoe::unpermute_triton", mutates_args=())
def unpermute(x_MD: Tensor, token_M: Tensor, slot_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """x [M, D] -> [T, D] in x's dtype: the sum over each token's slots, times weight [T, K] if given, in float32."""
    y_TD = x_MD.new_empty(slot_TK.shape[0], x_MD.shape[1])
    if y_TD.numel():
        grid, flags = _grid_and_flags(y_TD.shape[0], y_TD)
        x, slot_TK = _rows(x_MD), slot_TK.contiguous()
        weight = slot_TK if weight_TK is None else weight_TK.contiguous()
        flags |= dict(TOP_K=slot_TK.shape[1], WEIGHT=weight_TK is not None)
        _sum_kernel[grid](x, slot_TK, weight, y_TD, *y_TD.shape, x.stride(0), **flags)
    return y_TD


@unpermute.register_fake
def _(x_MD, token_M, slot_TK, weight_TK):
    return x_MD.new_empty(slot_TK.shape[0], x_MD.shape[1])


@torch.library.custom_op("torchlmoe::unpermute_triton_backward", mutates_args=())
def _weighted_backward(grad_TD: Tensor, x_MD: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
    dx_MD = torch.empty_like(x_MD, memory_format=torch.contiguous_format)
    dweight_TK = torch.empty_like(weight_TK, memory_format=torch.contiguous_format)
    if weight_TK.numel():
        grid, flags = _grid_and_flags(slot_TK.shape[0], dx_MD)
        grad, x = _rows(grad_TD), _rows(x_MD)
        _weighted_gather_kernel[grid[0], slot_TK.shape[1]](
            grad, x, slot_TK.contiguous(), weight_TK.contiguous(), dx_MD, dweight_TK, *grad.shape,
            grad.stride(0), x.stride(0), TOP_K=slot_TK.shape[1], **flags,
        )  # fmt: skip
    return dx_MD, dweight_TK


@_weighted_backward.register_fake
def _(grad_TD, x_MD, slot_TK, weight_TK):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (x_MD, weight_TK))


def _permute_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _permute_autograd(ctx, grad_MD):
    return unpermute(grad_MD, *ctx.saved_tensors, None), None, None


def _unpermute_context(ctx, inputs, output) -> None:
    x_MD, token_M, slot_TK, weight_TK = inputs
    ctx.save_for_backward(None if weight_TK is None else x_MD, token_M, slot_TK, weight_TK)


def _unpermute_autograd(ctx, grad_TD):
    x_MD, token_M, slot_TK, weight_TK = ctx.saved_tensors
    if weight_TK is None:
        return permute(grad_TD, token_M, slot_TK), None, None, None
    dx_MD, dweight_TK = _weighted_backward(grad_TD, x_MD, slot_TK, weight_TK)
    return dx_MD, None, None, dweight_TK


permute.register_autograd(_permute_autograd, setup_context=_permute_context)
unpermute.register_autograd(_unpermute_autograd, setup_context=_unpermute_context)
