"""The linear recurrence chunk by chunk: forward, state of a span, and one token at a time.

    S_t = (I - erase_key_t erase_t^T) diag(exp g_t) S_{t-1} diag(exp h_t) + k_t v_t^T          o_t = scale * S_t^T q_t

One family with flags. A term that is absent is None and its code is not compiled, so the same file serves linear
attention, Lightning, Retention, GLA, HGRN2, RWKV6 (bonus u), Mamba2, GateLoop, Based, ReBased, DeltaNet, Gated
DeltaNet, KDA, RWKV7 (erase_key is not k), GSA and gated fast weights (h). g, the log decay: none, per head or token
(scalar) or per channel. h is the log decay of the values.

A document is cut into chunks of C tokens; a program owns one head and V's columns in tiles of BLOCK_V:

             K             BLOCK_V           n = T (z - (erase exp G) S)        the new value, for z = v
        +-----------+     +-------+          o = (q exp G) S + P n              P = <q, k>, [C, C]
      C | q k erase |  * K|   S   |  -> C    S = exp(G_C) S + (k exp(G_C - G))^T n
        +-----------+     +-------+          T = (I + strict <erase, k>)^-1, [C, C]

G is the running sum of g in a chunk. Without erase, n is v. If erase_key is not k, k writes v and erase_key writes n,
with z = -<erase, k> v.

  scores_kernel  per chunk and head: P and T, if several programs need one of them or it is costly: [C, C] per chunk.
  scan_kernel    S in registers, float32. If documents x heads x tiles fill the chip, one pass through a document writes
                 o and stores no state. Otherwise a first pass stores S at the start of every span of a few chunks,
                 and a second one computes o of all spans in parallel.
  step_kernel    documents of about one token each: token by token, with a read and a write of the state.

Scores with a decay per channel: C is halved down to single tokens. If the reader is in the later half of a block and
the writer in the earlier half, the decay is a product of two factors relative to the middle, so each level is one
matrix product and no exponent is positive. A scalar decay multiplies the matrix; its sums are float64, so that gates
of -30 do not cost the others digits.

Tensors are passed to a kernel with their strides (`Strided`), and are copied only if their last dim is not
contiguous. Named tuples bundle related arguments, on the host and in a kernel; the compiler takes them apart.
Nothing here waits for the device. The gradient is in `linear_recurrence_backward.py`.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-160.0)  # exp2 of it is zero: a gate of -inf becomes this, so that sums are finite


# Indices of a chunk's score matrices [C, C]. Rows are readers (q or erase), columns are writers (k, or erase_key if it
# is not k).
QK = tl.constexpr(0)  # P = <q, k>
INVERSE = tl.constexpr(1)  # T = (I + strict <erase, erase_key>)^-1
Q_ERASE_KEY = tl.constexpr(2)
ERASE_K = tl.constexpr(3)


class Strided(NamedTuple):
    """A kernel's view of a tensor [B, T, heads, width] or [B, T, heads]; the stride of width is 1."""

    pointer: Any
    row_stride: Any
    token_stride: Any
    head_stride: Any


class Terms(NamedTuple):
    """The terms of the recurrence; None if absent."""

    q: Any
    k: Any
    v: Any
    g: Any  # log_decay
    erase: Any  # the vector, or beta for beta * erase_key
    erase_key: Any  # None if it is k
    h: Any  # value_log_decay
    u: Any  # bonus, [heads, K]


class Matrices(NamedTuple):
    """Matrices [C, C] of every chunk and head, numbered QK, INVERSE, QB and EK."""

    pointer: Any
    per_chunk: Any  # how many there are


class Documents(NamedTuple):
    """Where documents are: one a row of `length` tokens, or, if there are bounds, packed into one row."""

    length: Any
    bounds: Any  # [N + 1]
    first_spans: Any  # the number of each document's first span, [N + 1]
    owners: Any  # the document of each span


class Chunk(NamedTuple):
    """The tokens that a program takes together."""

    row: Any
    token: Any  # the first
    rows: Any  # 0 .. C - 1
    valid: Any  # how many of them are tokens of the document; not above 0: none


class Columns(NamedTuple):
    """A tile's columns, of keys or of values."""

    cols: Any
    width: Any  # how many there are in all


class Entry(NamedTuple):
    """An index into tensors with one entry per chunk (or span, or document) and head."""

    index: Any
    head: Any
    heads: Any


@triton.jit
def start_of(x, row, token, head):
    """Points to x[row, token, head]."""
    return x.pointer + (
        row.to(tl.int64) * x.row_stride + token.to(tl.int64) * x.token_stride + head.to(tl.int64) * x.head_stride
    )


@triton.jit
def tile_at(x, chunk, head, columns):
    """Points to x[row, token + rows, head, cols]; and which of these there are."""
    start = start_of(x, chunk.row, chunk.token, head)
    inside = (chunk.rows < chunk.valid)[:, None] & (columns.cols < columns.width)[None, :]
    return start + chunk.rows[:, None] * x.token_stride + columns.cols[None, :], inside


@triton.jit
def tile(x, chunk, head, columns):
    """x[row, token + rows, head, cols] in float32, zero beyond the chunk's tokens and the width of x."""
    pointers, inside = tile_at(x, chunk, head, columns)
    return tl.load(pointers, mask=inside, other=0).to(tl.float32)


@triton.jit
def store_tile(x, x_tile, chunk, head, columns):
    pointers, inside = tile_at(x, chunk, head, columns)
    tl.store(pointers, x_tile, mask=inside)


