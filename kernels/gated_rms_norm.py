"""RMS norm or L2 norm of rows, times a weight and a gate, forward and backward, in Triton.

    y = x / sqrt(factor * sum(x^2) + eps) * weight * f(gate)       factor = 1 / D (RMS) or 1 (L2), f silu or sigmoid

              D channels, padded to a power of two
           +-----------------------------------------+      A program takes such tiles one after another, each row
    rows   |  BLOCK_M whole rows, sums over channels |      whole in registers. The backward sums the squares again, so
           +-----------------------------------------+      that only the inputs are kept.

Rows of groups with separate weights alternate; a program processes one group only. The gradient of the weight is
summed over a program's rows in registers, written once per program and summed afterwards: no atomics. Used by the norms
of blocks, heads and groups, with or without a weight, with or without a gate. Computed in float32. Channels must have
stride one and rows equal strides; other layouts are copied first.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """Elements of a tile and of a warp."""

    tile: int
    per_warp: int


CONFIGS = {  # by architecture
    "sm_80": Config(tile=2048, per_warp=512),
    "sm_90": Config(tile=2048, per_warp=512),
    "sm_100": Config(tile=2048, per_warp=512),
    "gfx942": Config(tile=4096, per_warp=1024),
    "interpreter": Config(tile=256, per_warp=256),
}
MOST_PROGRAMS = 1024  # several for each processor of the largest chips; as many parts of the weight's gradient
GATES = ("none", "silu", "sigmoid")


def architecture(x: Tensor) -> str:
    if x.device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    return {8: "sm_80", 9: "sm_90"}.get(torch.cuda.get_device_capability(x.device)[0], "sm_100")


@triton.jit
def _rows_of(pointer, row, channel, stride, mask):
    return tl.load(pointer + (row * stride)[:, None] + channel[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x, weight, gate, y, num_rows, dim, x_stride, gate_stride, factor, eps,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WEIGHT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    channel, group, num_groups = tl.arange(0, BLOCK_D), tl.program_id(1), tl.num_programs(1)
    w = tl.full([BLOCK_D], 1.0, tl.float32)
    if WEIGHT:
        w = tl.load(weight + group * dim + channel, mask=channel < dim, other=0).to(tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M * num_groups), tl.num_programs(0)):
        row = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64) * num_groups + group
        mask = (row < num_rows)[:, None] & (channel < dim)[None, :]
        unit = _rows_of(x, row, channel, x_stride, mask)
        unit *= tl.rsqrt(factor * tl.sum(unit * unit, 1) + eps)[:, None]
        out = unit * w[None, :]
        if GATE != "none":
            z = _rows_of(gate, row, channel, gate_stride, mask)
            out *= tl.sigmoid(z)
            if GATE == "silu":
                out *= z
        tl.store(y + (row * dim)[:, None] + channel[None, :], out, mask=mask)


@triton.jit
def _backward_kernel(
    grad, x, weight, gate, dx, dweight, dgate, num_rows, dim, grad_stride, x_stride, gate_stride, factor, eps,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WEIGHT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    channel, group, num_groups = tl.arange(0, BLOCK_D), tl.program_id(1), tl.num_programs(1)
    w = tl.full([BLOCK_D], 1.0, tl.float32)
    if WEIGHT:
        w = tl.load(weight + group * dim + channel, mask=channel < dim, other=0).to(tl.float32)
    of_weight = tl.zeros([BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M * num_groups), tl.num_programs(0)):
        row = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64) * num_groups + group
        mask = (row < num_rows)[:, None] & (channel < dim)[None, :]
        out = (row * dim)[:, None] + channel[None, :]
        unit = _rows_of(x, row, channel, x_stride, mask)
        inverse = tl.rsqrt(factor * tl.sum(unit * unit, 1) + eps)[:, None]
        unit *= inverse
        flow = _rows_of(grad, row, channel, grad_stride, mask)
        if GATE != "none":
            z = _rows_of(gate, row, channel, gate_stride, mask)
            sigmoid = tl.sigmoid(z)
            slope = sigmoid * (1 - sigmoid)
            if GATE == "silu":
                slope = sigmoid + z * slope
                sigmoid *= z
            tl.store(dgate + out, flow * unit * w[None, :] * slope, mask=mask)
            flow *= sigmoid
        of_weight += tl.sum(flow * unit, 0)
        flow *= w[None, :]
        flow -= unit * (factor * tl.sum(flow * unit, 1))[:, None]
        tl.store(dx + out, flow * inverse, mask=mask)
    if WEIGHT:
        part = tl.program_id(0) * num_groups + group
        tl.store(dweight + part * dim + channel, of_weight, mask=channel < dim)


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [M, D], the channels side by side."""
    x = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return x if x.stride(-1) == 1 else x.contiguous()


