"""The recurrence whose decay is a matrix of its own for every token, forward and backward, in Triton.

    S_t = exp(G_t) * S_{t-1} + k_t v_t^T          o_t = Re(S_t^T q_t)          * elementwise, S and G in R or C^{K x V}

Serves Mamba (G_t = step_t[v] * G[k, v]), S4 (G, q and k the same for every token, complex), HGRN and fast weights with
a full gate (G of every token). Real numbers are complex ones whose imaginary plane the compiler drops.

Documents are cut into chunks; a chunk is an affine map of the state, so there are three launches each way:

    tokens      |  chunk 0  |  chunk 1  |  chunk 2  |           a program: one chunk, one head, one tile of columns,
    1 summary      P_0, X_0    P_1, X_1    P_2, X_2             all K one after another; per key a tile
    2 fold         S_0 ------> S_1 ------> S_2 -----> final
    3 read         o           o           o                                 columns (values of a head, or of
                                                                             all heads where q, k are constant)
    The backward is the same from right to left, with                       +----------------+
    P, sum_t P_t q_t do_t and the gradient of the state;             tokens | decay, k v, S  |  BLOCK_T x BLOCK_C
    its third pass scans a tile both ways, so that no               down    |  scanned down  |  in registers
    state of a token is ever stored.                                        +----------------+

The state that each chunk finds ([chunks, H, K, V]) is all that is kept between forward and backward. What columns add
up to (gradients of q and k) and what tokens add up to (gradients of what is constant) is written once a program and
summed afterwards: no atomics. No exponent is positive, nothing is divided, nothing is subtracted.

Inner dims are read with a stride of one and rows of a batch at one distance; other layouts are copied first.

Legend: M = B * T tokens, H heads, K key width, V value width, N documents.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# architecture: tokens of a chunk, columns of a tile, warps.
CONFIGS = {
    "sm_80": (64, 32, 8),
    "sm_90": (64, 32, 8),
    "sm_100": (64, 32, 8),
    "gfx942": (64, 32, 4),
    "interpreter": (16, 16, 1),
}
FOLD_BLOCK = 256  # elements of a state that one program folds
LOG2_E = tl.constexpr(1.4426950408889634)


def architecture(x: Tensor) -> str:
    if x.device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    return {8: "sm_80", 9: "sm_90"}.get(torch.cuda.get_device_capability(x.device)[0], "sm_100")


@triton.jit
def _load(pointer, offset, mask, COMPLEX: tl.constexpr):
    """Both planes; of a real number the second is never looked at."""
    if COMPLEX:
        real = tl.load(pointer + 2 * offset, mask=mask, other=0).to(tl.float32)
        imaginary = tl.load(pointer + 2 * offset + 1, mask=mask, other=0).to(tl.float32)
    else:
        real = tl.load(pointer + offset, mask=mask, other=0).to(tl.float32)
        imaginary = real
    return real, imaginary


@triton.jit
def _store(pointer, offset, real, imaginary, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(pointer + 2 * offset, real, mask=mask)
        tl.store(pointer + 2 * offset + 1, imaginary, mask=mask)
    else:
        tl.store(pointer + offset, real, mask=mask)


@triton.jit
def _times(a, ai, b, bi, COMPLEX: tl.constexpr):
    """a * b"""
    if COMPLEX:
        real = a * b - ai * bi
        imaginary = a * bi + ai * b
    else:
        real = a * b
        imaginary = real
    return real, imaginary


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
def _exp(log, log_i, COMPLEX: tl.constexpr):
    real = tl.exp2(log * LOG2_E)
    imaginary = real
    if COMPLEX:
        imaginary = real * tl.sin(log_i)
        real = real * tl.cos(log_i)
    return real, imaginary


@triton.jit
def _then(a, x, b, y):
    """S -> a S + x, then S -> b S + y"""
    return a * b, b * x + y


@triton.jit
def _then_complex(a, ai, x, xi, b, bi, y, yi):
    return a * b - ai * bi, a * bi + ai * b, b * x - bi * xi + y, b * xi + bi * x + yi


@triton.jit
def _scan(a, ai, x, xi, REVERSE: tl.constexpr, COMPLEX: tl.constexpr):
    """All maps up to each row (from it on, in reverse), as one: the decay, and what is added."""
    if COMPLEX:
        a, ai, x, xi = tl.associative_scan((a, ai, x, xi), 0, _then_complex, reverse=REVERSE)
    else:
        a, x = tl.associative_scan((a, x), 0, _then, reverse=REVERSE)
        ai = a
        xi = x
    return a, ai, x, xi


@triton.jit
def _columns(num_heads, value_dim, BLOCK_C: tl.constexpr, FOLD: tl.constexpr):
    """The tile's columns: their head (one, or one each), their place in it and which there are."""
    column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    if FOLD:
        head = column // value_dim
        channel = column % value_dim
        mask = column < num_heads * value_dim
    else:
        head = tl.program_id(1)
        channel = column
        mask = column < value_dim
    return head, channel, mask


