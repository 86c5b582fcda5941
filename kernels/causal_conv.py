"""Short depthwise causal convolution over tokens with bias and SiLU, forward and backward, in Triton.

    y_t = silu(bias + sum_i w_i x_{t-i})        i = 0 .. width - 1, without tokens of earlier documents

A program makes one tile of y; the rows that it reads overlap, and come from the first-level cache:

                channels                     The backward makes one tile of dx and takes the sum before the SiLU again:
             +------------+                      ds_t = silu'(sum_t) dy_t
     t - 3   |            |  x, or the state     dx_t = sum_i w_i ds_{t+i}
      ...    |   BLOCK_C  |  before the row      dw_i = sum_t ds_t x_{t-i}, db = sum_t ds_t
       t     |  BLOCK_T   |                  so that only x is kept. dw and db are written once a tile and summed
             +------------+                  afterwards: no atomics.

Used by the short convolutions of every mixer, in training (packed documents) and in decoding (with the state, the last
width - 1 inputs of each row). The device finds the starts of documents by bisection of their bounds. Computed in
float32. Channels must have stride one and rows of a batch equal strides; other layouts are copied first.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """The tile of a program and its warps."""

    tokens: int
    channels: int
    warps: int


CONFIGS = {  # by architecture
    "sm_80": Config(tokens=32, channels=64, warps=8),
    "sm_90": Config(tokens=32, channels=64, warps=8),
    "sm_100": Config(tokens=32, channels=64, warps=8),
    "gfx942": Config(tokens=32, channels=64, warps=4),
    "interpreter": Config(tokens=16, channels=16, warps=1),
}


def architecture(x: Tensor) -> str:
    if x.device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    return {8: "sm_80", 9: "sm_90"}.get(torch.cuda.get_device_capability(x.device)[0], "sm_100")


@triton.jit
def _document(token, cu_seqlens, num_documents, search_steps):
    """Where each token's document starts and ends."""
    low = token * 0
    high = low + num_documents
    for _ in range(search_steps):
        middle = (low + high) // 2
        is_below = tl.load(cu_seqlens + middle) <= token
        low, high = tl.where(is_below, middle, low), tl.where(is_below, high, middle)
    return tl.load(cu_seqlens + low), tl.load(cu_seqlens + low + 1)


class Inputs(NamedTuple):
    """The inputs of the convolution: x, and the state before it."""

    x: Any  # points to the row of position `first`
    x_stride: Any
    state: Any
    first: Any
    num_channels: Any


class Window(NamedTuple):
    """The documents and the channels of a tile."""

    low: Any  # the first position of each document
    high: Any  # the one past its last
    channel: Any
    channel_mask: Any


@triton.jit
def _take(inputs, window, position, STATE_ROWS: tl.constexpr):
    """x from position low to high, and the state before 0; else zero."""
    channel, channel_mask = window.channel, window.channel_mask
    mask = (position >= window.low) & (position < window.high)
    rows = ((position - inputs.first) * inputs.x_stride)[:, None] + channel[None, :]
    values = tl.load(inputs.x + rows, mask=mask[:, None] & channel_mask[None, :], other=0).to(tl.float32)
    if STATE_ROWS > 0:
        mask = (position < 0) & (position >= -STATE_ROWS)
        rows = ((position + STATE_ROWS) * inputs.num_channels)[:, None] + channel[None, :]
        values += tl.load(inputs.state + rows, mask=mask[:, None] & channel_mask[None, :], other=0).to(tl.float32)
    return values


@triton.jit
def _sum(
    inputs, window, weight, bias, position, WIDTH: tl.constexpr, BIAS: tl.constexpr, STATE_ROWS: tl.constexpr
):  # fmt: skip
    """The sum before the SiLU, float32 [BLOCK_T, BLOCK_C]."""
    channel, channel_mask = window.channel, window.channel_mask
    total = tl.zeros([position.shape[0], channel.shape[0]], tl.float32)
    for shift in tl.static_range(WIDTH):
        w = tl.load(weight + channel * WIDTH + WIDTH - 1 - shift, mask=channel_mask, other=0).to(tl.float32)
        total += w[None, :] * _take(inputs, window, position - shift, STATE_ROWS)
    if BIAS:
        total += tl.load(bias + channel, mask=channel_mask, other=0).to(tl.float32)[None, :]
    return total