def _grid_and_flags(x: Tensor, weight: Tensor | None, activation: str) -> tuple[tuple[int, int], dict]:
    config = CONFIGS[architecture(x)]
    dim = x.shape[-1]
    block_d = triton.next_power_of_2(dim)
    block_m = max(1, config.tile // block_d)
    flags = dict(BLOCK_M=block_m, BLOCK_D=block_d, WEIGHT=weight is not None, GATE=activation)
    num_warps = min(16, max(1, block_m * block_d // config.per_warp))
    num_groups = 1 if weight is None else weight.numel() // dim
    programs = min(max(1, MOST_PROGRAMS // num_groups), triton.cdiv(x.numel() // dim, block_m * num_groups))
    return (programs, num_groups), flags | dict(num_warps=num_warps)


def _out_dtype(x: Tensor, gate: Tensor | None) -> torch.dtype:
    return x.dtype if gate is None else torch.promote_types(x.dtype, gate.dtype)


@torch.library.custom_op("torchlmoe::gated_rms_norm_triton", mutates_args=())
def gated_rms_norm(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, factor: float, eps: float, activation: str
) -> Tensor:
    """x [..., D], weight [D], gate like x -> like x, in the common dtype of x and gate.

    x [..., groups, D] can have a weight [groups, D]. activation: "silu" or "sigmoid" of the gate; "none" without one.
    """
    if activation not in GATES or (gate is None) != (activation == "none"):
        raise ValueError(f"activation = {activation!r} must be 'silu' or 'sigmoid' with a gate, 'none' without.")
    if weight is not None and weight.shape != x.shape[-weight.dim() :]:
        raise ValueError(f"weight must have the shape of x's last dims; got {list(weight.shape)} and {list(x.shape)}.")
    y = torch.empty(x.shape, dtype=_out_dtype(x, gate), device=x.device)
    if y.numel():
        grid, flags = _grid_and_flags(x, weight, activation)
        rows, gate_rows = _rows(x), _rows(x if gate is None else gate)
        _forward_kernel[grid](
            rows, rows if weight is None else weight.contiguous(), gate_rows, y, rows.shape[0], rows.shape[1],
            rows.stride(0), gate_rows.stride(0), factor, eps, **flags,
        )  # fmt: skip
    return y


@gated_rms_norm.register_fake
def _(x, weight, gate, factor, eps, activation):
    return torch.empty(x.shape, dtype=_out_dtype(x, gate), device=x.device)


@torch.library.custom_op("torchlmoe::gated_rms_norm_triton_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, factor: float, eps: float, activation: str
) -> list[Tensor]:
    """Gradients of x, weight and gate; an operation cannot return None, so empty if absent."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate = x.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    if not x.numel():
        return [dx, x.new_empty(0) if weight is None else torch.zeros_like(weight), dgate]
    grid, flags = _grid_and_flags(x, weight, activation)
    rows, gate_rows, grad_rows = _rows(x), _rows(x if gate is None else gate), _rows(grad)
    parts = x.new_empty(0 if weight is None else (grid[0], *weight.shape), dtype=torch.float32)
    _backward_kernel[grid](
        grad_rows, rows, rows if weight is None else weight.contiguous(), gate_rows, dx, parts, dgate,
        rows.shape[0], rows.shape[1], grad_rows.stride(0), rows.stride(0), gate_rows.stride(0), factor, eps, **flags,
    )  # fmt: skip
    return [dx, x.new_empty(0) if weight is None else parts.sum(0).to(weight.dtype), dgate]


@_backward.register_fake
def _(grad, x, weight, gate, factor, eps, activation):
    return [
        x.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (x, weight, gate)
    ]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.factor, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad):
    inputs = ctx.saved_tensors
    grads = _backward(grad, *inputs, ctx.factor, ctx.eps, ctx.activation)
    return (*(None if x is None else g for x, g in zip(inputs, grads, strict=True)), None, None, None)


gated_rms_norm.register_autograd(_autograd, setup_context=_setup_context)
