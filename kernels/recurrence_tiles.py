"""What the kernels of the linear recurrence share: a call's tensors, and loads, decays and products of a chunk's tiles.

`linear_recurrence.py` has the notation.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

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
def of_other_half(x, SIZE: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Each token's sum of x [C, D] over the other half of its block of 2 * SIZE tokens."""
    sums = tl.sum(tl.reshape(x, [C // (2 * SIZE), 2, SIZE, D]), 2, keep_dims=True)
    earlier = (tl.arange(0, 2) == 0)[None, :, None, None]
    of_later = tl.sum(tl.where(earlier, 0.0, sums), 1, keep_dims=True)
    of_earlier = tl.sum(tl.where(earlier, sums, 0.0), 1, keep_dims=True)
    other = tl.where(earlier, of_later, of_earlier)
    return tl.reshape(tl.broadcast_to(other, [C // (2 * SIZE), 2, SIZE, D]), [C, D])


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
