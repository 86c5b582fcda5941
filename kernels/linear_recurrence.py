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

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .recurrence_launch import Problem, empty_matrices, empty_states, fill_a_chip, problem_of, strided
from .recurrence_tiles import (
    ERASE_K,
    INVERSE,
    LOG2_E,
    Q_ERASE_KEY,
    QK,
    Chunk,
    Columns,
    Entry,
    Matrices,
    add_dot,
    add_to_state,
    bounds_of,
    chunk_at,
    column,
    decay_matrix,
    diagonal_of,
    document_of,
    dot,
    erase_tile,
    from_start,
    halfway,
    load_state,
    log2_tile,
    matrix_at,
    on_diagonal,
    own_score,
    per_head,
    read_state,
    start_of,
    store_state,
    store_tile,
    tile,
    to_end,
    transposed,
    unit_lower_inverse,
    within_blocks,
)


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
    if q is None or fill_a_chip(problem, tiles):
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
