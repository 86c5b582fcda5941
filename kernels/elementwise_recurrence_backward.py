"""The gradient of the elementwise recurrence; importing it registers the gradient with the forward's operation.

It has the notation of `elementwise_recurrence.py`. With dS_t the gradient of S_t, and z_t the
decayed preceding state exp(G_t) * S_{t-1}:

    dS_t = conj(q_t) do_t^T + conj(exp G_{t+1}) * dS_{t+1}         dk_t = dS_t v_t          dv_t = Re(dS_t^T conj(k_t))
    dG_t = dS_t * conj(z_t)                                        dq_t = conj(S_t) do_t

The chunks are those of the forward, from the last to the first. Each maps dS to conj(P) dS + Y, where P is its decay
and Y = sum_t conj(P_t q_t) do_t^T with P_t the decay from its start to t. Launches 1 and 2 use the forward's kernels:

    tokens      |  chunk 0   |  chunk 1   |  chunk 2   |
    1 summary      P_0, Y_0     P_1, Y_1     P_2, Y_2
    2 fold       <--- dS_0 <------- dS_1 <------- dS_2 ---  from the final state's to the initial state's
    3 gradient    all others   all others   all others

A program of 3 has a chunk, a head and a tile of columns, and takes the K keys one after another, as in the forward. It
scans the tile in both directions: for z, from the chunk's first state, which the forward kept, and for dS. One token
per row is a chunk whose first state is the initial state.

Sums over columns (gradients of q and k) and over tokens (gradients of constant terms) are written once
per program and summed afterwards: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .elementwise_recurrence import Problem, elementwise_recurrence, flops, raw, strided
from .elementwise_tiles import (
    Complex,
    Rows,
    chunk_rows,
    conjugate,
    exp,
    key_tile,
    load,
    log_decay_tile,
    place,
    plus,
    scaled,
    scan,
    store,
    sum_along,
    tile_columns,
    times,
    value_tile,
    where,
)


@triton.jit
def _times_conjugate(a, b, COMPLEX: tl.constexpr):
    """a * conj(b)"""
    if COMPLEX:
        real = a.real * b.real + a.imaginary * b.imaginary
        imaginary = a.imaginary * b.real - a.real * b.imaginary
    else:
        real = a.real * b.real
        imaginary = real
    return Complex(real, imaginary)


@triton.jit
def _gradient_kernel(
    terms, grad_o, chunks, starts, grad_ends, dq, dk, dv, dlog_decay, dstep, num_tokens, num_heads, key_dim, value_dim,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, PER_TOKEN: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    q, k, v, log_decay, step = terms
    chunk, head, tile = place(num_heads, value_dim, BLOCK_C, FOLD)
    start, row, length = chunk_rows(chunks, chunk, BLOCK_T)
    if length <= 0:
        return
    columns = tile_columns(head, tile, num_heads, value_dim, BLOCK_C, FOLD)
    rows, has_before, has_after = Rows(start, row, row < length), (row > 0) & (row <= length), row + 1 < length
    tile_mask = rows.mask & columns.mask
    width = num_heads * value_dim
    size = width * key_dim
    starts, grad_ends = starts + chunk * size, grad_ends + chunk * size
    dlog_decay += (start if PER_TOKEN else chunk) * size
    part = chunk * size
    if not FOLD:
        part = (tile.to(tl.int64) * num_tokens + start) * num_heads * key_dim
    dq, dk = dq + part, dk + part
    v_tile = value_tile(v, rows, columns)
    before, after = Rows(start, row - 1, has_before), Rows(start, row + 1, has_after)
    v_before = value_tile(v, before, columns)
    grad_tile = value_tile(grad_o, rows, columns)
    step_tile, step_after = None, None
    if step is not None:
        step_tile = value_tile(step, rows, columns)
        step_after = value_tile(step, after, columns)
    dv_tile = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    dstep_tile = dv_tile
    for key in range(key_dim):
        k_key = key_tile(k, rows, columns, key, COMPLEX, FOLD)
        q_key = key_tile(q, rows, columns, key, COMPLEX, FOLD)
        k_before = key_tile(k, before, columns, key, COMPLEX, FOLD)
        state = columns.head * key_dim * value_dim + key * value_dim + columns.channel
        # z_t = a_t S_{t-1} comes from a separate scan: S_t - k_t v_t would lose its digits if a_t is small.
        a = exp(log_decay_tile(log_decay, step_tile, rows, columns, key, COMPLEX, PER_TOKEN), COMPLEX)
        a, z = scan(a, times(a, scaled(k_before, v_before), COMPLEX), False, COMPLEX)
        z = plus(z, times(a, load(starts, state, columns.mask, COMPLEX), COMPLEX))
        # The gradient of S_t: conj(q_t) do_t, and the gradient through the decay of the next token.
        g = log_decay_tile(log_decay, step_after, after, columns, key, COMPLEX, PER_TOKEN)
        a, ds = scan(exp(conjugate(g), COMPLEX), scaled(conjugate(q_key), grad_tile), True, COMPLEX)
        ds = plus(ds, times(a, load(grad_ends, state, columns.mask, COMPLEX), COMPLEX))
        ds = where(tile_mask, ds)

        dv_tile += _times_conjugate(ds, k_key, COMPLEX).real
        of_q = scaled(conjugate(plus(scaled(k_key, v_tile), z)), grad_tile)
        of_k = scaled(ds, v_tile)
        if FOLD:
            store(dq, state, sum_along(of_q, 0), columns.mask, COMPLEX)
            store(dk, state, sum_along(of_k, 0), columns.mask, COMPLEX)
        else:
            of_token = (row * num_heads + columns.head) * key_dim + key
            store(dq, of_token, sum_along(of_q, 1), rows.mask, COMPLEX)
            store(dk, of_token, sum_along(of_k, 1), rows.mask, COMPLEX)
        dg = _times_conjugate(ds, z, COMPLEX)
        if PER_TOKEN:
            store(dlog_decay, row * size + state, dg, tile_mask, COMPLEX)
        else:
            if step is not None:
                head, channel = columns.head, columns.channel
                rate = head * log_decay.head_stride + key * log_decay.key_stride + channel * log_decay.value_stride
                g = load(log_decay.pointer, rate, columns.mask, COMPLEX)
                dstep_tile += _times_conjugate(dg, g, COMPLEX).real
                dg = scaled(dg, step_tile)
            store(dlog_decay, state, sum_along(dg, 0), columns.mask, COMPLEX)
    offset = row * width + columns.head * value_dim + columns.channel
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
    terms, (chunks, first_chunk) = problem.terms(), problem.cut()
    if problem.one_token:  # its chunk finds the initial state
        starts = problem.given_states(torch.zeros_like(grad_final) if initial_state is None else initial_state)
    grad_rows = strided(torch.zeros_like(v) if q is None else grad_o)
    swapped = terms._replace(k=terms.q, v=grad_rows)
    ends, grad_initial = problem.summary_and_fold(swapped, chunks, first_chunk, grad_final, backward=True)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    dstep = None if step is None else torch.empty_like(step, memory_format=torch.contiguous_format)
    per_chunk = (problem.num_chunks, *problem.matrix)
    per_tile = (problem.tiles, problem.num_tokens, *problem.matrix[:2])
    # Chunks that there are not write nothing.
    dq, dk = (starts.new_zeros(per_chunk) if problem.fold else starts.new_empty(per_tile) for _ in range(2))
    if problem.shape["PER_TOKEN"]:
        dlog_decay = log_decay.new_empty(log_decay.shape, dtype=(starts if starts.is_complex() else log_decay).dtype)
    else:
        dlog_decay = starts.new_zeros(per_chunk)
    if problem.num_chunks and starts.numel():
        _gradient_kernel[problem.grid](
            terms, grad_rows, chunks, raw(starts), raw(ends), raw(dq), raw(dk), dv, raw(dlog_decay), dstep,
            num_tokens=problem.num_tokens, **problem.shape, **problem.tile,
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
