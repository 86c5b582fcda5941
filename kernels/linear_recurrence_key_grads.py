"""Part of the gradient of the linear recurrence: the kernel of everything that is as wide as a key.

`linear_recurrence_backward.py` has the formulas.
"""

import triton
import triton.language as tl

from .recurrence_tiles import (
    ERASE_K,
    INVERSE,
    Q_ERASE_KEY,
    QK,
    Chunk,
    Columns,
    Entry,
    add_dot,
    chunk_at,
    diagonal_of,
    dot,
    erase_tile,
    from_start,
    halfway,
    load_state,
    log2_tile,
    matrix_at,
    of_other_half,
    per_head,
    start_of,
    store_tile,
    tile,
    to_end,
    transposed,
    within_blocks,
)

# The gradients of a chunk's scores lie as what the forward makes of these: that of
# <erase, erase_key> where the inverse lies.
ERASE_ERASE_KEY = INVERSE


@triton.jit
def passing_each(read, written, within, rows, BEFORE: tl.constexpr):
    """Sum the terms that pass through each token's decay [C]: reads from the chunk's first state [C], writes to its
    last state [C], and reads of one token from another [C, C]."""
    earlier = rows[:, None] < rows[None, :]
    if BEFORE:
        later = rows[:, None] > rows[None, :]
        read_after = tl.dot(tl.where(earlier, 1.0, 0.0), within, input_precision="ieee")
    else:
        later = rows[:, None] >= rows[None, :]
        read_after = tl.cumsum(within, 0, reverse=True)
    of_ends = tl.where(later, read[:, None], tl.where(earlier, written[:, None], 0.0))
    return tl.sum(of_ends, 0) + tl.sum(tl.where(rows[:, None] > rows[None, :], read_after, 0.0), 1)


@triton.jit
def store_number(x, x_C, chunk, head, number):
    """Into x[row, token + rows, head, number]."""
    start = start_of(x, chunk.row, chunk.token, head)
    tl.store(start + chunk.rows * x.token_stride + number, x_C, mask=chunk.rows < chunk.valid)


