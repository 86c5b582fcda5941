"""What the kernels of the elementwise recurrence share: a call's tensors, real or complex tiles, and their scan.

`elementwise_recurrence.py` has the notation.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


class Strided(NamedTuple):
    """A kernel's view of a tensor [M, heads, width], or [1, ..] if it is constant over tokens.

    A stride of width is 1.
    """

    pointer: Any
    token_stride: Any
    head_stride: Any


class StridedDecay(NamedTuple):
    """Log decays [M, H, K, V], or [1, ..]."""

    pointer: Any
    token_stride: Any
    head_stride: Any
    key_stride: Any
    value_stride: Any


class Terms(NamedTuple):
    """The tensors of the recurrence, with their strides."""

    q: Any
    k: Any
    v: Any
    log_decay: Any
    step: Any  # None if absent


class Rows(NamedTuple):
    """The tokens of a tile, or, of one token, its keys."""

    start: Any  # the token from which rows count, int64
    row: Any  # [rows, 1], int32, as is all that is added to an address within a chunk
    mask: Any  # which there are


class Columns(NamedTuple):
    """The columns [1, BLOCK_C] of a tile."""

    head: Any  # of all, or of each
    channel: Any  # place in the head
    mask: Any  # which there are


class Complex(NamedTuple):
    """A tile of numbers. The imaginary part of real numbers is never read, so it is not compiled."""

    real: Any
    imaginary: Any


@triton.jit
def load(pointer, offset, mask, COMPLEX: tl.constexpr):
    """A complex number is one access, of 64 bits."""
    x = tl.load(pointer + offset, mask=mask, other=0)
    if COMPLEX:
        real = x.to(tl.uint32).to(tl.float32, bitcast=True)
        imaginary = (x >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        real = x.to(tl.float32)
        imaginary = real
    return Complex(real, imaginary)


@triton.jit
def store(pointer, offset, x, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        high = x.imaginary.to(tl.uint32, bitcast=True).to(tl.int64) << 32
        tl.store(pointer + offset, high | x.real.to(tl.uint32, bitcast=True).to(tl.int64), mask=mask)
    else:
        tl.store(pointer + offset, x.real, mask=mask)


@triton.jit
def conjugate(x):
    return Complex(x.real, -x.imaginary)


@triton.jit
def plus(a, b):
    return Complex(a.real + b.real, a.imaginary + b.imaginary)


@triton.jit
def scaled(a, x):
    """a * x with x real."""
    return Complex(a.real * x, a.imaginary * x)


@triton.jit
def where(mask, x):
    return Complex(tl.where(mask, x.real, 0), tl.where(mask, x.imaginary, 0))


@triton.jit
def sum_along(x, AXIS: tl.constexpr):
    """[1, columns] or [rows, 1]"""
    return Complex(tl.sum(x.real, AXIS, keep_dims=True), tl.sum(x.imaginary, AXIS, keep_dims=True))


@triton.jit
def times(a, b, COMPLEX: tl.constexpr):
    """a * b"""
    if COMPLEX:
        real = a.real * b.real - a.imaginary * b.imaginary
        imaginary = a.real * b.imaginary + a.imaginary * b.real
    else:
        real = a.real * b.real
        imaginary = real
    return Complex(real, imaginary)


@triton.jit
def exp(x, COMPLEX: tl.constexpr):
    real = tl.exp2(x.real * LOG2_E)
    imaginary = real
    if COMPLEX:
        imaginary = real * tl.sin(x.imaginary)
        real = real * tl.cos(x.imaginary)
    return Complex(real, imaginary)


@triton.jit
def _then(a, x, b, y):
    """S -> a S + x, then S -> b S + y"""
    return a * b, b * x + y


@triton.jit
def _then_complex(a, ai, x, xi, b, bi, y, yi):
    return a * b - ai * bi, a * bi + ai * b, b * x - bi * xi + y, b * xi + bi * x + yi


@triton.jit
def scan(a, x, REVERSE: tl.constexpr, COMPLEX: tl.constexpr):
    """Combine the maps S -> a S + x up to each row (from it on, in reverse): the decay and the added part."""
    if COMPLEX:
        planes = (a.real, a.imaginary, x.real, x.imaginary)
        decay, decay_i, added, added_i = tl.associative_scan(planes, 0, _then_complex, reverse=REVERSE)
    else:
        decay, added = tl.associative_scan((a.real, x.real), 0, _then, reverse=REVERSE)
        decay_i = decay
        added_i = added
    return Complex(decay, decay_i), Complex(added, added_i)


@triton.jit
def place(num_heads, value_dim, BLOCK_C: tl.constexpr, FOLD: tl.constexpr):
    """The program's chunk or token, head (0 if heads are folded) and tile of columns. They share the grid's first
    dimension, since the others end at 65,535."""
    if FOLD:
        tiles = tl.cdiv(num_heads * value_dim, BLOCK_C)
        heads = 1
    else:
        tiles = tl.cdiv(value_dim, BLOCK_C)
        heads = num_heads
    program = tl.program_id(0)
    return (program // tiles // heads).to(tl.int64), program // tiles % heads, program % tiles


@triton.jit
def chunk_rows(chunks, chunk, BLOCK_T: tl.constexpr):
    """Where a chunk starts, its rows [BLOCK_T, 1], and how many of them there are."""
    start = tl.load(chunks + 2 * chunk)
    return start, tl.arange(0, BLOCK_T)[:, None], (tl.load(chunks + 2 * chunk + 1) - start).to(tl.int32)


@triton.jit
def tile_columns(head, tile, num_heads, value_dim, BLOCK_C: tl.constexpr, FOLD: tl.constexpr):
    """The tile's columns: of one head, or of all if heads are folded."""
    column = tile * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    if FOLD:
        head = column // value_dim
        channel = column % value_dim
        mask = column < num_heads * value_dim
    else:
        channel = column
        mask = column < value_dim
    return Columns(head, channel, mask)


