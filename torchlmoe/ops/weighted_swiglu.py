"""silu(gate) * up * weight (arXiv 2002.05202), with one weight per row: the hidden layer of an expert.

One operation to torch, which keeps only its inputs for the backward. A GPU runs kernels/weighted_swiglu.py; a CPU
processes blocks of rows small enough that intermediate results stay in the cache.

Legend: M rows, F hidden width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchlmoe.ops.kernel_backend import kernels_serve
from torchlmoe.ops.operation import custom_op, operation

_BLOCK_ELEMENTS = 1 << 18  # 1 MiB in float32, the second-level cache of one core


@operation
def weighted_swiglu(gate_up: Tensor, weight: Tensor) -> Tensor:
    """gate_up [M, 2F], gate first; weight [M], at least float32 -> [M, F] in gate_up's dtype."""
    if kernels_serve("auto", gate_up):
        from torchlmoe.kernels import weighted_swiglu as kernels

        return kernels.weighted_swiglu(gate_up, weight)
    return _forward(gate_up, weight)


def _block_rows(gate_up: Tensor) -> int:
    num_rows, width = gate_up.shape
    return min(num_rows, max(1, 2 * _BLOCK_ELEMENTS // width)) if gate_up.device.type == "cpu" else num_rows


def _blocks(gate_up: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, and their values in `dtype`; a block is overwritten when the next one is asked for.

    A CPU copies them to memory that stays in the cache: it reads whole rows in half the time of gate and up in turn.
    """
    num_rows, step = gate_up.shape[0], _block_rows(gate_up)
    on_cpu = gate_up.device.type == "cpu"
    buffer = gate_up.new_empty(step if on_cpu else 0, gate_up.shape[1], dtype=dtype)
    for start in range(0, num_rows, max(1, step)):
        rows = slice(start, min(start + step, num_rows))
        yield rows, buffer[: rows.stop - start].copy_(gate_up[rows]) if on_cpu else gate_up[rows].to(dtype)


@custom_op("torchlmoe::weighted_swiglu")
def _forward(gate_up: Tensor, weight: Tensor) -> Tensor:
    out, dtype = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2), _dtype(gate_up, weight)
    for rows, block in _blocks(gate_up, dtype):
        gate, up = block.chunk(2, -1)
        hidden = out[rows] if out.dtype is dtype else torch.empty_like(gate)
        torch.ops.aten.silu(gate, out=hidden).mul_(up).mul_(weight[rows, None])
        if out.dtype is not dtype:
            out[rows] = hidden
    return out


def _dtype(gate_up: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of computation: low precisions are rounded once, which is more accurate and, on a CPU, faster."""
    return torch.promote_types(gate_up.dtype, weight.dtype)


@_forward.register_fake
def _(gate_up, weight):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@custom_op("torchlmoe::weighted_swiglu_backward")
def _backward(grad: Tensor, gate_up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dtype = _dtype(gate_up, weight)
    one = weight.new_ones((), dtype=dtype)
    buffers = [grad.new_empty(_block_rows(gate_up), grad.shape[1], dtype=dtype) for _ in range(3)]
    for rows, block in _blocks(gate_up, dtype):
        gate, up = block.chunk(2, -1)
        flow, scale = grad[rows].to(dtype), weight[rows, None]
        result = grad_gate_up[rows] if gate_up.dtype is dtype else torch.empty_like(block)
        grad_gate, grad_up = result.chunk(2, -1)
        sigmoid, silu, flow_silu = (buffer[: len(block)] for buffer in buffers)
        torch.mul(gate, torch.sigmoid(gate, out=sigmoid), out=silu)
        torch.mul(flow, silu, out=flow_silu)
        torch.sum(torch.mul(flow_silu, up, out=grad_up), -1, dtype=weight.dtype, out=grad_weight[rows])
        torch.mul(flow_silu, scale, out=grad_up)
        flow_up = torch.mul(flow, up, out=flow_silu).mul_(scale)
        # d silu = silu + sigmoid * (1 - silu): one exponential for both.
        torch.mul(flow_up, torch.lerp(silu, one, sigmoid, out=sigmoid), out=grad_gate)
        if gate_up.dtype is not dtype:
            grad_gate_up[rows] = result
    return grad_gate_up, grad_weight


@_backward.register_fake
def _(grad, gate_up, weight):
    return (
        torch.empty_like(gate_up, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    return _backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("torchlmoe::weighted_swiglu", _autograd, setup_context=_setup_context)