@triton.jit
def _from(pointer, element, COMPLEX: tl.constexpr):
    """Where an int64 number of elements lies; what is added to it within a chunk fits int32."""
    return pointer + (2 * element if COMPLEX else element)


@triton.jit
def _values(pointer, row, row_mask, head, channel, mask, stride_t, stride_h):
    """Rows of v, step or do: float32 [BLOCK_T, BLOCK_C], 0 where masked."""
    offset = (row * stride_t)[:, None] + (head * stride_h + channel)[None, :]
    return tl.load(pointer + offset, mask=row_mask[:, None] & mask[None, :], other=0).to(tl.float32)


@triton.jit
def _key(pointer, row, row_mask, head, mask, stride_t, stride_h, key, COMPLEX: tl.constexpr, FOLD: tl.constexpr):
    """One key of q or k: [BLOCK_T, 1], or [1, BLOCK_C] where it is the same for every token."""
    if FOLD:
        real, imaginary = _load(pointer, (head * stride_h + key)[None, :], mask[None, :], COMPLEX)
    else:
        real, imaginary = _load(pointer, (row * stride_t + head * stride_h + key)[:, None], row_mask[:, None], COMPLEX)
    return real, imaginary


@triton.jit
def _log_decay(
    pointer, step, row, row_mask, offset, mask, stride_t, PER_TOKEN: tl.constexpr, STEP: tl.constexpr,
    COMPLEX: tl.constexpr,
):  # fmt: skip
    """One key's log decay, [BLOCK_T, BLOCK_C], 0 at rows that are masked; offset of the head, key and columns."""
    tile_mask = row_mask[:, None] & mask[None, :]
    if PER_TOKEN:
        real, imaginary = _load(pointer, (row * stride_t)[:, None] + offset[None, :], tile_mask, COMPLEX)
    else:
        real, imaginary = _load(pointer, offset[None, :], mask[None, :], COMPLEX)
        if STEP:
            real, imaginary = real * step, imaginary * step
        real, imaginary = tl.where(tile_mask, real, 0), tl.where(tile_mask, imaginary, 0)
    return real, imaginary


