"""silu(gate) * up * weight (arXiv 2002.05202), with one weight per row: the hidden layer of an expert.

One operation to torch, which keeps only its inputs for the backward: on a GPU kernels/weighted_swiglu.py, on a CPU
blocks of rows small enough that intermediate results never leave the cache.

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


def _blocks(gate_up: Tensor) -> Iterator[slice]:
    num_rows, width = gate_up.shape
    on_cpu = gate_up.device.type == "cpu"
    step = max(1, 2 * _BLOCK_ELEMENTS // width if on_cpu else num_rows)
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


@custom_op("torchlmoe::weighted_swiglu")
def _forward(gate_up: Tensor, weight: Tensor) -> Tensor:
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    for rows in _blocks(gate_up):
        gate, up = gate_up[rows].chunk(2, -1)
        torch.ops.aten.silu(gate, out=out[rows]).mul_(up).mul_(weight[rows, None])
    return out


@_forward.register_fake
def _(gate_up, weight):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@custom_op("torchlmoe::weighted_swiglu_backward")
def _backward(grad: Tensor, gate_up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows in _blocks(gate_up):
        gate, up = gate_up[rows].chunk(2, -1)
        grad_gate, grad_up = grad_gate_up[rows].chunk(2, -1)
        scale = weight[rows, None]
        flow = torch.ops.aten.silu(gate).mul_(grad[rows])
        torch.sum(flow * up, -1, dtype=weight.dtype, out=grad_weight[rows])
        torch.mul(flow, scale, out=grad_up)
        torch.mul(grad[rows], up, out=flow).mul_(scale)
        torch.ops.aten.silu_backward(flow, gate, grad_input=grad_gate)
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
