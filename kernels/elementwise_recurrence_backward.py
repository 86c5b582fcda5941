"""The gradient of the elementwise recurrence; importing it registers the gradient with the forward's operation.

Used beside `elementwise_recurrence.py`, whose notation and parts it shares. With dS_t the gradient of S_t, and z_t what
is left of the state before, exp(G_t) * S_{t-1}:

    dS_t = conj(q_t) do_t^T + conj(exp G_{t+1}) * dS_{t+1}         dk_t = dS_t v_t          dv_t = Re(dS_t^T conj(k_t))
    dG_t = dS_t * conj(z_t)                                        dq_t = conj(S_t) do_t

The chunks are the forward's, now from the last to the first. Each does dS -> conj(P) dS + Y, where P is its decay and
Y = sum_t conj(P_t q_t) do_t^T with P_t the decay from its start to t. Launches 1 and 2 are of the forward's kernels:

    tokens      |  chunk 0   |  chunk 1   |  chunk 2   |
    1 summary      P_0, Y_0     P_1, Y_1     P_2, Y_2
    2 fold       <--- dS_0 <------- dS_1 <------- dS_2 ---  from the final state's to the initial state's
    3 gradient    all others   all others   all others

A program of 3 has a chunk, a head and a tile of columns, and takes the K keys one after another, as in the forward. It
scans the tile both ways: for z, from the state that the chunk found and the forward kept, and for dS. One token a row
is a chunk that found the initial state.

What columns add up to (gradients of q and k) and what tokens add up to (gradients of what is constant) is written once
a program and summed afterwards: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .elementwise_recurrence import (
    Problem,
    chunk_rows,
    elementwise_recurrence,
    exp,
    flops,
    key_tile,
    load,
    log_decay_tile,
    raw,
    scan,
    store,
    strided,
    sum_along,
    tile_columns,
    times,
    value_tile,
)


@triton.jit
def _times_conjugate(a, ai, b, bi, COMPLEX: tl.constexpr):
    """a * conj(b)"""
    if COMPLEX:
        real = a * b + ai * bi
        imaginary = ai * b - a * bi
    else:
        real = a * b
        imaginary = real
    return real, imaginary


@triton.jit
def _gradient_kernel(
    q, k, v, log_decay, step, grad_o, chunks, starts, grad_ends, dq, dk, dv, dlog_decay, dstep,
    num_tokens, num_heads, key_dim, value_dim,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, PER_TOKEN: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    chunk, start, row, length = chunk_rows(chunks, BLOCK_T)
    if length <= 0:
        return
    head, channel, mask = tile_columns(num_heads, value_dim, BLOCK_C, FOLD)
    row_mask, before_mask, after_mask = row < length, (row > 0) & (row <= length), row + 1 < length
    tile_mask = row_mask & mask
    width = num_heads * value_dim
    size = width * key_dim
    starts, grad_ends = starts + chunk * size, grad_ends + chunk * size
    dlog_decay += (start if PER_TOKEN else chunk) * size
    part = chunk * size
    if not FOLD:
        part = (tl.program_id(2).to(tl.int64) * num_tokens + start) * num_heads * key_dim
    dq, dk = dq + part, dk + part
    v_tile = value_tile(v, start, row, row_mask, head, channel, mask)
    v_before = value_tile(v, start, row - 1, before_mask, head, channel, mask)
    grad_tile = value_tile(grad_o, start, row, row_mask, head, channel, mask)
    step_tile, step_after = None, None
    if step is not None:
        step_tile = value_tile(step, start, row, row_mask, head, channel, mask)
        step_after = value_tile(step, start, row + 1, after_mask, head, channel, mask)
    dv_tile = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    dstep_tile = dv_tile
    for key in range(key_dim):
        k_key, ki_key = key_tile(k, start, row, row_mask, head, mask, key, COMPLEX, FOLD)
        q_key, qi_key = key_tile(q, start, row, row_mask, head, mask, key, COMPLEX, FOLD)
        k_before, ki_before = key_tile(k, start, row - 1, before_mask, head, mask, key, COMPLEX, FOLD)
        state = head * key_dim * value_dim + key * value_dim + channel
        # What has decayed, z_t = a_t S_{t-1}, by a scan of its own: S_t - k_t v_t would lose it where a_t is small.
        g, gi = log_decay_tile(log_decay, step_tile, start, row, row_mask, head, channel, mask, key, COMPLEX, PER_TOKEN)
        a, ai = exp(g, gi, COMPLEX)
        x, xi = times(a, ai, k_before * v_before, ki_before * v_before, COMPLEX)
        a, ai, z, zi = scan(a, ai, x, xi, False, COMPLEX)
        first, first_i = load(starts, state, mask, COMPLEX)
        x, xi = times(a, ai, first, first_i, COMPLEX)
        z, zi = z + x, zi + xi
        # The gradient of S_t: conj(q_t) do_t, and what comes back through the decay of the token after it.
        g, gi = log_decay_tile(
            log_decay, step_after, start, row + 1, after_mask, head, channel, mask, key, COMPLEX, PER_TOKEN
        )
        a, ai = exp(g, -gi, COMPLEX)
        a, ai, ds, dsi = scan(a, ai, q_key * grad_tile, -qi_key * grad_tile, True, COMPLEX)
        last, last_i = load(grad_ends, state, mask, COMPLEX)
        x, xi = times(a, ai, last, last_i, COMPLEX)
        ds, dsi = tl.where(tile_mask, ds + x, 0), tl.where(tile_mask, dsi + xi, 0)

        dv_tile += _times_conjugate(ds, dsi, k_key, ki_key, COMPLEX)[0]
        of_q, of_qi = (k_key * v_tile + z) * grad_tile, -(ki_key * v_tile + zi) * grad_tile
        of_k, of_ki = ds * v_tile, dsi * v_tile
        if FOLD:
            store(dq, state, sum_along(of_q, 0), sum_along(of_qi, 0), mask, COMPLEX)
            store(dk, state, sum_along(of_k, 0), sum_along(of_ki, 0), mask, COMPLEX)
        else:
            place = (row * num_heads + head) * key_dim + key
            store(dq, place, sum_along(of_q, 1), sum_along(of_qi, 1), row_mask, COMPLEX)
            store(dk, place, sum_along(of_k, 1), sum_along(of_ki, 1), row_mask, COMPLEX)
        dg, dgi = _times_conjugate(ds, dsi, z, zi, COMPLEX)
        if PER_TOKEN:
            store(dlog_decay, row * size + state, dg, dgi, tile_mask, COMPLEX)
        else:
            if step is not None:
                rate = head * log_decay[2] + key * log_decay[3] + channel * log_decay[4]
                g, gi = load(log_decay[0], rate, mask, COMPLEX)
                dstep_tile += _times_conjugate(dg, dgi, g, gi, COMPLEX)[0]
                dg, dgi = dg * step_tile, dgi * step_tile
            store(dlog_decay, state, sum_along(dg, 0), sum_along(dgi, 0), mask, COMPLEX)
    offset = row * width + head * value_dim + channel
    tl.store(dv + start * width + offset, dv_tile, mask=tile_mask)
    if step is not None:
        tl.store(dstep + start * width + offset, dstep_tile, mask=tile_mask)


@torch.library.custom_op("torchlmoe::elementwise_recurrence_triton_backward", mutates_args=())
def elementwise_recurrence_backward(
    grad_o: Tensor,
    grad_final: Tensor,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    step: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
) -> list[Tensor]:
    """Gradients of q, k, v, log_decay, step and initial_state; an operation cannot return None, so empty if absent."""
    problem = Problem(k if q is None else q, k, v, log_decay, step, cu_seqlens)
    operands = problem.operands() | problem.cut()
    if problem.one_token:  # its chunk finds the initial state
        starts = problem.given_states(torch.zeros_like(grad_final) if initial_state is None else initial_state)
    grad_rows = strided(torch.zeros_like(v) if q is None else grad_o)
    swapped = operands | dict(k=operands["q"], v=grad_rows)
    del swapped["q"]
    ends, grad_initial = problem.summary_and_fold(swapped, grad_final, backward=True)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    dstep = None if step is None else torch.empty_like(step, memory_format=torch.contiguous_format)
    per_chunk = (problem.num_chunks, *problem.matrix)
    per_tile = (problem.grid[2], problem.num_tokens, *problem.matrix[:2])
    # Chunks that there are not write nothing.
    dq, dk = (starts.new_zeros(per_chunk) if problem.fold else starts.new_empty(per_tile) for _ in range(2))
    if problem.shape["PER_TOKEN"]:
        dlog_decay = log_decay.new_empty(log_decay.shape, dtype=(starts if starts.is_complex() else log_decay).dtype)
    else:
        dlog_decay = starts.new_zeros(per_chunk)
    if problem.num_chunks and starts.numel():
        _gradient_kernel[problem.grid](
            **operands, grad_o=grad_rows, starts=raw(starts), grad_ends=raw(ends), dq=raw(dq), dk=raw(dk), dv=dv,
            dlog_decay=raw(dlog_decay), dstep=dstep, num_tokens=problem.num_tokens, **problem.shape, **problem.tile,
        )  # fmt: skip

    def like(x: Tensor | None, grad: Tensor | None, *summed: int) -> Tensor:
        if x is None or grad is None:
            return k.new_empty(0)
        grad = grad.sum(summed) if summed else grad
        grad = grad.real.contiguous() if grad.is_complex() and not x.is_complex() else grad
        return grad.to(x.dtype).view(x.shape)

    def of_key(x: Tensor | None, grad: Tensor) -> Tensor:
        if problem.fold:
            return like(x, grad, 0, 3)
        return like(x, grad, 0) if x is None or x.dim() == 4 else like(x, grad, 0, 1)

    of_decay = like(log_decay, dlog_decay) if log_decay.dim() == 5 else like(log_decay, dlog_decay, 0)
    return [of_key(q, dq), of_key(k, dk), dv, of_decay, like(step, dstep), like(initial_state, grad_initial)]


@elementwise_recurrence_backward.register_fake
def _(grad_o, grad_final, q, k, v, log_decay, step, initial_state, *rest):
    return [
        k.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, log_decay, step, initial_state)
    ]


@register_flop_formula(torch.ops.torchlmoe.elementwise_recurrence_triton_backward, get_raw=True)
def _(grad_o, grad_final, *terms, **kwargs) -> int:
    return 2 * flops(*terms)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])


def _autograd(ctx, grad_o, grad_final, _):
    *inputs, starts = ctx.saved_tensors
    grads = elementwise_recurrence_backward(grad_o, grad_final, *inputs, starts)
    return (*(None if x is None else grad for x, grad in zip(inputs[:6], grads, strict=True)), None)


elementwise_recurrence.register_autograd(_autograd, setup_context=_setup_context)