@triton.jit
def reader_grads(
    x_CK, dx_CK, k_CK, dk_CK, erase_key_CK, derase_key_CK, of_k, of_erase_key, written_CK, g, chunk, head, keys,
    C: tl.constexpr, D: tl.constexpr, BEFORE: tl.constexpr, PER_CHANNEL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Adds what x, that is q or erase or None, reads of the chunk's own tokens to dx, dk and derase_key. of_k and
    of_erase_key are the gradients of its scores. Also returns the terms that pass through each token's decay: with a
    decay per channel all of them [C, D], `written` to the chunk's last state included; otherwise reads of one token
    from another [C, C]."""
    if not PER_CHANNEL:
        passing = tl.zeros([C, C], tl.float32)
        if x_CK is not None:
            dx_CK = add_dot(dx_CK, of_k, k_CK, DOT)
            dk_CK = add_dot(dk_CK, transposed(of_k, DOT), x_CK, DOT)
            if g is not None:
                passing += of_k * dot(x_CK, transposed(k_CK, DOT), DOT)
            if of_erase_key is not None:
                dx_CK = add_dot(dx_CK, of_erase_key, erase_key_CK, DOT)
                derase_key_CK = add_dot(derase_key_CK, transposed(of_erase_key, DOT), x_CK, DOT)
                if g is not None:
                    passing += of_erase_key * dot(x_CK, transposed(erase_key_CK, DOT), DOT)
    else:
        rows, g_CK = chunk.rows, log2_tile(g, chunk, head, keys)
        passing = tl.zeros([C, D], tl.float32)
        read_CK = passing
        if x_CK is not None:
            read_CK += x_CK * dx_CK
        for level in tl.static_range(6):
            if (32 >> level) < C:
                is_later = ((rows // (32 >> level)) % 2 == 1)[:, None]
                passing += of_other_half(tl.where(is_later, read_CK, written_CK), 32 >> level, C, D)
                if x_CK is not None:
                    later, earlier = halfway(g_CK, rows, 32 >> level, BEFORE, C, D)
                    here = within_blocks(of_k, rows, 64 >> level)
                    by_x = dot(here, k_CK * earlier, DOT)
                    by_k = dot(transposed(here, DOT), x_CK * later, DOT) * earlier
                    dk_CK += by_k
                    written_CK += k_CK * by_k
                    if of_erase_key is not None:
                        here = within_blocks(of_erase_key, rows, 64 >> level)
                        by_x = add_dot(by_x, here, erase_key_CK * earlier, DOT)
                        by_erase_key = dot(transposed(here, DOT), x_CK * later, DOT) * earlier
                        derase_key_CK += by_erase_key
                        written_CK += erase_key_CK * by_erase_key
                    by_x *= later
                    dx_CK += by_x
                    read_CK += x_CK * by_x
        if not BEFORE:
            passing += read_CK
    return dx_CK, dk_CK, derase_key_CK, passing


@triton.jit
def key_grads_through_states(
    terms, n, do, dz, states, state_grads, chunk, head, entry, keys,
    V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The parts of dq, dk, derase and derase_key that are products with the chunk's first state or with the gradient of
    its last one, each without its decay; and the sum of terms that pass through the whole chunk, [K]. Sums over V."""
    q, v, g, erase_key, h, u = terms.q, terms.v, terms.g, terms.erase_key, terms.h, terms.u
    dq_CK = tl.zeros([C, BLOCK_K], tl.float32)
    dk_CK, derase_CK, derase_key_CK = dq_CK, dq_CK, dq_CK
    through_K = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, V, BLOCK_V):
        values = Columns(first + tl.arange(0, BLOCK_V), V)
        state_KV = load_state(states, entry, keys, values)
        grad_KV = load_state(state_grads, entry, keys, values)
        end_CV, whole_V = to_end(h, chunk, head, values, True)
        if n is None or erase_key is not None:
            w_CV = tile(v, chunk, head, values)
        if n is not None:
            n_CV = tile(n, chunk, head, values)
            dz_CV = tile(dz, chunk, head, values)
            derase_CK -= dot(dz_CV, transposed(state_KV, DOT), DOT)
            if erase_key is None:
                w_CV = n_CV
            else:
                derase_key_CK = add_dot(derase_key_CK, n_CV, transposed(grad_KV, DOT), DOT)
        dk_CK = add_dot(dk_CK, w_CV * end_CV, transposed(grad_KV, DOT), DOT)
        if q is not None:
            do_CV = tile(do, chunk, head, values)
            start_CV = from_start(h, chunk, head, values, True, u is not None)
            dq_CK = add_dot(dq_CK, do_CV * start_CV, transposed(state_KV, DOT), DOT)
        if g is not None:
            through_K += tl.sum(state_KV * grad_KV * whole_V[None, :], 1)
    return dq_CK, dk_CK, derase_CK, derase_key_CK, through_K