@triton.jit
def _summary_kernel(
    k, v, log_decay, step, chunks, transition, local, num_chunks, num_heads, key_dim, value_dim,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, step_stride_t, step_stride_h,
    decay_stride_t, decay_stride_h, decay_stride_k,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, PER_TOKEN: tl.constexpr, STEP: tl.constexpr,
    COMPLEX: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """P = exp(sum_t G_t), and the state from zero; in the backward, from q and do, the gradient of the first state."""
    chunk = tl.program_id(0).to(tl.int64)
    start = tl.load(chunks + chunk)
    length = (tl.load(chunks + num_chunks + chunk) - start).to(tl.int32)
    if length <= 0:
        return
    row = tl.arange(0, BLOCK_T)
    row_mask = row < length
    head, channel, mask = _columns(num_heads, value_dim, BLOCK_C, FOLD)
    if not FOLD:
        k = _from(k, start * k_stride_t, COMPLEX)
    if PER_TOKEN:
        log_decay = _from(log_decay, start * decay_stride_t, COMPLEX)
    v_tile = _values(v + start * v_stride_t, row, row_mask, head, channel, mask, v_stride_t, v_stride_h)
    # What a token wrote decays by the tokens after it; what it reads had decayed by those up to it.
    passed = row if BACKWARD else row + 1
    passed_mask = passed < length
    first = tl.arange(0, 1)
    step_tile, step_first = v_tile, v_tile
    if STEP:
        step += start * step_stride_t
        step_tile = _values(step, passed, passed_mask, head, channel, mask, step_stride_t, step_stride_h)
        if not BACKWARD:
            step_first = _values(step, first, first < length, head, channel, mask, step_stride_t, step_stride_h)
    size = num_heads * key_dim * value_dim
    transition, local = _from(transition, chunk * size, COMPLEX), _from(local, chunk * size, COMPLEX)
    state = head * key_dim * value_dim + channel
    for key in range(key_dim):
        decay_offset = head * decay_stride_h + key * decay_stride_k + channel
        g, gi = _log_decay(
            log_decay, step_tile, passed, passed_mask, decay_offset, mask, decay_stride_t, PER_TOKEN, STEP, COMPLEX
        )
        k_key, ki_key = _key(k, row, row_mask, head, mask, k_stride_t, k_stride_h, key, COMPLEX, FOLD)
        decay, decay_i = _exp(tl.cumsum(g, 0, reverse=not BACKWARD), tl.cumsum(gi, 0, reverse=not BACKWARD), COMPLEX)
        x, xi = _times(decay, decay_i, k_key, ki_key, COMPLEX)
        if COMPLEX and BACKWARD:
            xi = -xi
        total, total_i = tl.sum(g, 0), tl.sum(gi, 0)
        if not BACKWARD:
            g_first, gi_first = _log_decay(
                log_decay,
                step_first,
                first,
                first < length,
                decay_offset,
                mask,
                decay_stride_t,
                PER_TOKEN,
                STEP,
                COMPLEX,
            )
            total, total_i = total + tl.sum(g_first, 0), total_i + tl.sum(gi_first, 0)
        total, total_i = _exp(total, total_i, COMPLEX)
        _store(transition, state + key * value_dim, total, total_i, mask, COMPLEX)
        _store(local, state + key * value_dim, tl.sum(x * v_tile, 0), tl.sum(xi * v_tile, 0), mask, COMPLEX)


@triton.jit
def _fold_kernel(
    transition, local, carry, last, first_chunk, size,
    BLOCK: tl.constexpr, CARRY: tl.constexpr, COMPLEX: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Goes through a document's chunks and leaves in `local` what each of them receives."""
    document = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    x = tl.zeros([BLOCK], tl.float32)
    xi = x
    if CARRY:
        x, xi = _load(carry, document * size + element, mask, COMPLEX)
    begin, end = tl.load(first_chunk + document), tl.load(first_chunk + document + 1)
    for index in range(begin, end):
        chunk = begin + end - 1 - index if BACKWARD else index
        offset = chunk * size + element
        a, ai = _load(transition, offset, mask, COMPLEX)
        y, yi = _load(local, offset, mask, COMPLEX)
        _store(local, offset, x, xi, mask, COMPLEX)
        if BACKWARD:
            x, xi = _times_conjugate(x, xi, a, ai, COMPLEX)
        else:
            x, xi = _times(x, xi, a, ai, COMPLEX)
        x, xi = x + y, xi + yi
    _store(last, document * size + element, x, xi, mask, COMPLEX)


@triton.jit
def _read_kernel(
    q, k, v, log_decay, step, chunks, starts, o, num_chunks, num_heads, key_dim, value_dim,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, step_stride_t, step_stride_h,
    decay_stride_t, decay_stride_h, decay_stride_k,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, PER_TOKEN: tl.constexpr, STEP: tl.constexpr,
    COMPLEX: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    start = tl.load(chunks + chunk)
    length = (tl.load(chunks + num_chunks + chunk) - start).to(tl.int32)
    if length <= 0:
        return
    row = tl.arange(0, BLOCK_T)
    row_mask = row < length
    head, channel, mask = _columns(num_heads, value_dim, BLOCK_C, FOLD)
    if not FOLD:
        q, k = _from(q, start * q_stride_t, COMPLEX), _from(k, start * k_stride_t, COMPLEX)
    if PER_TOKEN:
        log_decay = _from(log_decay, start * decay_stride_t, COMPLEX)
    v_tile = _values(v + start * v_stride_t, row, row_mask, head, channel, mask, v_stride_t, v_stride_h)
    step_tile = v_tile
    if STEP:
        step += start * step_stride_t
        step_tile = _values(step, row, row_mask, head, channel, mask, step_stride_t, step_stride_h)
    starts = _from(starts, chunk * num_heads * key_dim * value_dim, COMPLEX)
    state = head * key_dim * value_dim + channel
    o_tile = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for key in range(key_dim):
        decay_offset = head * decay_stride_h + key * decay_stride_k + channel
        g, gi = _log_decay(
            log_decay, step_tile, row, row_mask, decay_offset, mask, decay_stride_t, PER_TOKEN, STEP, COMPLEX
        )
        decay, decay_i = _exp(g, gi, COMPLEX)
        k_key, ki_key = _key(k, row, row_mask, head, mask, k_stride_t, k_stride_h, key, COMPLEX, FOLD)
        q_key, qi_key = _key(q, row, row_mask, head, mask, q_stride_t, q_stride_h, key, COMPLEX, FOLD)
        decay, decay_i, s, si = _scan(decay, decay_i, k_key * v_tile, ki_key * v_tile, False, COMPLEX)
        s_start, si_start = _load(starts, state + key * value_dim, mask, COMPLEX)
        x, xi = _times(decay, decay_i, s_start[None, :], si_start[None, :], COMPLEX)
        o_tile += _times(q_key, qi_key, s + x, si + xi, COMPLEX)[0]
    width = num_heads * value_dim
    offset = (row * width)[:, None] + (head * value_dim + channel)[None, :]
    tl.store(o + start * width + offset, o_tile, mask=row_mask[:, None] & mask[None, :])


@triton.jit
def _gradient_kernel(
    q, k, v, log_decay, step, grad_o, chunks, starts, grad_ends, dq, dk, dv, dlog_decay, dstep,
    num_chunks, num_tokens, num_heads, key_dim, value_dim,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, step_stride_t, step_stride_h,
    decay_stride_t, decay_stride_h, decay_stride_k, grad_stride_t, grad_stride_h,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, PER_TOKEN: tl.constexpr, STEP: tl.constexpr,
    COMPLEX: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    start = tl.load(chunks + chunk)
    length = (tl.load(chunks + num_chunks + chunk) - start).to(tl.int32)
    if length <= 0:
        return
    row = tl.arange(0, BLOCK_T)
    row_mask = row < length
    head, channel, mask = _columns(num_heads, value_dim, BLOCK_C, FOLD)
    tile_mask = row_mask[:, None] & mask[None, :]
    before_mask, after_mask = row_mask & (row > 0), row + 1 < length
    width = num_heads * value_dim
    if FOLD:
        dq, dk = _from(dq, chunk * width * key_dim, COMPLEX), _from(dk, chunk * width * key_dim, COMPLEX)
    else:
        q, k = _from(q, start * q_stride_t, COMPLEX), _from(k, start * k_stride_t, COMPLEX)
        part = (tl.program_id(2).to(tl.int64) * num_tokens + start) * num_heads * key_dim
        dq, dk = _from(dq, part, COMPLEX), _from(dk, part, COMPLEX)
    if PER_TOKEN:
        log_decay = _from(log_decay, start * decay_stride_t, COMPLEX)
        dlog_decay = _from(dlog_decay, start * width * key_dim, COMPLEX)
    else:
        dlog_decay = _from(dlog_decay, chunk * width * key_dim, COMPLEX)
    starts, grad_ends = (
        _from(starts, chunk * width * key_dim, COMPLEX),
        _from(grad_ends, chunk * width * key_dim, COMPLEX),
    )
    v += start * v_stride_t
    v_tile = _values(v, row, row_mask, head, channel, mask, v_stride_t, v_stride_h)
    v_before = _values(v, row - 1, before_mask, head, channel, mask, v_stride_t, v_stride_h)
    grad_o += start * grad_stride_t
    grad_tile = _values(grad_o, row, row_mask, head, channel, mask, grad_stride_t, grad_stride_h)
    step_tile, step_after = v_tile, v_tile
    if STEP:
        step += start * step_stride_t
        step_tile = _values(step, row, row_mask, head, channel, mask, step_stride_t, step_stride_h)
        step_after = _values(step, row + 1, after_mask, head, channel, mask, step_stride_t, step_stride_h)
    state = head * key_dim * value_dim + channel
    dv_tile = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    dstep_tile = dv_tile
    for key in range(key_dim):
        decay_offset = head * decay_stride_h + key * decay_stride_k + channel
        k_key, ki_key = _key(k, row, row_mask, head, mask, k_stride_t, k_stride_h, key, COMPLEX, FOLD)
        q_key, qi_key = _key(q, row, row_mask, head, mask, q_stride_t, q_stride_h, key, COMPLEX, FOLD)
        k_before, ki_before = _key(k, row - 1, before_mask, head, mask, k_stride_t, k_stride_h, key, COMPLEX, FOLD)
        # What has decayed, z_t = a_t S_{t-1}, by a scan of its own: S_t - k_t v_t would lose it where a_t is small.
        g, gi = _log_decay(
            log_decay, step_tile, row, row_mask, decay_offset, mask, decay_stride_t, PER_TOKEN, STEP, COMPLEX
        )
        a, ai = _exp(g, gi, COMPLEX)
        x, xi = _times(a, ai, k_before * v_before, ki_before * v_before, COMPLEX)
        a, ai, z, zi = _scan(a, ai, x, xi, False, COMPLEX)
        s_start, si_start = _load(starts, state + key * value_dim, mask, COMPLEX)
        x, xi = _times(a, ai, s_start[None, :], si_start[None, :], COMPLEX)
        z, zi = z + x, zi + xi
        # The gradient of S_t: conj(q_t) do_t, and what comes back through the decay of the token after it.
        g, gi = _log_decay(
            log_decay, step_after, row + 1, after_mask, decay_offset, mask, decay_stride_t, PER_TOKEN, STEP, COMPLEX
        )
        a, ai = _exp(g, -gi, COMPLEX)
        a, ai, ds, dsi = _scan(a, ai, q_key * grad_tile, -qi_key * grad_tile, True, COMPLEX)
        s_end, si_end = _load(grad_ends, state + key * value_dim, mask, COMPLEX)
        x, xi = _times(a, ai, s_end[None, :], si_end[None, :], COMPLEX)
        ds, dsi = tl.where(tile_mask, ds + x, 0), tl.where(tile_mask, dsi + xi, 0)

        dv_tile += _times_conjugate(ds, dsi, k_key, ki_key, COMPLEX)[0]
        q_part, qi_part = (k_key * v_tile + z) * grad_tile, -(ki_key * v_tile + zi) * grad_tile
        k_part, ki_part = ds * v_tile, dsi * v_tile
        if FOLD:
            _store(dq, state + key * value_dim, tl.sum(q_part, 0), tl.sum(qi_part, 0), mask, COMPLEX)
            _store(dk, state + key * value_dim, tl.sum(k_part, 0), tl.sum(ki_part, 0), mask, COMPLEX)
        else:
            keys = (row * num_heads + head) * key_dim + key
            _store(dq, keys, tl.sum(q_part, 1), tl.sum(qi_part, 1), row_mask, COMPLEX)
            _store(dk, keys, tl.sum(k_part, 1), tl.sum(ki_part, 1), row_mask, COMPLEX)
        dg, dgi = _times_conjugate(ds, dsi, z, zi, COMPLEX)
        if PER_TOKEN:
            matrices = (row * width * key_dim)[:, None] + (state + key * value_dim)[None, :]
            _store(dlog_decay, matrices, dg, dgi, tile_mask, COMPLEX)
        else:
            if STEP:
                g, gi = _load(log_decay, decay_offset[None, :], mask[None, :], COMPLEX)
                dstep_tile += _times_conjugate(dg, dgi, g, gi, COMPLEX)[0]
                dg, dgi = dg * step_tile, dgi * step_tile
            _store(dlog_decay, state + key * value_dim, tl.sum(dg, 0), tl.sum(dgi, 0), mask, COMPLEX)
    offset = (row * width)[:, None] + (head * value_dim + channel)[None, :]
    tl.store(dv + start * width + offset, dv_tile, mask=tile_mask)
    if STEP:
        tl.store(dstep + start * width + offset, dstep_tile, mask=tile_mask)


class _Launch:
    """Operands as the kernels read them, and what all launches have in common."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step: Tensor | None, cu_seqlens):
        self.batch_size, self.length, self.num_heads, self.value_dim = v.shape
        self.key_dim, self.num_tokens = k.shape[-1], self.batch_size * self.length
        self.is_complex = any(x.is_complex() for x in (q, k, log_decay))
        self.per_token, self.step = log_decay.dim() == 5, step is not None
        self.fold = q.dim() == 2 and k.dim() == 2
        self.q, self.k = self.planes(self.tokens(q)), self.planes(self.tokens(k))
        self.log_decay = self.planes(_dense(log_decay.flatten(0, 1) if self.per_token else log_decay[None]))
        self.v = _dense(v.flatten(0, 1))
        self.given_step = self.v if step is None else _dense(step.flatten(0, 1))
        self.chunk_size, self.block, self.num_warps = CONFIGS[architecture(v)]
        columns = self.num_heads * self.value_dim if self.fold else self.value_dim
        self.block = max(16, min(self.block, triton.next_power_of_2(columns)))
        self.tiles = triton.cdiv(columns, self.block)
        self.chunks, self.first_chunk = _cut(v, cu_seqlens, self.chunk_size)
        self.num_documents, self.num_chunks = self.first_chunk.shape[0] - 1, self.chunks.shape[1]
        self.grid = (self.num_chunks, 1 if self.fold else self.num_heads, self.tiles)
        self.flags = dict(
            BLOCK_T=self.chunk_size,
            BLOCK_C=self.block,
            FOLD=self.fold,
            PER_TOKEN=self.per_token,
            STEP=self.step,
            COMPLEX=self.is_complex,
            num_warps=self.num_warps,
        )

    def tokens(self, x: Tensor) -> Tensor:
        """q or k as [M, H, K] ([1, H, K] where both are constant)"""
        if x.dim() == 4:
            return _dense(x.flatten(0, 1))
        return _dense(x)[None].expand(1 if self.fold else self.num_tokens, -1, -1)

    def planes(self, x: Tensor) -> Tensor:
        return x.to(torch.complex64).resolve_conj() if self.is_complex else x

    def states(self, rows: int) -> Tensor:
        shape = (rows, self.num_heads, self.key_dim, self.value_dim)
        return self.v.new_empty(shape, dtype=torch.complex64 if self.is_complex else torch.float32)

    def summary_and_fold(self, k: Tensor, v: Tensor, carry: Tensor | None, backward: bool) -> tuple[Tensor, Tensor]:
        """What each chunk receives, and what is left at the end (in the backward: the beginning) of the documents."""
        transition, local, last = (self.states(n) for n in (self.num_chunks, self.num_chunks, self.num_documents))
        if self.num_chunks and last.numel():
            _summary_kernel[self.grid](
                _raw(k), v, _raw(self.log_decay), self.given_step, self.chunks, _raw(transition), _raw(local),
                self.num_chunks, self.num_heads, self.key_dim, self.value_dim,
                *k.stride()[:2], *v.stride()[:2], *self.given_step.stride()[:2], *self.log_decay.stride()[:3],
                BACKWARD=backward, **self.flags,
            )  # fmt: skip
        if last.numel():
            carry = None if carry is None else self.planes(carry).contiguous()
            size = last[0].numel()
            _fold_kernel[(triton.cdiv(size, FOLD_BLOCK), self.num_documents)](
                _raw(transition), _raw(local), _raw(last if carry is None else carry), _raw(last), self.first_chunk,
                size, BLOCK=FOLD_BLOCK, CARRY=carry is not None, COMPLEX=self.is_complex, BACKWARD=backward,
            )  # fmt: skip
        return local, last


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _raw(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _most_chunks(v: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> int:
    """How many there are is for the device to know."""
    chunks = triton.cdiv(v.shape[1], chunk_size)
    return v.shape[0] * chunks if cu_seqlens is None else chunks + cu_seqlens.shape[0] - 1


def _cut(v: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Where chunks start and end, int64 [2, chunks], and each document's first chunk, int64 [N + 1].

    Chunks that there are not start past their end.
    """
    batch_size, length = v.shape[:2]
    if cu_seqlens is None:
        bounds = torch.arange(batch_size + 1, device=v.device) * length
    else:
        bounds = cu_seqlens.long()
    first = torch.zeros_like(bounds)
    torch.cumsum((bounds.diff() + chunk_size - 1) // chunk_size, 0, out=first[1:])
    chunk = torch.arange(_most_chunks(v, cu_seqlens, chunk_size), device=v.device)
    document = (torch.searchsorted(first, chunk, right=True) - 1).clamp(max=bounds.shape[0] - 2)
    start = bounds[document] + (chunk - first[document]) * chunk_size
    return torch.stack([start, torch.minimum(start + chunk_size, bounds[document + 1])]), first


@torch.library.custom_op("torchlmoe::elementwise_recurrence_triton", mutates_args=())
def elementwise_recurrence(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    step: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns o, the final state and, for the backward, the state that each chunk finds.

    q, k: [B, T, H, K], or [H, K] where they are the same for every token; real or complex. Without q, o is zero.
    v: [B, T, H, V], float32, float16 or bfloat16. log_decay: [B, T, H, K, V] or [H, K, V], real part <= 0.
    step: [B, T, H, V], times log_decay [H, K, V]. initial_state: [N, H, K, V]. cu_seqlens: int32 [N + 1], with B = 1.
    States are float32 or complex64.
    """
    call = _Launch(k if q is None else q, k, v, log_decay, step, cu_seqlens)
    starts, final = call.summary_and_fold(call.k, call.v, initial_state, backward=False)
    if q is None:
        return torch.zeros_like(v, memory_format=torch.contiguous_format), final, starts
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    if o.numel():
        _read_kernel[call.grid](
            _raw(call.q), _raw(call.k), call.v, _raw(call.log_decay), call.given_step, call.chunks, _raw(starts), o,
            call.num_chunks, call.num_heads, call.key_dim, call.value_dim,
            *call.q.stride()[:2], *call.k.stride()[:2], *call.v.stride()[:2], *call.given_step.stride()[:2],
            *call.log_decay.stride()[:3], **call.flags,
        )  # fmt: skip
    return o, final, starts


@elementwise_recurrence.register_fake
def _(q, k, v, log_decay, step, initial_state, cu_seqlens):
    call = _Launch(k if q is None else q, k, v, log_decay, step, cu_seqlens)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return o, call.states(call.num_documents), call.states(call.num_chunks)


@torch.library.custom_op("torchlmoe::elementwise_recurrence_triton_backward", mutates_args=())
def _backward(
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
    call = _Launch(k if q is None else q, k, v, log_decay, step, cu_seqlens)
    grad_o = _dense(grad_o.flatten(0, 1)) if q is not None else torch.zeros_like(call.v)
    ends, grad_initial = call.summary_and_fold(call.q, grad_o, grad_final, backward=True)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    dstep = dv if step is None else torch.empty_like(step, memory_format=torch.contiguous_format)
    per_chunk = (call.num_chunks, call.num_heads, call.key_dim, call.value_dim)
    per_tile = (call.tiles, call.num_tokens, call.num_heads, call.key_dim)
    # Chunks that there are not write nothing.
    dq, dk = (starts.new_zeros(per_chunk) if call.fold else starts.new_empty(per_tile) for _ in range(2))
    if call.per_token:
        dlog_decay = log_decay.new_empty(log_decay.shape, dtype=starts.dtype if call.is_complex else log_decay.dtype)
    else:
        dlog_decay = starts.new_zeros(per_chunk)
    if call.num_chunks and starts.numel():
        _gradient_kernel[call.grid](
            _raw(call.q), _raw(call.k), call.v, _raw(call.log_decay), call.given_step, grad_o, call.chunks,
            _raw(starts), _raw(ends), _raw(dq), _raw(dk), dv, _raw(dlog_decay), dstep,
            call.num_chunks, call.num_tokens, call.num_heads, call.key_dim, call.value_dim,
            *call.q.stride()[:2], *call.k.stride()[:2], *call.v.stride()[:2], *call.given_step.stride()[:2],
            *call.log_decay.stride()[:3], *grad_o.stride()[:2], **call.flags,
        )  # fmt: skip

    def like(x: Tensor | None, grad: Tensor, *summed: int) -> Tensor:
        if x is None:
            return k.new_empty(0)
        grad = grad.sum(summed) if summed else grad
        grad = grad.real.contiguous() if grad.is_complex() and not x.is_complex() else grad
        return grad.to(x.dtype).view(x.shape)

    def of_key(x: Tensor | None, grad: Tensor) -> Tensor:
        if call.fold:
            return like(x, grad, 0, 3)
        return like(x, grad, 0) if x is None or x.dim() == 4 else like(x, grad, 0, 1)

    of_decay = like(log_decay, dlog_decay) if call.per_token else like(log_decay, dlog_decay, 0)
    return [of_key(q, dq), of_key(k, dk), dv, of_decay, like(step, dstep), like(initial_state, grad_initial)]


@_backward.register_fake
def _(grad_o, grad_final, q, k, v, log_decay, step, initial_state, *rest):
    return [
        k.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, log_decay, step, initial_state)
    ]


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])


def _autograd(ctx, grad_o, grad_final, _):
    *inputs, starts = ctx.saved_tensors
    grads = _backward(grad_o, grad_final, *inputs, starts)
    return (*(None if x is None else grad for x, grad in zip(inputs[:6], grads, strict=True)), None)


elementwise_recurrence.register_autograd(_autograd, setup_context=_setup_context)


def _flops(q, k, v, log_decay, step) -> int:
    """As it is defined: decay, write, add, read, and step times rate; a complex product is six, its real part four."""
    per_element = 14 + 2 * (step is not None) if k.is_complex() or log_decay.is_complex() else 5 + (step is not None)
    return v.numel() * k.shape[-1] * per_element


@register_flop_formula(torch.ops.torchlmoe.elementwise_recurrence_triton, get_raw=True)
def _(q, k, v, log_decay, step, *rest, **kwargs) -> int:
    return _flops(q, k, v, log_decay, step)


@register_flop_formula(torch.ops.torchlmoe.elementwise_recurrence_triton_backward, get_raw=True)
def _(grad_o, grad_final, q, k, v, log_decay, step, *rest, **kwargs) -> int:
    return 2 * _flops(q, k, v, log_decay, step)
