"""Depthwise causal convolution over tokens, with SiLU, that keeps documents apart.

    y_t = silu(bias + sum_i w_i x_{t-i})        i = 0 .. width - 1, without tokens of earlier documents

On a GPU kernels/causal_conv.py computes it. Otherwise it is one operation to torch, a sum of shifted multiply-adds: on
a CPU several times faster than `conv1d`. It keeps the sum before the SiLU. Sums are in at least float32.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlmoe.ops.checks import check_bounds_at_hand, num_documents
from torchlmoe.ops.kernel_backend import kernels_serve, within_reach
from torchlmoe.ops.operation import custom_op, gradients_of, keep_for_backward, operation
from torchlmoe.ops.row_sum import row_sum


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


def _columns(weight: Tensor, like: Tensor) -> list[Tensor]:
    """The weights of the token itself, the one before it, and so on, each [channels]."""
    return list(weight.to(like.dtype).T.flip(0).contiguous().unbind())


def _shifts(x: Tensor, width: int, cu_seqlens: Tensor | None, forward: bool) -> Iterator[tuple[int, slice, slice]]:
    """For i = 1 .. width - 1: i, the tokens t, and the tokens t - i that they see (t + i for the backward).

    It clears x at the tokens that another document would see."""
    length = x.shape[1]
    bounds = None if cu_seqlens is None else cu_seqlens[1:-1].long()
    for shift in range(1, min(width, length)):
        if bounds is not None:
            # A token outside the row becomes one at its other end, which no token sees any more.
            x.index_fill_(1, (bounds - shift if forward else bounds + shift - 1) % length, 0)
        earlier, later = slice(length - shift), slice(shift, length)
        yield (shift, later, earlier) if forward else (shift, earlier, later)


@custom_op("torchlmoe::causal_conv")
def _forward(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, activation: bool) -> tuple[Tensor, Tensor]:
    """Returns y, and the sum before the SiLU (empty without one)."""
    check_bounds_at_hand(cu_seqlens, x.shape[1])  # here too, since a compiled caller could not check
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=cu_seqlens is not None)
    columns = _columns(weight, wide)
    total = wide * columns[0]
    for shift, tokens, seen in _shifts(wide, weight.shape[1], cu_seqlens, forward=True):
        total[:, tokens].addcmul_(wide[:, seen], columns[shift])
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
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    grad = grad.to(wide.dtype, copy=not activation and cu_seqlens is not None)
    if activation:
        grad = torch.ops.aten.silu_backward(grad, total.to(grad.dtype))
    columns = _columns(weight, grad)
    grad_x, product = grad * columns[0], grad * wide
    grad_columns = [row_sum(product.flatten(0, 1)), *(torch.zeros_like(column) for column in columns[1:])]
    for shift, tokens, seen_by in _shifts(grad, weight.shape[1], cu_seqlens, forward=False):
        grad_x[:, tokens].addcmul_(grad[:, seen_by], columns[shift])
        torch.mul(grad[:, seen_by], wide[:, tokens], out=product[:, tokens])
        product[:, tokens.stop] = 0
        grad_columns[shift] = row_sum(product.flatten(0, 1))
    return grad_x.to(x.dtype), torch.stack(grad_columns[::-1], 1).to(weight.dtype)


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
