"""Depthwise causal convolution over tokens, with SiLU, that keeps documents apart.

    y_t = silu(bias + sum_i w_i x_{t-i})        i = 0 .. width - 1, without tokens of earlier documents

On a GPU kernels/causal_conv.py computes it. Otherwise it is a sum of shifted multiply-adds on [B, T, channels]: on a
CPU this is several times faster than `conv1d` with its transposes, forward and backward. It is one operation to
torch. The sum before the SiLU is kept for the backward. Sums are in at least float32 and rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlmoe.ops.checks import check_bounds_at_hand, num_documents
from torchlmoe.ops.kernel_backend import kernels_serve, within_reach
from torchlmoe.ops.operation import custom_op, gradients_of, keep_for_backward, operation


@operation
def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    """x [B, T, channels], weight [channels, width] (the last column multiplies the newest token) -> like x.

    bias: [channels]. state: [B, width - 1, channels], the inputs before each row; zero unless given.
    cu_seqlens: int32 [N + 1] bounds of documents packed into one row (B = 1), or None.
    activation: whether SiLU follows.
    Raises ValueError for bounds that do not rise from 0 to T, and for bounds beside several rows or a state.
    """
    if weight.shape[1] == 1:  # sees no other token, so documents do not matter
        cu_seqlens = None
    if cu_seqlens is not None:
        if state is not None:
            raise ValueError("causal_conv takes cu_seqlens or a state, not both: packed documents begin without one.")
        num_documents(x, cu_seqlens)
        check_bounds_at_hand(cu_seqlens, x.shape[1])
    if kernels_serve("auto", x):
        from torchlmoe.kernels import causal_conv as kernels

        return kernels.causal_conv(within_reach(x), weight, bias, state, cu_seqlens, activation)
    if state is not None:
        extended = torch.cat([state.to(x.dtype), x], 1)
        return causal_conv(extended, weight, bias, activation=activation)[:, state.shape[1] :]
    if bias is None:
        return _forward(x, weight, cu_seqlens, activation)[0]
    y = _forward(x, weight, cu_seqlens, False)[0] + bias
    return F.silu(y) if activation else y


def _edges(cu_seqlens: Tensor, length: int, reach: int, at_end: bool) -> tuple[Tensor, Tensor]:
    """Return the tokens within `reach` of their document's start (or end), and the distance of each (from 0)."""
    check_bounds_at_hand(cu_seqlens, length)  # here too, since a compiled caller could not check
    bounds = cu_seqlens.long()
    lengths = bounds[1:] - bounds[:-1]
    distance = torch.arange(reach, device=bounds.device).expand(len(lengths), -1)
    tokens = (bounds[1:, None] - 1 - distance) if at_end else (bounds[:-1, None] + distance)
    inside = distance < lengths[:, None]
    return tokens[inside], distance[inside]


def _shifted_sum(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, forward: bool) -> Tensor:
    """sum_i w_i x_{t-i}, or x_{t+i} for the backward, over the tokens of the same document, in x's dtype."""
    width = weight.shape[1]
    columns = [weight[:, width - 1 - shift].to(x.dtype).contiguous() for shift in range(width)]
    y = x * columns[0]
    for shift in range(1, min(width, x.shape[1])):
        if forward:
            y[:, shift:].addcmul_(x[:, :-shift], columns[shift])
        else:
            y[:, :-shift].addcmul_(x[:, shift:], columns[shift])
    if cu_seqlens is not None and width > 1:
        # Recompute the sum near a document's edge, so that the neighboring document does not even change the rounding.
        tokens, distance = _edges(cu_seqlens, x.shape[1], width - 1, at_end=not forward)
        edge = x[0, tokens] * columns[0]
        for shift in range(1, width):
            reach = (distance >= shift)[:, None]
            source = (tokens - shift if forward else tokens + shift).clamp(0, x.shape[1] - 1)
            edge = edge + torch.where(reach, x[0, source], 0) * columns[shift]
        y[0, tokens] = edge
    return y


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@custom_op("torchlmoe::causal_conv")
def _forward(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, activation: bool) -> tuple[Tensor, Tensor]:
    """Returns y, and the sum before the SiLU (empty without one)."""
    total = _shifted_sum(x.to(_sum_dtype(x)), weight, cu_seqlens, forward=True)
    y = F.silu(total) if activation else total
    return y.to(x.dtype), (total.to(x.dtype) if activation else x.new_empty(0))


@_forward.register_fake
def _(x, weight, cu_seqlens, activation):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y) if activation else x.new_empty(0)


@custom_op("torchlmoe::causal_conv_backward")
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, activation: bool, total: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype
    x, grad = x.to(_sum_dtype(x)), grad.to(_sum_dtype(x))
    if activation:
        grad = torch.ops.aten.silu_backward(grad, total.to(grad.dtype))
    width = weight.shape[1]
    edges = None if cu_seqlens is None else _edges(cu_seqlens, x.shape[1], width - 1, at_end=False)
    columns = []
    for shift in range(width):
        if shift >= x.shape[1]:
            columns.append(grad.new_zeros(weight.shape[0]))
            continue
        product = grad[:, shift:] * x[:, : x.shape[1] - shift]
        if edges is not None and shift:
            tokens, distance = edges
            crossing = tokens[(distance < shift) & (tokens >= shift)] - shift
            product.index_fill_(1, crossing, 0)
        columns.append(product.sum((0, 1)))
    grad_weight = torch.stack(columns[::-1], 1).to(weight.dtype)
    return _shifted_sum(grad, weight, cu_seqlens, forward=False).to(dtype), grad_weight


@_backward.register_fake
def _(grad, x, weight, cu_seqlens, activation, total):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, cu_seqlens, ctx.activation = inputs
    ctx.save_for_backward(x, weight, cu_seqlens, output[1])
    keep_for_backward(ctx, output[:1], output[1])


def _autograd(ctx, *grads_of_outputs):
    (grad,) = gradients_of(ctx, grads_of_outputs)
    x, weight, cu_seqlens, total = ctx.saved_tensors
    return (*_backward(grad, x, weight, cu_seqlens, ctx.activation, total), None, None)


torch.library.register_autograd("torchlmoe::causal_conv", _autograd, setup_context=_setup_context)