@triton.jit
def value_tile(x, rows, columns):
    """Rows of v, step or do: float32 [BLOCK_T, BLOCK_C], 0 where masked."""
    first = x.pointer + rows.start * x.token_stride + columns.head.to(tl.int64) * x.head_stride
    mask = rows.mask & columns.mask
    return tl.load(first + (rows.row * x.token_stride + columns.channel), mask=mask, other=0).to(tl.float32)


@triton.jit
def key_tile(x, rows, columns, key, COMPLEX: tl.constexpr, FOLD: tl.constexpr):
    """One key of q or k: [BLOCK_T, 1], or [1, BLOCK_C] if it is constant over tokens.

    Of one token, keys [BLOCK_K, 1]: [BLOCK_K, 1] or [BLOCK_K, BLOCK_C], with the masks of those.
    """
    if FOLD:
        result = load(x.pointer, columns.head * x.head_stride + key, columns.mask, COMPLEX)
    else:
        first = x.pointer + rows.start * x.token_stride + columns.head.to(tl.int64) * x.head_stride
        result = load(first, rows.row * x.token_stride + key, rows.mask, COMPLEX)
    return result


@triton.jit
def log_decay_tile(x, step_tile, rows, columns, key, COMPLEX: tl.constexpr, PER_TOKEN: tl.constexpr):
    """One key's log decay, times the step's tile if there is one: [BLOCK_T, BLOCK_C], 0 where masked."""
    first = x.pointer + columns.head.to(tl.int64) * x.head_stride
    offset = key * x.key_stride + columns.channel * x.value_stride
    tile_mask = rows.mask & columns.mask
    if PER_TOKEN:
        first += rows.start * x.token_stride
        result = load(first, rows.row * x.token_stride + offset, tile_mask, COMPLEX)
    else:
        result = load(first, offset, columns.mask, COMPLEX)
        if step_tile is not None:
            result = scaled(result, step_tile)
        result = where(tile_mask, result)
    return result
