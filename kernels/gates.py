"""Log decay from a projected input, forward and backward, in Triton.

    step = f(x + bias), clamped          log_decay = -rate * step

    activation    f(z)              rate
    softplus      softplus(z)       exp(A_log) of the channel's head    Mamba-2, Gated DeltaNet, Kimi Delta Attention
    logsigmoid    -logsigmoid(z)    1 / normalizer                      GLA, GSA, GateLoop, GFW, Titans
    exp           exp(z)            1                                   RWKV-6
    sigmoid       sigmoid(z)        exp(-1/2)                           RWKV-7

                 channels
             +------------+       A program takes such tiles of its channels one after another. Gradients of bias and
    tokens   |  BLOCK_M x |       A_log are added up in registers, written once a program and summed afterwards: no
             |  BLOCK_C   |       atomics. The backward makes the step again, so that only x is kept.
             +------------+

Computed and returned in float32, x in any dtype. Channels are read with a stride of one and rows at one distance; other
layouts are copied first.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """The tile of a program and its warps."""

    rows: int
    channels: int  # at most
    warps: int


CONFIGS = {  # by architecture
    "sm_80": Config(rows=32, channels=64, warps=4),
    "sm_90": Config(rows=32, channels=64, warps=4),
    "sm_100": Config(rows=32, channels=64, warps=4),
    "gfx942": Config(rows=32, channels=64, warps=4),
    "interpreter": Config(rows=16, channels=16, warps=1),
}
MOST_PROGRAMS = 1024  # several for each processor of the largest chips; as many parts of the parameters' gradients
ACTIVATIONS = ("softplus", "logsigmoid", "exp", "sigmoid")


def architecture(x: Tensor) -> str:
    if x.device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    return {8: "sm_80", 9: "sm_90"}.get(torch.cuda.get_device_capability(x.device)[0], "sm_100")


@triton.jit
def _softplus(z):
    """log(1 + exp(z)) = max(z, 0) + log(1 + u), u = exp(-|z|) <= 1, whose digits 1 + u would lose where u is small."""
    u = tl.exp(-tl.abs(z))
    r = u / (2 + u)  # log(1 + u) = 2 atanh(r), r <= 1/3
    s = r * r
    series = 1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15)))))))
    return tl.maximum(z, 0) + 2 * r * series


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """The step, not yet clamped, and its slope."""
    if ACTIVATION == "softplus":
        step = _softplus(z)
        slope = tl.sigmoid(z)
    elif ACTIVATION == "logsigmoid":
        step = _softplus(-z)
        slope = -tl.sigmoid(-z)
    elif ACTIVATION == "exp":
        step = tl.exp(z)
        slope = step
    else:
        step = tl.sigmoid(z)
        slope = step * (1 - step)
    return step, slope


@triton.jit
def _forward_kernel(
    x, bias, A_log, log_decay, step, num_rows, num_channels, head_width, x_stride, rate, low, high,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PER_HEAD: tl.constexpr, ACTIVATION: tl.constexpr,
    STEP: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < num_channels
    b = tl.load(bias + channel, mask=channel_mask, other=0).to(tl.float32)
    if PER_HEAD:
        rate = tl.exp(tl.load(A_log + channel // head_width, mask=channel_mask, other=0).to(tl.float32))[None, :]
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0)):
        row = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (row < num_rows)[:, None] & channel_mask[None, :]
        x_tile = tl.load(x + (row * x_stride)[:, None] + channel[None, :], mask=mask, other=0).to(tl.float32)
        s, _ = _activate(x_tile + b[None, :], ACTIVATION)
        if CLAMP:
            s = tl.minimum(tl.maximum(s, low), high)
        out = (row * num_channels)[:, None] + channel[None, :]
        tl.store(log_decay + out, -rate * s, mask=mask)
        if STEP:
            tl.store(step + out, s, mask=mask)


@triton.jit
def _backward_kernel(
    grad_log_decay, grad_step, x, bias, A_log, dx, dbias, dA_log, num_rows, num_channels, head_width,
    decay_stride, step_stride, x_stride, rate, low, high,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PER_HEAD: tl.constexpr, ACTIVATION: tl.constexpr,
    STEP: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < num_channels
    b = tl.load(bias + channel, mask=channel_mask, other=0).to(tl.float32)
    if PER_HEAD:
        rate = tl.exp(tl.load(A_log + channel // head_width, mask=channel_mask, other=0).to(tl.float32))[None, :]
    of_bias = tl.zeros([BLOCK_C], tl.float32)
    of_A_log = tl.zeros([BLOCK_C], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0)):
        row = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (row < num_rows)[:, None] & channel_mask[None, :]
        x_tile = tl.load(x + (row * x_stride)[:, None] + channel[None, :], mask=mask, other=0).to(tl.float32)
        grad = tl.load(grad_log_decay + (row * decay_stride)[:, None] + channel[None, :], mask=mask, other=0)
        grad = -rate * grad.to(tl.float32)
        s, slope = _activate(x_tile + b[None, :], ACTIVATION)
        flow = grad
        if STEP:
            flow += tl.load(grad_step + (row * step_stride)[:, None] + channel[None, :], mask=mask, other=0)
        flow *= slope
        if CLAMP:
            flow = tl.where((s >= low) & (s <= high), flow, 0)
            s = tl.minimum(tl.maximum(s, low), high)
        tl.store(dx + (row * num_channels)[:, None] + channel[None, :], flow, mask=mask)
        of_bias += tl.sum(flow, 0)
        if PER_HEAD:
            of_A_log += tl.sum(grad * s, 0)
    part = tl.program_id(0) * num_channels + channel
    tl.store(dbias + part, of_bias, mask=channel_mask)
    if PER_HEAD:
        tl.store(dA_log + part, of_A_log, mask=channel_mask)


def _rows(x: Tensor) -> Tensor:
    """[..., channels] -> [M, channels], the channels side by side."""
    x = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return x if x.stride(-1) == 1 else x.contiguous()


def _grid_and_flags(
    x: Tensor, A_log: Tensor | None, activation: str, limits: list[float], with_step: bool
) -> tuple[tuple, dict]:
    config, num_channels = CONFIGS[architecture(x)], x.shape[-1]
    block_c = min(config.channels, triton.next_power_of_2(num_channels))
    tiles = triton.cdiv(num_channels, block_c)
    programs = min(max(1, MOST_PROGRAMS // tiles), triton.cdiv(x.numel() // num_channels, config.rows))
    flags = dict(PER_HEAD=A_log is not None, ACTIVATION=activation, STEP=with_step, CLAMP=bool(limits))
    return (programs, tiles), flags | dict(BLOCK_M=config.rows, BLOCK_C=block_c, num_warps=config.warps)


@torch.library.custom_op("torchlmoe::decay_gate_triton", mutates_args=())
def decay_gate(
    x: Tensor, bias: Tensor, A_log: Tensor | None, activation: str, rate: float, limits: list[float], with_step: bool
) -> tuple[Tensor, Tensor]:
    """x [..., channels], bias [channels] -> log_decay and step, float32, like x; step empty unless with_step.

    A_log: [heads], each head's channels side by side, for rate = exp(A_log). activation: one of `ACTIVATIONS`.
    limits: of the step, two numbers or none.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r} is none of {', '.join(map(repr, ACTIVATIONS))}.")
    log_decay = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    step = torch.empty_like(log_decay) if with_step else log_decay.new_empty(0)
    if log_decay.numel():
        grid, flags = _grid_and_flags(x, A_log, activation, limits, with_step)
        rows, bias = _rows(x), bias.contiguous()
        _forward_kernel[grid](
            rows, bias, bias if A_log is None else A_log.contiguous(), log_decay, step, *rows.shape,
            rows.shape[1] // (1 if A_log is None else A_log.shape[0]), rows.stride(0), rate, *(limits or (0.0, 0.0)),
            **flags,
        )  # fmt: skip
    return log_decay, step