@triton.jit
def column(x, chunk, head):
    """x[row, token + rows, head] of one number a token."""
    start = start_of(x, chunk.row, chunk.token, head)
    return tl.load(start + chunk.rows * x.token_stride, mask=chunk.rows < chunk.valid, other=0).to(tl.float32)


@triton.jit
def erase_tile(erase, erase_key_CK, chunk, head, keys, IS_BETA: tl.constexpr):
    """erase as a tile and a factor of its rows: a beta per token gives the tile erase_key and the factor beta."""
    if IS_BETA:
        return erase_key_CK, column(erase, chunk, head)[:, None]
    else:
        return tile(erase, chunk, head, keys), tl.full([1, 1], 1.0, tl.float32)


@triton.jit
def per_head(u, head, keys):
    """u [heads, K] of a head, a row."""
    return tl.load(u + head * keys.width + keys.cols, mask=keys.cols < keys.width, other=0).to(tl.float32)


@triton.jit
def own_score(q_CK, k_CK, u, head, keys):
    """The score of a token with itself: q k, or with the bonus q u k."""
    if u is None:
        return tl.sum(q_CK * k_CK, 1)
    else:
        return tl.sum(q_CK * k_CK * per_head(u, head, keys), 1)


@triton.jit
def log2_tile(decay, chunk, head, columns):
    return tl.maximum(tile(decay, chunk, head, columns) * LOG2_E, LOWEST)


@triton.jit
def log2_column(decay, chunk, head):
    return tl.maximum(column(decay, chunk, head) * LOG2_E, LOWEST).to(tl.float64)


@triton.jit
def from_start(decay, chunk, head, columns, PER_CHANNEL: tl.constexpr, BEFORE: tl.constexpr):
    """The decay from the chunk's start to each reader: [C, D], [C, 1] or [1, 1].

    BEFORE: a reader reads before its own decay.
    """
    if decay is None:
        return tl.full([1, 1], 1.0, tl.float32)
    elif PER_CHANNEL:
        g = log2_tile(decay, chunk, head, columns)
        total = tl.cumsum(g, 0)
        return tl.exp2(total - g if BEFORE else total)
    else:
        g = log2_column(decay, chunk, head)
        total = tl.cumsum(g, 0)
        return tl.exp2((total - g if BEFORE else total).to(tl.float32))[:, None]


@triton.jit
def to_end(decay, chunk, head, columns, PER_CHANNEL: tl.constexpr):
    """The decay from each writer to the chunk's end, and the decay of the whole chunk: [D] or [1]."""
    if decay is None:
        return tl.full([1, 1], 1.0, tl.float32), tl.full([1], 1.0, tl.float32)
    elif PER_CHANNEL:
        g = log2_tile(decay, chunk, head, columns)
        return tl.exp2(tl.cumsum(g, 0, reverse=True) - g), tl.exp2(tl.sum(g, 0))
    else:
        g = log2_column(decay, chunk, head)
        whole = tl.sum(g, 0) + tl.zeros([1], tl.float64)
        return tl.exp2((whole - tl.cumsum(g, 0)).to(tl.float32))[:, None], tl.exp2(whole.to(tl.float32))


@triton.jit
def decay_matrix(decay, chunk, head, BEFORE: tl.constexpr):
    """The decay from token j to token i, [C, C], zero above the diagonal; with BEFORE, on it too."""
    rows = chunk.rows
    if BEFORE:
        seen = rows[:, None] > rows[None, :]
    else:
        seen = rows[:, None] >= rows[None, :]
    if decay is None:
        return tl.where(seen, 1.0, 0.0)
    else:
        g = log2_column(decay, chunk, head)
        written = tl.cumsum(g, 0)
        read = written - g if BEFORE else written
        # Each as a sum of two float32, so that it is not the matrix that has to be float64.
        read_high, written_high = read.to(tl.float32), written.to(tl.float32)
        read_low, written_low = (read - read_high).to(tl.float32), (written - written_high).to(tl.float32)
        passed = (read_high[:, None] - written_high[None, :]) + (read_low[:, None] - written_low[None, :])
        return tl.exp2(tl.where(seen, passed, -float("inf")))


