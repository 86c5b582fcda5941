"""silu(gate) * up * weight, the hidden layer of an expert with its router weight, forward and backward, in Triton.

    y_m = silu(g_m) * u_m * w_m        x = [g, u]        dg, du, and dw_m = sum_f dy_mf silu(g_mf) u_mf

              F channels of g, then F of u
             +-------------+-------------+      A program of the forward makes a tile of BLOCK_M x BLOCK_F; one of the
    rows     | BLOCK_M x   |             |      backward goes through all channels of its rows, and so has the sum dw.
             |    BLOCK_F  |             |      Only x and w are kept.
             +-------------+-------------+

Computed in float32. Channels are read with a stride of one; other layouts are copied first.

Legend: M rows, F hidden width.
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
    "sm_80": Config(rows=8, channels=256, warps=4),
    "sm_90": Config(rows=8, channels=256, warps=4),
    "sm_100": Config(rows=8, channels=256, warps=4),
    "gfx942": Config(rows=8, channels=256, warps=4),
    "interpreter": Config(rows=8, channels=16, warps=1),
}


def architecture(x: Tensor) -> str:
    if x.device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    return {8: "sm_80", 9: "sm_90"}.get(torch.cuda.get_device_capability(x.device)[0], "sm_100")


@triton.jit
def _forward_kernel(
    x, weight, y, num_rows, width, x_stride, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (row < num_rows)[:, None] & (channel < width)[None, :]
    gates = x + (row * x_stride)[:, None] + channel[None, :]
    gate = tl.load(gates, mask=mask, other=0).to(tl.float32)
    up = tl.load(gates + width, mask=mask, other=0).to(tl.float32)
    w = tl.load(weight + row, mask=row < num_rows, other=0).to(tl.float32)
    tl.store(y + (row * width)[:, None] + channel[None, :], gate * tl.sigmoid(gate) * up * w[:, None], mask=mask)


@triton.jit
def _backward_kernel(
    grad, x, weight, dx, dweight, num_rows, width, grad_stride, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    w = tl.load(weight + row, mask=row < num_rows, other=0).to(tl.float32)[:, None]
    of_weight = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_F):
        channel = start + tl.arange(0, BLOCK_F)
        mask = (row < num_rows)[:, None] & (channel < width)[None, :]
        gates = x + (row * x_stride)[:, None] + channel[None, :]
        gate = tl.load(gates, mask=mask, other=0).to(tl.float32)
        up = tl.load(gates + width, mask=mask, other=0).to(tl.float32)
        flow = tl.load(grad + (row * grad_stride)[:, None] + channel[None, :], mask=mask, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        of_weight += tl.sum(flow * silu * up, 1)
        flow *= w
        out = dx + (row * 2 * width)[:, None] + channel[None, :]
        tl.store(out, flow * up * (sigmoid + silu * (1 - sigmoid)), mask=mask)
        tl.store(out + width, flow * silu, mask=mask)
    tl.store(dweight + row, of_weight, mask=row < num_rows)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("torchlmoe::weighted_swiglu_triton", mutates_args=())
def weighted_swiglu(gate_up: Tensor, weight: Tensor) -> Tensor:
    """gate_up [M, 2F], gate first; weight [M] -> [M, F] in gate_up's dtype."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(num_rows, width)
    if y.numel():
        x, config = _dense(gate_up), CONFIGS[architecture(y)]
        _forward_kernel[triton.cdiv(num_rows, config.rows), triton.cdiv(width, config.channels)](
            x, weight.contiguous(), y, num_rows, width, x.stride(0),
            BLOCK_M=config.rows, BLOCK_F=config.channels, num_warps=config.warps,
        )  # fmt: skip
    return y


@weighted_swiglu.register_fake
def _(gate_up, weight):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("torchlmoe::weighted_swiglu_triton_backward", mutates_args=())
def _backward(grad: Tensor, gate_up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if not dx.numel():
        return dx, dweight.zero_()
    grad, x, config = _dense(grad), _dense(gate_up), CONFIGS[architecture(dx)]
    _backward_kernel[(triton.cdiv(grad.shape[0], config.rows),)](
        grad, x, weight.contiguous(), dx, dweight, *grad.shape, grad.stride(0), x.stride(0),
        BLOCK_M=config.rows, BLOCK_F=config.channels, num_warps=config.warps,
    )  # fmt: skip
    return dx, dweight


@_backward.register_fake
def _(grad, gate_up, weight):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate_up, weight))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    return _backward(grad, *ctx.saved_tensors)


weighted_swiglu.register_autograd(_autograd, setup_context=_setup_context)