@decay_gate.register_fake
def _(x, bias, A_log, activation, rate, limits, with_step):
    log_decay = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return log_decay, torch.empty_like(log_decay) if with_step else log_decay.new_empty(0)


@torch.library.custom_op("torchlmoe::decay_gate_triton_backward", mutates_args=())
def _backward(
    grad_log_decay: Tensor,
    grad_step: Tensor | None,
    x: Tensor,
    bias: Tensor,
    A_log: Tensor | None,
    activation: str,
    rate: float,
    limits: list[float],
    with_step: bool,
) -> list[Tensor]:
    """Gradients of x, bias and A_log; an operation cannot return None, so empty if absent."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return [dx, torch.zeros_like(bias), x.new_empty(0) if A_log is None else torch.zeros_like(A_log)]
    grid, flags = _grid_and_flags(x, A_log, activation, limits, with_step)
    rows, decay_rows, bias_ = _rows(x), _rows(grad_log_decay), bias.contiguous()
    step_rows = decay_rows if grad_step is None else _rows(grad_step)
    parts = x.new_empty(2 if A_log is not None else 1, grid[0], x.shape[-1], dtype=torch.float32)
    _backward_kernel[grid](
        decay_rows, step_rows, rows, bias_, bias_ if A_log is None else A_log.contiguous(), dx, parts[0], parts[-1],
        *rows.shape, rows.shape[1] // (1 if A_log is None else A_log.shape[0]),
        decay_rows.stride(0), step_rows.stride(0), rows.stride(0), rate, *(limits or (0.0, 0.0)), **flags,
    )  # fmt: skip
    dbias = parts[0].sum(0).to(bias.dtype)
    if A_log is None:
        return [dx, dbias, x.new_empty(0)]
    return [dx, dbias, parts[1].view(grid[0], A_log.shape[0], -1).sum((0, 2)).to(A_log.dtype)]


@_backward.register_fake
def _(grad_log_decay, grad_step, x, bias, A_log, activation, rate, limits, with_step):
    return [
        x.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (x, bias, A_log)
    ]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.activation, ctx.rate, ctx.limits, ctx.with_step = inputs
    ctx.save_for_backward(*tensors)
    if not ctx.with_step:
        ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad_log_decay, grad_step):
    inputs = ctx.saved_tensors
    grad_step = grad_step if ctx.with_step else None
    grads = _backward(grad_log_decay, grad_step, *inputs, ctx.activation, ctx.rate, ctx.limits, ctx.with_step)
    return (*(None if x is None else g for x, g in zip(inputs, grads, strict=True)), None, None, None, None)


decay_gate.register_autograd(_autograd, setup_context=_setup_context)