@triton.jit
def key_grads_kernel(
    terms, n, grads, states, state_grads, do, dz, dq, dk, dg, derase, derase_key, du, documents, scale, heads,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PER_CHANNEL: tl.constexpr, IS_BETA: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradients of q, k, g, erase, erase_key and u. dg and derase of one number sum this tile's channels."""
    q, k, g, erase, erase_key, u = terms.q, terms.k, terms.g, terms.erase, terms.erase_key, terms.u
    tiles = tl.cdiv(K, BLOCK_K)
    slot, head = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    row, token, valid = chunk_at(documents, slot, SPAN, C)
    if valid <= 0:
        return
    number = tl.program_id(0) % tiles
    rows, keys = tl.arange(0, C), Columns(number * BLOCK_K + tl.arange(0, BLOCK_K), K)
    chunk, entry = Chunk(row, token, rows, valid), Entry(slot, head, heads)
    dq_CK, dk_CK, derase_CK, derase_key_CK, through_K = key_grads_through_states(
        terms, n, do, dz, states, state_grads, chunk, head, entry, keys, V, C, BLOCK_K, BLOCK_V, DOT
    )  # fmt: skip
    start_CK = from_start(g, chunk, head, keys, PER_CHANNEL, u is not None)
    end_CK, whole_K = to_end(g, chunk, head, keys, PER_CHANNEL)
    k_CK = tile(k, chunk, head // GROUP, keys)
    dk_CK *= end_CK
    written_CK = k_CK * dk_CK
    erase_key_CK = None
    if erase_key is not None:
        erase_key_CK = tile(erase_key, chunk, head, keys)
        derase_key_CK *= end_CK
        written_CK += erase_key_CK * derase_key_CK
    if PER_CHANNEL:
        passing = tl.zeros([C, BLOCK_K], tl.float32) + (through_K * whole_K)[None, :]
    else:
        passing = tl.zeros([C, C], tl.float32)
        read_C, written_C = tl.zeros([C], tl.float32), tl.sum(written_CK, 1)

    q_CK, of_k, of_erase_key = None, None, None
    if q is not None:
        q_CK = tile(q, chunk, head // GROUP, keys)
        dq_CK *= start_CK
        of_k = tl.load(matrix_at(grads, QK, entry, rows, C))
        own_C = diagonal_of(of_k.to(tl.float32), rows)
        if u is not None:
            of_k = tl.where(rows[:, None] > rows[None, :], of_k, 0.0)
        if erase_key is not None:
            of_erase_key = tl.load(matrix_at(grads, Q_ERASE_KEY, entry, rows, C))
        if not PER_CHANNEL:
            read_C += tl.sum(q_CK * dq_CK, 1)
    dq_CK, dk_CK, derase_key_CK, passed = reader_grads(
        q_CK, dq_CK, k_CK, dk_CK, erase_key_CK, derase_key_CK, of_k, of_erase_key, written_CK, g, chunk, head, keys,
        C, BLOCK_K, u is not None, PER_CHANNEL, DOT,
    )  # fmt: skip
    passing += passed
    if q is not None:
        if PER_CHANNEL or u is not None:
            own = own_C[:, None]
            if u is not None:
                own *= per_head(u, head, keys)[None, :]
                place = du + (slot.to(tl.int64) * heads + head) * K + keys.cols
                tl.store(place, tl.sum(own_C[:, None] * q_CK * k_CK, 0) * scale, mask=keys.cols < K)
            dq_CK += own * k_CK
            dk_CK += own * q_CK
            if erase_key is not None:
                own = diagonal_of(of_erase_key.to(tl.float32), rows)[:, None]
                dq_CK += own * erase_key_CK
                derase_key_CK += own * q_CK
        store_tile(dq, dq_CK * scale, chunk, head, keys)

    if erase is not None:
        of_k, of_erase_key = tl.load(matrix_at(grads, ERASE_ERASE_KEY, entry, rows, C)), None
        writer_CK = k_CK
        if erase_key is not None:
            of_k, of_erase_key = tl.load(matrix_at(grads, ERASE_K, entry, rows, C)), of_k
            writer_CK = erase_key_CK
        erase_CK, beta_C1 = erase_tile(erase, writer_CK, chunk, head, keys, IS_BETA)
        erase_CK *= beta_C1
        derase_CK *= start_CK * (1 / scale)
        if not PER_CHANNEL:
            read_C += tl.sum(erase_CK * derase_CK, 1)
        derase_CK, dk_CK, derase_key_CK, passed = reader_grads(
            erase_CK, derase_CK, k_CK, dk_CK, erase_key_CK, derase_key_CK, of_k, of_erase_key,
            tl.zeros([C, BLOCK_K], tl.float32), g, chunk, head, keys, C, BLOCK_K, u is not None, PER_CHANNEL, DOT,
        )  # fmt: skip
        passing += passed
        if IS_BETA:
            store_number(derase, tl.sum(derase_CK * writer_CK, 1) * scale, chunk, head, number)
            if erase_key is None:
                dk_CK += derase_CK * beta_C1
            else:
                derase_key_CK += derase_CK * beta_C1
        else:
            store_tile(derase, derase_CK * scale, chunk, head, keys)
        if erase_key is not None:
            store_tile(derase_key, derase_key_CK * scale, chunk, head, keys)
    store_tile(dk, dk_CK * scale, chunk, head, keys)
    if PER_CHANNEL:
        store_tile(dg, passing * scale, chunk, head, keys)
    elif g is not None:
        passing_C = passing_each(read_C, written_C, passing, rows, u is not None) + tl.sum(through_K * whole_K, 0)
        store_number(dg, passing_C * scale, chunk, head, number)