@triton.jit
def halfway(g, rows, SIZE: tl.constexpr, BEFORE: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """In blocks of 2 * SIZE tokens, the decay from the middle to readers in the later half, and from writers in the
    earlier half to the middle: [C, D] each, zero in the other half. g: log2 of the decay."""
    halves = tl.reshape(g, [C // SIZE, SIZE, D])
    read = tl.reshape(tl.cumsum(halves, 1), [C, D])
    if BEFORE:
        read -= g
    written = tl.reshape(tl.cumsum(halves, 1, reverse=True), [C, D]) - g
    later = ((rows // SIZE) % 2 == 1)[:, None]
    factor = tl.exp2(tl.where(later, read, written))
    return tl.where(later, factor, 0.0), tl.where(later, 0.0, factor)


@triton.jit
def within_blocks(x, rows, SIZE: tl.constexpr):
    """x [C, C] if both tokens are in one block of SIZE, else zero."""
    return tl.where((rows // SIZE)[:, None] == (rows // SIZE)[None, :], x, 0.0)


@triton.jit
def on_diagonal(x, rows):
    return tl.where(rows[:, None] == rows[None, :], x[:, None], 0.0)


@triton.jit
def diagonal_of(x, rows):
    return tl.sum(tl.where(rows[:, None] == rows[None, :], x, 0.0), 1)


@triton.jit
def transposed(x, DOT: tl.constexpr):
    """x^T as an operand. Narrowed first, which undoes the widening of what was loaded, it stays in shared memory."""
    return tl.trans(x.to(DOT))


@triton.jit
def dot(a, b, DOT: tl.constexpr):
    return add_dot(tl.zeros([a.shape[0], b.shape[1]], tl.float32), a, b, DOT)


@triton.jit
def add_dot(onto, a, b, DOT: tl.constexpr):
    """onto + a b. In float32, without tensor cores, a thread holds all it multiplies: wide products are made in two."""
    a, b = a.to(DOT), b.to(DOT)
    if a.dtype == tl.float32 and a.shape[1] > 128:
        a0, a1 = tl.split(tl.permute(tl.reshape(a, [a.shape[0], 2, a.shape[1] // 2]), (0, 2, 1)))
        b0, b1 = tl.split(tl.permute(tl.reshape(b, [2, b.shape[0] // 2, b.shape[1]]), (1, 2, 0)))
        return tl.dot(a1, b1, tl.dot(a0, b0, onto, input_precision="ieee"), input_precision="ieee")
    else:
        return tl.dot(a, b, onto, input_precision="ieee")


@triton.jit
def read_state(x_CK, decay, state_KV, PER_CHANNEL: tl.constexpr, DOT: tl.constexpr):
    """(x * decay) S. A decay of one number per token is applied after the product, so x is an operand as loaded."""
    if PER_CHANNEL:
        return dot(x_CK * decay, state_KV, DOT)
    else:
        return dot(x_CK, state_KV, DOT) * decay


@triton.jit
def add_to_state(state_KV, x_CK, decay, w_CV, PER_CHANNEL: tl.constexpr, DOT: tl.constexpr):
    """S + (x * decay)^T w."""
    if PER_CHANNEL:
        return add_dot(state_KV, transposed(x_CK * decay, DOT), w_CV, DOT)
    else:
        return add_dot(state_KV, transposed(x_CK, DOT), w_CV * decay, DOT)


@triton.jit
def unit_lower_inverse(lower, rows, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 of a strictly lower L [C, C]: blocks of 16 row by row, then halves and the block between them."""
    N: tl.constexpr = C // 16
    number = tl.arange(0, N)
    same = number[:, None, None, None] == number[None, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(lower, [N, 16, N, 16]), 0.0), 2)
    index = tl.arange(0, 16)
    inverse = tl.where((index[:, None] == index[None, :])[None], 1.0, 0.0) + tl.zeros([N, 16, 16], tl.float32)
    for i in range(1, 16):
        this = (index == i)[None, :, None]
        row = tl.sum(tl.where(this, blocks, 0.0), 1)
        inverse -= tl.where(this, tl.sum(row[:, :, None] * inverse, 1)[:, None, :], 0.0)
    inverse = tl.reshape(tl.where(same, inverse[:, :, None, :], 0.0), [C, C])
    for level in tl.static_range(4, 6):
        if (1 << level) < C:
            later = (rows >> level) % 2 == 1
            between = tl.where(later[:, None] & (later == 0)[None, :], within_blocks(lower, rows, 2 << level), 0.0)
            below = tl.dot(between, inverse, input_precision=PRECISION)
            inverse -= tl.dot(inverse, below, input_precision=PRECISION)
    return inverse


@triton.jit
def document_of(documents, span, SPAN: tl.constexpr):
    """The document to which a span of SPAN tokens belongs."""
    if documents.bounds is None:
        return span // tl.cdiv(documents.length, SPAN)
    else:
        return tl.load(documents.owners + span)


@triton.jit
def bounds_of(documents, document, SPAN: tl.constexpr):
    """A document's row, its first token there and the one past its last, and its first span."""
    if documents.bounds is None:
        zero = document * 0
        return document, zero, zero + documents.length, document * tl.cdiv(documents.length, SPAN)
    else:
        start, end = tl.load(documents.bounds + document), tl.load(documents.bounds + document + 1)
        return document * 0, start, end, tl.load(documents.first_spans + document)


@triton.jit
def chunk_at(documents, slot, SPAN: tl.constexpr, C: tl.constexpr):
    """The row and first token of the chunk in a slot, and how many tokens it has (none, or less, in unused slots)."""
    span = slot // (SPAN // C)
    row, start, end, first = bounds_of(documents, document_of(documents, span, SPAN), SPAN)
    token = start + (span - first) * SPAN + slot % (SPAN // C) * C
    return row, token, end - token


@triton.jit
def matrix_at(matrices, name: tl.constexpr, entry, rows, C: tl.constexpr):
    """Points to the matrix with this name of a chunk, [C, C]."""
    number = entry.index.to(tl.int64) * entry.heads + entry.head
    start = matrices.pointer + (number * matrices.per_chunk + name) * C * C
    return start + rows[:, None] * C + rows[None, :]


@triton.jit
def state_at(states, entry, keys, values):
    """Points to a tile of states[entry] [K, V]; and which elements there are."""
    start = states + (entry.index.to(tl.int64) * entry.heads + entry.head) * keys.width * values.width
    inside = (keys.cols < keys.width)[:, None] & (values.cols < values.width)[None, :]
    return start + keys.cols[:, None] * values.width + values.cols[None, :], inside


@triton.jit
def load_state(states, entry, keys, values):
    """A tile of states[entry] in float32."""
    pointers, inside = state_at(states, entry, keys, values)
    return tl.load(pointers, mask=inside, other=0).to(tl.float32)


@triton.jit
def store_state(states, state_KV, entry, keys, values):
    pointers, inside = state_at(states, entry, keys, values)
    tl.store(pointers, state_KV, mask=inside)


@triton.jit
def scores_kernel(
    terms, matrices, documents, scale, heads,
    GROUP: tl.constexpr, K: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_CHANNEL: tl.constexpr, IS_BETA: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store <q, k>, T and, if erase_key is not k, <q, erase_key> and <erase, k>, if q and erase are given."""
    q, k, g, erase, erase_key, u = terms.q, terms.k, terms.g, terms.erase, terms.erase_key, terms.u
    slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row, token, valid = chunk_at(documents, slot, SPAN, C)
    if valid <= 0:
        return
    rows = tl.arange(0, C)
    chunk, entry = Chunk(row, token, rows, valid), Entry(slot, head, heads)
    qk = tl.zeros([C, C], tl.float32)
    q_erase_key, erase_erase_key, erase_k = qk, qk, qk
    own_k = tl.zeros([C], tl.float32)
    own_erase_key = own_k
    for start in range(0, K, BLOCK_K):
        keys = Columns(start + tl.arange(0, BLOCK_K), K)
        k_CK = tile(k, chunk, head // GROUP, keys)
        erase_key_CK = k_CK
        if erase_key is not None:
            erase_key_CK = tile(erase_key, chunk, head, keys)
        if q is not None:
            q_CK = tile(q, chunk, head // GROUP, keys)
            own_k += own_score(q_CK, k_CK, u, head, keys)
            own_erase_key += tl.sum(q_CK * erase_key_CK, 1)
        if erase is not None:
            erase_CK, _ = erase_tile(erase, erase_key_CK, chunk, head, keys, IS_BETA)
        if PER_CHANNEL:
            g_CK = log2_tile(g, chunk, head, keys)
            for level in tl.static_range(6):
                if (1 << level) < C:
                    later, earlier = halfway(g_CK, rows, 1 << level, u is not None, C, BLOCK_K)
                    if q is not None:
                        qk += within_blocks(dot(q_CK * later, transposed(k_CK * earlier, DOT), DOT), rows, 2 << level)
                    if erase is not None:
                        erase_erase_key += within_blocks(
                            dot(erase_CK * later, transposed(erase_key_CK * earlier, DOT), DOT), rows, 2 << level
                        )
                    if erase_key is not None:
                        erase_k += within_blocks(
                            dot(erase_CK * later, transposed(k_CK * earlier, DOT), DOT), rows, 2 << level
                        )
                        if q is not None:
                            q_erase_key += within_blocks(
                                dot(q_CK * later, transposed(erase_key_CK * earlier, DOT), DOT), rows, 2 << level
                            )
        else:
            if q is not None:
                qk = add_dot(qk, q_CK, transposed(k_CK, DOT), DOT)
            if erase is not None:
                erase_erase_key = add_dot(erase_erase_key, erase_CK, transposed(erase_key_CK, DOT), DOT)
            if erase_key is not None:
                erase_k = add_dot(erase_k, erase_CK, transposed(k_CK, DOT), DOT)
                if q is not None:
                    q_erase_key = add_dot(q_erase_key, q_CK, transposed(erase_key_CK, DOT), DOT)
    if not PER_CHANNEL:
        decay_CC = decay_matrix(g, chunk, head, u is not None)
        strict_CC = tl.where(rows[:, None] > rows[None, :], decay_CC, 0.0)
        qk *= decay_CC
        q_erase_key *= decay_CC
        erase_erase_key *= strict_CC
        erase_k *= strict_CC
    if IS_BETA:
        beta_C1 = column(erase, chunk, head)[:, None]
        erase_erase_key *= beta_C1
        erase_k *= beta_C1
    if PER_CHANNEL or u is not None:
        qk += on_diagonal(own_k, rows)
    if PER_CHANNEL:
        q_erase_key += on_diagonal(own_erase_key, rows)
    if q is not None:
        tl.store(matrix_at(matrices, QK, entry, rows, C), qk * scale)
        if erase_key is not None:
            tl.store(matrix_at(matrices, Q_ERASE_KEY, entry, rows, C), q_erase_key * scale)
    if erase is not None:
        tl.store(matrix_at(matrices, INVERSE, entry, rows, C), unit_lower_inverse(erase_erase_key, rows, C, PRECISION))
        if erase_key is not None:
            tl.store(matrix_at(matrices, ERASE_K, entry, rows, C), erase_k)


@triton.jit
def rows_of(scores_CC, w_CV, h_CV, rows, BEFORE: tl.constexpr, C: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr):
    """sum_j P_ij w_j * exp(H_i - H_j), [C, D], under a value decay."""
    o_CV = diagonal_of(scores_CC, rows)[:, None] * w_CV
    for level in tl.static_range(6):
        if (1 << level) < C:
            later, earlier = halfway(h_CV, rows, 1 << level, BEFORE, C, D)
            o_CV += dot(within_blocks(scores_CC, rows, 2 << level), w_CV * earlier, DOT) * later
    return o_CV


@triton.jit
def scan_kernel(
    terms, matrices, initial_state, states, o, n, final_state, documents, scale, heads,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, FROM_STATES: tl.constexpr,
    PER_CHANNEL: tl.constexpr, IS_BETA: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A document from its initial state, or, FROM_STATES, a span from its stored one. BLOCK_K holds all of K."""
    q, k, v, g, erase, erase_key, h, u = terms
    tiles = tl.cdiv(V, BLOCK_V)
    index, head = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    rows, keys = tl.arange(0, C), Columns(tl.arange(0, BLOCK_K), K)
    values = Columns(tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V), V)
    document = index
    if FROM_STATES:
        document = document_of(documents, index, SPAN)
    row, start, end, span = bounds_of(documents, document, SPAN)
    state_KV = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if FROM_STATES:
        start += (index - span) * SPAN
        end = tl.minimum(end, start + SPAN)
        span = index
        if start >= end:
            return
        state_KV = load_state(states, Entry(index, head, heads), keys, values)
    elif initial_state is not None:
        state_KV = load_state(initial_state, Entry(index, head, heads), keys, values)

    for step in range(0, tl.cdiv(end - start, C)):
        token, slot = start + step * C, span * (SPAN // C) + step
        chunk, entry = Chunk(row, token, rows, end - token), Entry(slot, head, heads)
        if not FROM_STATES and states is not None:  # noqa: SIM102 (what is known when compiling, and what is not)
            if step % (SPAN // C) == 0:
                store_state(states, state_KV, Entry(slot // (SPAN // C), head, heads), keys, values)
        k_CK = tile(k, chunk, head // GROUP, keys)
        v_CV = tile(v, chunk, head, values)
        start_CK = from_start(g, chunk, head, keys, PER_CHANNEL, u is not None)
        w_CV = v_CV  # what k writes
        if erase is not None:
            erase_key_CK = k_CK
            z_CV = v_CV
            if erase_key is not None:
                erase_key_CK = tile(erase_key, chunk, head, keys)
                z_CV = -dot(tl.load(matrix_at(matrices, ERASE_K, entry, rows, C)), v_CV, DOT)
            erase_CK, beta_C1 = erase_tile(erase, erase_key_CK, chunk, head, keys, IS_BETA)
            z_CV -= read_state(erase_CK, start_CK, state_KV, PER_CHANNEL, DOT) * beta_C1
            n_CV = dot(tl.load(matrix_at(matrices, INVERSE, entry, rows, C)), z_CV, DOT)
            if n is not None:
                store_tile(n, n_CV, chunk, head, values)
            if erase_key is None:
                w_CV = n_CV
        if o is not None:
            q_CK = tile(q, chunk, head // GROUP, keys)
            o_CV = read_state(q_CK, start_CK, state_KV, PER_CHANNEL, DOT) * scale
            o_CV *= from_start(h, chunk, head, values, True, u is not None)
            if matrices is not None:
                scores_CC = tl.load(matrix_at(matrices, QK, entry, rows, C)).to(tl.float32)
            else:
                scores_CC = dot(q_CK, transposed(k_CK, DOT), DOT)
                scores_CC *= decay_matrix(g, chunk, head, u is not None)
                if u is not None:
                    scores_CC += on_diagonal(own_score(q_CK, k_CK, u, head, keys), rows)
                scores_CC *= scale
            if h is None:
                o_CV = add_dot(o_CV, scores_CC, w_CV, DOT)
            else:
                h_CV = log2_tile(h, chunk, head, values)
                o_CV += rows_of(scores_CC, w_CV, h_CV, rows, u is not None, C, BLOCK_V, DOT)
            if erase_key is not None:
                o_CV = add_dot(o_CV, tl.load(matrix_at(matrices, Q_ERASE_KEY, entry, rows, C)), n_CV, DOT)
            store_tile(o, o_CV, chunk, head, values)
        end_CK, whole_K = to_end(g, chunk, head, keys, PER_CHANNEL)
        end_CV, whole_V = to_end(h, chunk, head, values, True)
        state_KV *= whole_K[:, None] * whole_V[None, :]
        state_KV = add_to_state(state_KV, k_CK, end_CK, w_CV * end_CV, PER_CHANNEL, DOT)
        if erase_key is not None:
            state_KV = add_to_state(state_KV, erase_key_CK, end_CK, n_CV, PER_CHANNEL, DOT)

    if not FROM_STATES and final_state is not None:
        store_state(final_state, state_KV, Entry(index, head, heads), keys, values)


@triton.jit
def token_of(x, row, token, head, columns):
    """x[row, token, head, cols] in float32."""
    pointers = start_of(x, row, token, head) + columns.cols
    return tl.load(pointers, mask=columns.cols < columns.width, other=0).to(tl.float32)


@triton.jit
def number_of(x, row, token, head):
    """x[row, token, head] in float32."""
    return tl.load(start_of(x, row, token, head)).to(tl.float32)


@triton.jit
def step_kernel(
    terms, initial_state, o, final_state, documents, scale, heads,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PER_CHANNEL: tl.constexpr, IS_BETA: tl.constexpr,
):  # fmt: skip
    """A document token by token: decay the state, erase, write, read. Fast for documents of about one token."""
    q, k, v, g, erase, erase_key, h, u = terms
    tiles = tl.cdiv(V, BLOCK_V)
    document, head = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    keys = Columns(tl.arange(0, BLOCK_K), K)
    values = Columns(tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V), V)
    entry = Entry(document, head, heads)
    row, start, end, _ = bounds_of(documents, document, SPAN)
    state_KV = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if initial_state is not None:
        state_KV = load_state(initial_state, entry, keys, values)
    for step in range(0, end - start):
        token = start + step
        before_KV = state_KV
        k_K = token_of(k, row, token, head // GROUP, keys)
        v_V = token_of(v, row, token, head, values)
        if g is not None:
            if PER_CHANNEL:
                state_KV *= tl.exp2(token_of(g, row, token, head, keys) * LOG2_E)[:, None]
            else:
                state_KV *= tl.exp2(number_of(g, row, token, head) * LOG2_E)
        if h is not None:
            state_KV *= tl.exp2(token_of(h, row, token, head, values) * LOG2_E)[None, :]
        if erase is not None:
            erase_key_K = k_K
            if erase_key is not None:
                erase_key_K = token_of(erase_key, row, token, head, keys)
            if IS_BETA:
                erase_K = number_of(erase, row, token, head) * erase_key_K
            else:
                erase_K = token_of(erase, row, token, head, keys)
            state_KV -= erase_key_K[:, None] * tl.sum(erase_K[:, None] * state_KV, 0)[None, :]
        added_KV = k_K[:, None] * v_V[None, :]
        state_KV += added_KV
        if q is not None:
            q_K = token_of(q, row, token, head // GROUP, keys) * scale
            read_KV = state_KV
            if u is not None:
                read_KV = before_KV + per_head(u, head, keys)[:, None] * added_KV
            o_V = tl.sum(q_K[:, None] * read_KV, 0)
            tl.store(start_of(o, row, token, head) + values.cols, o_V, mask=values.cols < V)
    store_state(final_state, state_KV, entry, keys, values)


class Config(NamedTuple):
    """Tile shapes and launch options."""

    chunk: int
    chunks_per_span: int  # how many share one stored state
    block_k: int  # of scores_kernel; scan_kernel holds all of K
    block_v: int
    scores_warps: int
    scan_warps: int
    stages: int


# By architecture, whether a decay is per channel, width of K (64, 128 or 256) and bytes a number: nothing that depends
# on the sequence.
CONFIGS: dict[tuple[str, bool, int, int], Config] = {
    ("default", False, 64, 2): Config(
        chunk=64, chunks_per_span=2, block_k=64, block_v=64, scores_warps=4, scan_warps=4, stages=2
    ),
    ("default", False, 128, 2): Config(
        chunk=64, chunks_per_span=2, block_k=64, block_v=64, scores_warps=4, scan_warps=8, stages=2
    ),
    ("default", False, 256, 2): Config(
        chunk=32, chunks_per_span=4, block_k=64, block_v=16, scores_warps=4, scan_warps=8, stages=1
    ),
    ("default", True, 64, 2): Config(
        chunk=32, chunks_per_span=4, block_k=16, block_v=64, scores_warps=4, scan_warps=8, stages=2
    ),
    ("default", True, 128, 2): Config(
        chunk=32, chunks_per_span=4, block_k=16, block_v=64, scores_warps=4, scan_warps=8, stages=2
    ),
    ("default", True, 256, 2): Config(
        chunk=32, chunks_per_span=4, block_k=16, block_v=16, scores_warps=4, scan_warps=8, stages=1
    ),
    # float32 is multiplied without tensor cores, with operands in registers: smaller tiles.
    ("default", False, 64, 4): Config(
        chunk=16, chunks_per_span=8, block_k=32, block_v=16, scores_warps=8, scan_warps=8, stages=1
    ),
    ("default", False, 128, 4): Config(
        chunk=16, chunks_per_span=8, block_k=32, block_v=16, scores_warps=8, scan_warps=8, stages=1
    ),
    ("default", False, 256, 4): Config(
        chunk=16, chunks_per_span=8, block_k=32, block_v=16, scores_warps=4, scan_warps=8, stages=1
    ),
    ("default", True, 64, 4): Config(
        chunk=16, chunks_per_span=8, block_k=16, block_v=16, scores_warps=8, scan_warps=8, stages=1
    ),
    ("default", True, 128, 4): Config(
        chunk=16, chunks_per_span=8, block_k=16, block_v=16, scores_warps=8, scan_warps=8, stages=1
    ),
    ("default", True, 256, 4): Config(
        chunk=16, chunks_per_span=8, block_k=16, block_v=16, scores_warps=4, scan_warps=8, stages=1
    ),
    # The interpreter's time grows with the number of programs.
    ("interpreter", False, 64, 2): Config(
        chunk=64, chunks_per_span=2, block_k=32, block_v=64, scores_warps=4, scan_warps=4, stages=1
    ),
    ("interpreter", False, 64, 4): Config(
        chunk=64, chunks_per_span=2, block_k=32, block_v=64, scores_warps=4, scan_warps=4, stages=1
    ),
    ("interpreter", True, 64, 2): Config(
        chunk=64, chunks_per_span=2, block_k=32, block_v=64, scores_warps=4, scan_warps=4, stages=1
    ),
    ("interpreter", True, 64, 4): Config(
        chunk=64, chunks_per_span=2, block_k=32, block_v=64, scores_warps=4, scan_warps=4, stages=1
    ),
}
# Its products take their operands from registers.
CONFIGS |= {
    ("sm_80", *key[1:]): config._replace(block_v=min(32, config.block_v))
    for key, config in CONFIGS.items()
    if key[0] == "default"
}
# Triton's pipeliner fails there if a loop stores a state.
CONFIGS |= {("sm_100", *key[1:]): config._replace(stages=1) for key, config in CONFIGS.items() if key[0] == "default"}
# A warp has 64 threads there, with more registers each if they are few.
CONFIGS |= {
    ("gfx942", *key[1:]): config._replace(
        block_v=min(32, config.block_v), scores_warps=config.scores_warps // 2, scan_warps=config.scan_warps // 2
    )
    for key, config in CONFIGS.items()
    if key[0] == "default"
}
FILLS = 128  # programs that keep a chip busy: with as many, one pass suffices and stores no state


def architecture(x: Tensor) -> str:
    """Which machine x is on, as CONFIGS names it."""
    if x.device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(x.device).gcnArchName.split(":")[0]
    major, _ = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}0"


def config_of(configs: dict[tuple[str, bool, int, int], Any], k: Tensor, per_channel: bool, dtype: torch.dtype) -> Any:
    """The entry of `configs` for this machine, or for any."""
    key = (per_channel, max(64, triton.next_power_of_2(k.shape[-1])), dtype.itemsize)
    return configs.get((architecture(k), *key)) or configs["default", key[0], key[1], key[2]]


class Problem(NamedTuple):
    """The arguments of one call as the kernels take them."""

    terms: Terms
    documents: Documents
    heads: int
    shape: dict[str, Any]  # GROUP, K, C, SPAN, PER_CHANNEL, IS_BETA, DOT
    config: Config
    decays_per_channel: bool  # on either side
    scale: float
    dtype: torch.dtype  # in which matrices are multiplied
    num_documents: int
    num_spans: int  # enough for any bounds


def strided(x: Tensor | None) -> Strided | None:
    """x [B, T, heads, width] or [B, T, heads]; copied only if its last dim is not contiguous."""
    if x is None:
        return None
    if x.dim() == 4 and x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return Strided(x, x.stride(0), x.stride(1), x.stride(2))


def packed_documents(cu_seqlens: Tensor, length: int, span: int, num_spans: int) -> Documents:
    """Documents in spans of `span` tokens, of which there are at most num_spans."""
    bounds = cu_seqlens.clamp(0, length)
    counts = torch.div(bounds.diff() + span - 1, span, rounding_mode="floor")
    first = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    index = torch.arange(num_spans, dtype=torch.int32, device=bounds.device)
    owner = torch.searchsorted(first[1:].contiguous(), index, right=True, out_int32=True)
    return Documents(length, bounds, first, owner.clamp_(max=max(0, len(counts) - 1)))


def problem_of(
    q: Tensor | None, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, erase_key: Tensor | None,
    value_log_decay: Tensor | None, bonus: Tensor | None, scale: float, cu_seqlens: Tensor | None,
    chunks_per_span: int | None = None,
) -> Problem:  # fmt: skip
    batch_size, length, heads, _ = v.shape
    dtypes = {x.dtype for x in (q, k, v, erase_key) if x is not None}
    dtype = v.dtype if len(dtypes) == 1 else torch.float32
    decays_per_channel = value_log_decay is not None or (log_decay is not None and log_decay.dim() == 4)
    config = config_of(CONFIGS, k, decays_per_channel, dtype)
    span = config.chunk * (chunks_per_span or config.chunks_per_span)
    documents, num_documents = Documents(length, None, None, None), batch_size
    num_spans = batch_size * triton.cdiv(length, span)
    if cu_seqlens is not None:
        num_documents = len(cu_seqlens) - 1
        num_spans = length // span + num_documents
        documents = packed_documents(cu_seqlens, length, span, num_spans)
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(batch_size, length, heads)
    terms = Terms(
        q=strided(q), k=strided(k), v=strided(v), g=strided(log_decay), erase=strided(erase),
        erase_key=strided(erase_key), h=strided(value_log_decay), u=None if bonus is None else bonus.contiguous(),
    )  # fmt: skip
    shape = dict(
        GROUP=heads // k.shape[2], K=k.shape[-1], C=config.chunk, SPAN=span,
        PER_CHANNEL=log_decay is not None and log_decay.dim() == 4, IS_BETA=erase is not None and erase.dim() == 3,
        DOT=getattr(tl, str(dtype).removeprefix("torch.")),
    )  # fmt: skip
    return Problem(
        terms, documents, heads, shape, config, decays_per_channel, scale, dtype, num_documents, num_spans
    )  # fmt: skip


def empty_matrices(problem: Problem) -> Matrices:
    """Room for <q, k> of every chunk, T with an erase term, <q, erase_key> and <erase, k> if erase_key is not k."""
    terms, chunk = problem.terms, problem.config.chunk
    per_chunk = 1 if terms.erase is None else 2 if terms.erase_key is None else 4
    size = (problem.num_spans * problem.shape["SPAN"] // chunk, problem.heads, per_chunk, chunk, chunk)
    return Matrices(torch.empty(size, dtype=problem.dtype, device=terms.v.pointer.device), per_chunk)


def chunk_matrices(problem: Problem) -> Matrices | None:
    """Run scores_kernel, if scores are costly (decay per channel, wide keys in float32) or read more than once
    (erase, value decay).

    Returns <q, k>, T and, if erase_key is not k, <q, erase_key> and <erase, k> of every chunk, if they are needed.
    """
    shape, config, terms = problem.shape, problem.config, problem.terms
    wide = problem.dtype == torch.float32 and shape["K"] > 128
    of_q = terms.q is not None and (shape["PER_CHANNEL"] or terms.h is not None or wide)
    if not of_q and terms.erase is None:
        return None
    slots = problem.num_spans * shape["SPAN"] // config.chunk
    matrices = empty_matrices(problem)
    # tf32 keeps as many digits as the 16 bits in which T is stored.
    precise = problem.dtype == torch.float32 or torch.version.hip is not None
    scores_kernel[(slots * problem.heads,)](
        terms, matrices, problem.documents, problem.scale, problem.heads, **shape,
        BLOCK_K=min(config.block_k, max(16, triton.next_power_of_2(shape["K"]))),
        PRECISION="ieee" if precise else "tf32", num_warps=config.scores_warps, num_stages=1,
    )  # fmt: skip
    return matrices


def scan(
    problem: Problem, matrices: Matrices | None, *, initial_state: Tensor | None = None,
    states: Tensor | None = None, o: Tensor | None = None, n: Tensor | None = None, final_state: Tensor | None = None,
    from_states: bool = False,
) -> None:  # fmt: skip
    """Run scan_kernel over documents, or over spans from their states, writing to the given outputs."""
    shape, config, value_dim = problem.shape, problem.config, problem.terms.v.pointer.shape[-1]
    block_v = min(config.block_v, max(16, triton.next_power_of_2(value_dim)))
    programs = (problem.num_spans if from_states else problem.num_documents) * problem.heads
    scan_kernel[(programs * triton.cdiv(value_dim, block_v),)](
        problem.terms, matrices, initial_state, states, strided(o), strided(n), final_state, problem.documents,
        problem.scale, problem.heads, **shape, V=value_dim, BLOCK_K=max(16, triton.next_power_of_2(shape["K"])),
        BLOCK_V=block_v, FROM_STATES=from_states, num_warps=config.scan_warps, num_stages=config.stages,
    )  # fmt: skip


def empty_states(problem: Problem) -> Tensor:
    """Room for the state at the start of every span, in the dtype of products."""
    v = problem.terms.v.pointer
    size = (problem.num_spans, problem.heads, problem.shape["K"], v.shape[-1])
    return torch.empty(size, dtype=problem.dtype, device=v.device)


@torch.library.custom_op("torchlmoe::linear_recurrence_triton", mutates_args=())
def linear_recurrence(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    erase_key: Tensor | None,
    value_log_decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, heads, V] in v's dtype (empty without q) and the final state [N, heads, K, V] in float32.

    q, k [B, T, H, K], v [B, T, heads, V], heads a multiple of H; log_decay [heads], [B, T, heads] or [B, T, heads, K],
    natural logarithm, <= 0; erase [B, T, heads] (times erase_key) or [B, T, heads, K]; erase_key, k if None,
    [B, T, heads, K]; value_log_decay [B, T, heads, V] and bonus [heads, K], neither with erase; cu_seqlens int32
    [N + 1], rising from 0 to T, for B = 1. float32, float16 or bfloat16; K up to 256.
    """
    batch_size, length, heads, value_dim = v.shape
    problem = problem_of(q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale, cu_seqlens)
    o = v.new_empty(0 if q is None else v.shape)
    wanted = None if q is None else o
    final_state = v.new_empty(problem.num_documents, heads, k.shape[-1], value_dim, dtype=torch.float32)
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if batch_size * length <= problem.num_documents:  # about a token for each: decoding
        _step(problem, initial_state, wanted, final_state)
        return o, final_state
    matrices = chunk_matrices(problem)
    tiles = triton.cdiv(value_dim, problem.config.block_v)
    one_pass = q is None or problem.num_documents * heads * tiles >= FILLS or problem.num_spans <= problem.num_documents
    if one_pass:
        scan(problem, matrices, initial_state=initial_state, o=wanted, final_state=final_state)
    else:
        states = empty_states(problem)
        scan(problem, matrices, initial_state=initial_state, states=states, final_state=final_state)
        scan(problem, matrices, states=states, o=o, from_states=True)
    return o, final_state


@linear_recurrence.register_fake
def _(q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale, initial_state, cu_seqlens):
    documents = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = v.new_empty(documents, v.shape[2], k.shape[-1], v.shape[-1], dtype=torch.float32)
    return v.new_empty(0 if q is None else v.shape), final_state


@register_flop_formula(torch.ops.torchlmoe.linear_recurrence_triton)
def flops(q, k, v, log_decay, erase, erase_key, value_log_decay, *rest, **kwargs) -> int:
    """FLOPs of the definition, token by token, from the shapes of its tensors; a multiply-add is two."""
    per_element = 4 + (log_decay is not None or value_log_decay is not None) + 4 * (erase is not None)
    return math.prod(v) * k[-1] * per_element


def _step(problem: Problem, initial_state: Tensor | None, o: Tensor | None, final_state: Tensor) -> None:
    shape, (num_documents, heads, key_dim, value_dim) = problem.shape, final_state.shape
    block_k = max(16, triton.next_power_of_2(key_dim))
    block_v = min(triton.next_power_of_2(value_dim), 8192 // block_k)
    step_kernel[(num_documents * heads * triton.cdiv(value_dim, block_v),)](
        problem.terms, initial_state, strided(o), final_state, problem.documents, problem.scale, heads,
        GROUP=shape["GROUP"], K=key_dim, V=value_dim, SPAN=shape["SPAN"], BLOCK_K=block_k, BLOCK_V=block_v,
        PER_CHANNEL=shape["PER_CHANNEL"], IS_BETA=shape["IS_BETA"], num_warps=4,
    )  # fmt: skip