@triton.jit
def _forward_kernel(
    x, weight, bias, state, cu_seqlens, y, length, num_channels, num_documents, search_steps, x_stride,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr, STATE_ROWS: tl.constexpr,
    PACKED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, BLOCK_T)
    row, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK_T
    position = first + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < num_channels
    low, high = 0, length
    if PACKED:
        low, high = _document(position, cu_seqlens, num_documents, search_steps)
    x, state = x + (row * length + first) * x_stride, state + row * STATE_ROWS * num_channels
    inputs, window = Inputs(x, x_stride, state, first, num_channels), Window(low, high, channel, channel_mask)
    total = _sum(inputs, window, weight, bias, position, WIDTH, BIAS, STATE_ROWS)
    if ACTIVATION:
        total = total * tl.sigmoid(total)
    y += (row * length + first) * num_channels
    mask = (position < length)[:, None] & channel_mask[None, :]
    tl.store(y + ((position - first) * num_channels)[:, None] + channel[None, :], total, mask=mask)


@triton.jit
def _grad_of_sum(
    grad_y, grad_stride, inputs, window, weight, bias, position,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, STATE_ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """ds at each position, zero outside of the document."""
    mask = ((position >= 0) & (position < window.high))[:, None] & window.channel_mask[None, :]
    rows = grad_y + ((position - inputs.first) * grad_stride)[:, None]
    grad = tl.load(rows + window.channel[None, :], mask=mask, other=0).to(tl.float32)
    if ACTIVATION:
        total = _sum(inputs, window, weight, bias, position, WIDTH, BIAS, STATE_ROWS)
        sigmoid = tl.sigmoid(total)
        grad *= sigmoid * (1 + total * (1 - sigmoid))
    return grad


@triton.jit
def _backward_kernel(
    grad_y, x, weight, bias, state, cu_seqlens, dx, dstate, dweight, length, num_channels, num_documents, search_steps,
    grad_stride, x_stride,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr, STATE_ROWS: tl.constexpr,
    PACKED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length + STATE_ROWS, BLOCK_T)
    row, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK_T - STATE_ROWS
    position = first + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < num_channels
    low, high = 0, length
    if PACKED:
        low, high = _document(position, cu_seqlens, num_documents, search_steps)
    x += (row * length + first) * x_stride
    grad_y += (row * length + first) * grad_stride
    state += row * STATE_ROWS * num_channels
    inputs, window = Inputs(x, x_stride, state, first, num_channels), Window(low, high, channel, channel_mask)
    dweight += tl.program_id(0).to(tl.int64) * (WIDTH + 1) * num_channels
    dx_tile = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for ahead in tl.static_range(WIDTH):
        # The token `ahead` takes this one's x times w_ahead.
        grad = _grad_of_sum(
            grad_y, grad_stride, inputs, window, weight, bias, position + ahead, WIDTH, BIAS, STATE_ROWS, ACTIVATION
        )  # fmt: skip
        w = tl.load(weight + channel * WIDTH + WIDTH - 1 - ahead, mask=channel_mask, other=0).to(tl.float32)
        dx_tile += w[None, :] * grad
        if ahead == 0:
            for shift in tl.static_range(WIDTH):
                taken = _take(inputs, window, position - shift, STATE_ROWS)
                column = (WIDTH - 1 - shift) * num_channels + channel
                tl.store(dweight + column, tl.sum(grad * taken, 0), mask=channel_mask)
            tl.store(dweight + WIDTH * num_channels + channel, tl.sum(grad, 0), mask=channel_mask)
    mask = ((position >= 0) & (position < length))[:, None] & channel_mask[None, :]
    dx += (row * length + first) * num_channels
    tl.store(dx + ((position - first) * num_channels)[:, None] + channel[None, :], dx_tile, mask=mask)
    if STATE_ROWS > 0:
        mask = (position < 0)[:, None] & channel_mask[None, :]
        rows = ((position + STATE_ROWS) * num_channels)[:, None] + channel[None, :]
        tl.store(dstate + row * STATE_ROWS * num_channels + rows, dx_tile, mask=mask)


class _Launch:
    """Operands in the form that the kernels read, the grid, and common options of both launches."""

    def __init__(self, x: Tensor, weight: Tensor, bias, state, cu_seqlens, activation: bool, positions: int):
        batch_size, length, num_channels = x.shape
        config = CONFIGS[architecture(x)]
        self.grid = (batch_size * triton.cdiv(positions, config.tokens), triton.cdiv(num_channels, config.channels))
        self.weight = weight.contiguous()
        self.given = (
            self.weight if bias is None else bias.contiguous(),
            self.weight if state is None else state.contiguous(),
            self.weight if cu_seqlens is None else cu_seqlens.contiguous(),
        )
        num_documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.sizes = (length, num_channels, num_documents, num_documents.bit_length())
        self.flags = dict(
            BLOCK_T=config.tokens,
            BLOCK_C=config.channels,
            WIDTH=weight.shape[1],
            BIAS=bias is not None,
            STATE_ROWS=0 if state is None else weight.shape[1] - 1,
            PACKED=cu_seqlens is not None,
            ACTIVATION=activation,
            num_warps=config.warps,
        )


def _rows(x: Tensor) -> Tensor:
    """[B, T, channels] -> [B * T, channels], the channels side by side."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("torchlmoe::causal_conv_triton", mutates_args=())
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, activation: bool
) -> Tensor:
    """x [B, T, channels], weight [channels, width] (the last column multiplies the newest token) -> like x.

    bias: [channels]. state: [B, width - 1, channels], the inputs before each row; not together with cu_seqlens.
    cu_seqlens: int32 [N + 1], with B = 1. activation: whether SiLU follows.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        call, rows = _Launch(x, weight, bias, state, cu_seqlens, activation, x.shape[1]), _rows(x)
        _forward_kernel[call.grid](rows, call.weight, *call.given, y, *call.sizes, rows.stride(0), **call.flags)
    return y


@causal_conv.register_fake
def _(x, weight, bias, state, cu_seqlens, activation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("torchlmoe::causal_conv_triton_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: bool,
) -> list[Tensor]:
    """Gradients of x, weight, bias and state; an operation cannot return None, so empty if absent."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dstate = x.new_empty(0) if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    width, positions = weight.shape[1], x.shape[1] + (0 if state is None else state.shape[1])
    call, rows, grad_rows = _Launch(x, weight, bias, state, cu_seqlens, activation, positions), _rows(x), _rows(grad)
    parts = x.new_empty(call.grid[0], width + 1, x.shape[2], dtype=torch.float32)
    if parts.numel():
        _backward_kernel[call.grid](
            grad_rows, rows, call.weight, *call.given, dx, dstate, parts, *call.sizes,
            grad_rows.stride(0), rows.stride(0), **call.flags,
        )  # fmt: skip
    total = parts.sum(0)
    dbias = x.new_empty(0) if bias is None else total[width].to(bias.dtype, copy=True)
    return [dx, total[:width].T.to(weight.dtype).contiguous(), dbias, dstate]


@_backward.register_fake
def _(grad, x, weight, bias, state, cu_seqlens, activation):
    return [
        x.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (x, weight, bias, state)
    ]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad):
    inputs = ctx.saved_tensors
    grads = _backward(grad, *inputs, ctx.activation)
    return (*(None if x is None else g for x, g in zip(inputs[:4], grads, strict=True)), None, None)


causal_conv.register_autograd(_autograd, setup_context=_setup_context)
