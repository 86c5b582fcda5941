"""The gradient of the linear recurrence; importing it registers the gradient with the forward's operation.

It has the notation of `linear_recurrence.py`. Only the inputs are kept between the two:
the scores and the state at the start of every chunk are computed again. With dS the gradient of a chunk's last state
(stored divided by the scale, so that do multiplies the unscaled q: in float16 a small product would lose its digits):

    dn      = P^T do + (k exp(G_C - G)) dS           dv = dn, or dz with an erase term (erase_key = k)
    dz      = T^T dn                                 dP = do n^T           dP_erase = -dz n^T
    dq      = rows(dP, k) + exp G (do S^T)           derase = rows(dP_erase, k) - exp G (dz S^T)
    dk      = columns(dP, q) + columns(dP_erase, erase) + exp(G_C - G) (n dS^T)
    dS     <- (q exp G)^T do + exp(G_C) dS - (erase exp G)^T dz

  reverse_kernel       per document, head and V tile: dS in registers from the last chunk to the first; dz.
  score_grads_kernel   per chunk and head: dP, a sum over V.
  value_grads_kernel   per chunk, head and V tile: dv and dh.
  key_grads_kernel     per chunk, head and K tile: dq, dk, derase, derase_key, dg and du.

The gradient of a decay sums the terms that pass through it, level by level: a difference of two sums would lose the
digits of a gate that lets little through. Sums over heads that share q and k, and over K tiles, add the separate
results of the programs: no atomics, the same bits every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .linear_recurrence import chunk_matrices, flops, linear_recurrence, scan
from .linear_recurrence_key_grads import ERASE_ERASE_KEY, key_grads_kernel
from .recurrence_launch import config_of, empty_matrices, empty_states, fill_a_chip, problem_of, strided
from .recurrence_tiles import (
    ERASE_K,
    INVERSE,
    Q_ERASE_KEY,
    QK,
    Chunk,
    Columns,
    Entry,
    add_dot,
    add_to_state,
    bounds_of,
    chunk_at,
    decay_matrix,
    diagonal_of,
    dot,
    erase_tile,
    from_start,
    halfway,
    load_state,
    log2_tile,
    matrix_at,
    of_other_half,
    on_diagonal,
    own_score,
    read_state,
    store_state,
    store_tile,
    tile,
    to_end,
    transposed,
    within_blocks,
)


@triton.jit
def scores_by_writers(q_CK, k_CK, g, u, scale, chunk, head, keys, DOT: tl.constexpr):
    """scale <q, k> under a decay that is not per channel, transposed."""
    scores_CC = dot(k_CK, transposed(q_CK, DOT), DOT)
    scores_CC *= tl.trans(decay_matrix(g, chunk, head, u is not None))
    if u is not None:
        scores_CC += on_diagonal(own_score(q_CK, k_CK, u, head, keys), chunk.rows)
    return scores_CC * scale


@triton.jit
def reverse_kernel(
    terms, matrices, do, dz, final_grad, state_grads, initial_grad, documents, scale, heads,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PER_CHANNEL: tl.constexpr, IS_BETA: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dz, if given: the gradient of z with an erase term, else of v, whose gradient lacks only T."""
    q, k, g, erase, erase_key, h, u = terms.q, terms.k, terms.g, terms.erase, terms.erase_key, terms.h, terms.u
    tiles = tl.cdiv(V, BLOCK_V)
    document, head = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    rows, keys = tl.arange(0, C), Columns(tl.arange(0, BLOCK_K), K)
    values = Columns(tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V), V)
    row, start, end, span = bounds_of(documents, document, SPAN)
    grad_KV = load_state(final_grad, Entry(document, head, heads), keys, values) * (1 / scale)
    chunks = tl.cdiv(end - start, C)
    for step in range(0, chunks):
        number = chunks - 1 - step
        token, slot = start + number * C, span * (SPAN // C) + number
        chunk, entry = Chunk(row, token, rows, end - token), Entry(slot, head, heads)
        store_state(state_grads, grad_KV, entry, keys, values)
        end_CK, whole_K = to_end(g, chunk, head, keys, PER_CHANNEL)
        _, whole_V = to_end(h, chunk, head, values, True)
        if q is not None:
            q_CK = tile(q, chunk, head // GROUP, keys)
            do_CV = tile(do, chunk, head, values)
        if dz is not None:
            if erase_key is None:
                erase_key_CK = tile(k, chunk, head // GROUP, keys)
            else:
                erase_key_CK = tile(erase_key, chunk, head, keys)
            dz_CV = read_state(erase_key_CK, end_CK, grad_KV, PER_CHANNEL, DOT) * scale
            if q is not None:
                if matrices is None:
                    scores_CC = scores_by_writers(q_CK, erase_key_CK, g, u, scale, chunk, head, keys, DOT)
                else:
                    of_erase_key: tl.constexpr = QK if erase_key is None else Q_ERASE_KEY
                    scores_CC = tl.trans(tl.load(matrix_at(matrices, of_erase_key, entry, rows, C)))
                dz_CV = add_dot(dz_CV, scores_CC, do_CV, DOT)
            if erase is not None:
                dz_CV = dot(tl.trans(tl.load(matrix_at(matrices, INVERSE, entry, rows, C))), dz_CV, DOT)
                erase_CK, beta_C1 = erase_tile(erase, erase_key_CK, chunk, head, keys, IS_BETA)
            store_tile(dz, dz_CV, chunk, head, values)
        grad_KV *= whole_K[:, None] * whole_V[None, :]
        start_CK = from_start(g, chunk, head, keys, PER_CHANNEL, u is not None)
        if q is not None:
            start_CV = from_start(h, chunk, head, values, True, u is not None)
            grad_KV = add_to_state(grad_KV, q_CK, start_CK, do_CV * start_CV, PER_CHANNEL, DOT)
        if erase is not None:
            grad_KV = add_to_state(grad_KV, erase_CK, start_CK, dz_CV * (-1 / scale) * beta_C1, PER_CHANNEL, DOT)
    if initial_grad is not None:
        store_state(initial_grad, grad_KV * scale, Entry(document, head, heads), keys, values)


@triton.jit
def score_grads_kernel(
    terms, n, do, dz, grads, documents, scale, heads,
    V: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, BLOCK_V: tl.constexpr,
    PER_CHANNEL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of <q, k>, <erase, erase_key>, <q, erase_key> and <erase, k>, times a scalar decay."""
    v, g, erase_key, h, u = terms.v, terms.g, terms.erase_key, terms.h, terms.u
    slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row, token, valid = chunk_at(documents, slot, SPAN, C)
    if valid <= 0:
        return
    rows = tl.arange(0, C)
    chunk, entry = Chunk(row, token, rows, valid), Entry(slot, head, heads)
    qk = tl.zeros([C, C], tl.float32)
    q_erase_key, erase_erase_key, erase_k = qk, qk, qk
    own = tl.zeros([C], tl.float32)
    for first in range(0, V, BLOCK_V):
        values = Columns(first + tl.arange(0, BLOCK_V), V)
        if n is None or erase_key is not None:
            v_CV = tile(v, chunk, head, values)
        if n is not None:
            n_CV = tile(n, chunk, head, values)
            dz_CV = tile(dz, chunk, head, values)
            erase_erase_key -= dot(dz_CV, transposed(n_CV, DOT), DOT)
            if erase_key is None:
                v_CV = n_CV
            else:
                erase_k -= dot(dz_CV, transposed(v_CV, DOT), DOT)
        if do is not None:
            do_CV = tile(do, chunk, head, values)
            own += tl.sum(do_CV * v_CV, 1)
            if erase_key is not None:
                q_erase_key = add_dot(q_erase_key, do_CV, transposed(n_CV, DOT), DOT)
            if h is None:
                qk = add_dot(qk, do_CV, transposed(v_CV, DOT), DOT)
            else:
                h_CV = log2_tile(h, chunk, head, values)
                for level in tl.static_range(6):
                    if (1 << level) < C:
                        later, earlier = halfway(h_CV, rows, 1 << level, u is not None, C, BLOCK_V)
                        qk += within_blocks(dot(do_CV * later, transposed(v_CV * earlier, DOT), DOT), rows, 2 << level)
    erase_erase_key *= 1 / scale
    erase_k *= 1 / scale
    strict = rows[:, None] > rows[None, :]
    if PER_CHANNEL:
        decay_CC = tl.where(rows[:, None] >= rows[None, :], 1.0, 0.0)
    else:
        decay_CC = decay_matrix(g, chunk, head, u is not None)
    if do is not None:
        qk = tl.where(strict, qk * decay_CC, on_diagonal(own, rows))
        tl.store(matrix_at(grads, QK, entry, rows, C), qk)
        if erase_key is not None:
            tl.store(matrix_at(grads, Q_ERASE_KEY, entry, rows, C), q_erase_key * decay_CC)
    if n is not None:
        tl.store(matrix_at(grads, ERASE_ERASE_KEY, entry, rows, C), tl.where(strict, erase_erase_key * decay_CC, 0.0))
        if erase_key is not None:
            tl.store(matrix_at(grads, ERASE_K, entry, rows, C), tl.where(strict, erase_k * decay_CC, 0.0))


@triton.jit
def value_grads_kernel(
    terms, matrices, states, state_grads, do, dz, dv, dh, documents, scale, heads,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PER_CHANNEL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradients of v and h."""
    q, k, v, g, erase_key, h, u = terms.q, terms.k, terms.v, terms.g, terms.erase_key, terms.h, terms.u
    tiles = tl.cdiv(V, BLOCK_V)
    slot, head = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    row, token, valid = chunk_at(documents, slot, SPAN, C)
    if valid <= 0:
        return
    rows, keys = tl.arange(0, C), Columns(tl.arange(0, BLOCK_K), K)
    chunk, entry = Chunk(row, token, rows, valid), Entry(slot, head, heads)
    values = Columns(tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V), V)
    end_CK, whole_K = to_end(g, chunk, head, keys, PER_CHANNEL)
    k_CK = tile(k, chunk, head // GROUP, keys)
    grad_KV = load_state(state_grads, entry, keys, values)
    dv_CV = read_state(k_CK, end_CK, grad_KV, PER_CHANNEL, DOT) * scale
    if q is not None:
        q_CK = tile(q, chunk, head // GROUP, keys)
        do_CV = tile(do, chunk, head, values)
    if h is None:
        if q is not None:
            if matrices is None:
                scores_CC = scores_by_writers(q_CK, k_CK, g, u, scale, chunk, head, keys, DOT)
            else:
                scores_CC = tl.trans(tl.load(matrix_at(matrices, QK, entry, rows, C)))
            dv_CV = add_dot(dv_CV, scores_CC, do_CV, DOT)
        if erase_key is not None:
            dz_CV = tile(dz, chunk, head, values)
            dv_CV -= dot(tl.trans(tl.load(matrix_at(matrices, ERASE_K, entry, rows, C))), dz_CV, DOT)
    else:
        end_CV, whole_V = to_end(h, chunk, head, values, True)
        v_CV = tile(v, chunk, head, values)
        state_KV = load_state(states, entry, keys, values)
        through_V = tl.sum(state_KV * whole_K[:, None] * grad_KV, 0) * whole_V * scale
        passing_CV = tl.zeros([C, BLOCK_V], tl.float32) + through_V[None, :]
        dv_CV *= end_CV
        written_CV = v_CV * dv_CV
        read_CV = tl.zeros([C, BLOCK_V], tl.float32)
        h_CV = log2_tile(h, chunk, head, values)
        if q is not None:
            start_CK = from_start(g, chunk, head, keys, PER_CHANNEL, u is not None)
            start_CV = from_start(h, chunk, head, values, True, u is not None)
            read_CV += do_CV * read_state(q_CK, start_CK, state_KV, PER_CHANNEL, DOT) * start_CV * scale
            scores_CC = tl.load(matrix_at(matrices, QK, entry, rows, C)).to(tl.float32)
            columns_CC = tl.trans(scores_CC)
        for level in tl.static_range(6):
            if (32 >> level) < C:
                is_later = ((rows // (32 >> level)) % 2 == 1)[:, None]
                passing_CV += of_other_half(tl.where(is_later, read_CV, written_CV), 32 >> level, C, BLOCK_V)
                if q is not None:
                    later, earlier = halfway(h_CV, rows, 32 >> level, u is not None, C, BLOCK_V)
                    by_rows = dot(within_blocks(scores_CC, rows, 64 >> level), v_CV * earlier, DOT)
                    by_columns = dot(within_blocks(columns_CC, rows, 64 >> level), do_CV * later, DOT) * earlier
                    read_CV += do_CV * by_rows * later
                    written_CV += v_CV * by_columns
                    dv_CV += by_columns
        if q is not None:
            dv_CV += diagonal_of(scores_CC, rows)[:, None] * do_CV
        if u is None:
            passing_CV += read_CV
        store_tile(dh, passing_CV, chunk, head, values)
    store_tile(dv, dv_CV, chunk, head, values)


class Config(NamedTuple):
    """Tile shapes and launch options; the chunk is the forward's."""

    block_k: int  # of key_grads_kernel; the others hold all of K
    block_v: int
    scan_warps: int
    grads_warps: int
    stages: int


# Keyed as the forward's.
CONFIGS: dict[tuple[str, bool, int, int], Config] = {
    ("default", False, 64, 2): Config(block_k=64, block_v=32, scan_warps=4, grads_warps=8, stages=1),
    ("default", False, 128, 2): Config(block_k=64, block_v=64, scan_warps=8, grads_warps=8, stages=1),
    ("default", False, 256, 2): Config(block_k=64, block_v=32, scan_warps=8, grads_warps=8, stages=1),
    ("default", True, 64, 2): Config(block_k=64, block_v=32, scan_warps=8, grads_warps=8, stages=1),
    ("default", True, 128, 2): Config(block_k=64, block_v=64, scan_warps=8, grads_warps=8, stages=1),
    ("default", True, 256, 2): Config(block_k=64, block_v=32, scan_warps=8, grads_warps=8, stages=1),
    ("default", False, 64, 4): Config(block_k=32, block_v=16, scan_warps=8, grads_warps=8, stages=1),
    ("default", False, 128, 4): Config(block_k=32, block_v=16, scan_warps=8, grads_warps=8, stages=1),
    ("default", False, 256, 4): Config(block_k=32, block_v=16, scan_warps=8, grads_warps=8, stages=1),
    ("default", True, 64, 4): Config(block_k=16, block_v=16, scan_warps=8, grads_warps=8, stages=1),
    ("default", True, 128, 4): Config(block_k=16, block_v=16, scan_warps=8, grads_warps=8, stages=1),
    ("default", True, 256, 4): Config(block_k=16, block_v=16, scan_warps=8, grads_warps=8, stages=1),
    ("interpreter", False, 64, 2): Config(block_k=32, block_v=64, scan_warps=4, grads_warps=4, stages=1),
    ("interpreter", False, 64, 4): Config(block_k=32, block_v=64, scan_warps=4, grads_warps=4, stages=1),
    ("interpreter", True, 64, 2): Config(block_k=32, block_v=64, scan_warps=4, grads_warps=4, stages=1),
    ("interpreter", True, 64, 4): Config(block_k=32, block_v=64, scan_warps=4, grads_warps=4, stages=1),
}
CONFIGS |= {  # products take their operands from registers there
    ("sm_80", *key[1:]): config._replace(block_k=32, block_v=32, grads_warps=4)
    for key, config in CONFIGS.items()
    if key[0] == "default" and not key[1] and key[3] == 2
}
CONFIGS |= {  # a warp has 64 threads there, with more registers each if they are few
    ("gfx942", *key[1:]): config._replace(
        block_k=16 if key[1] else config.block_k,
        block_v=min(32, config.block_v),
        scan_warps=config.scan_warps // 2,
        grads_warps=4,
    )
    for key, config in CONFIGS.items()
    if key[0] == "default"
}


@torch.library.custom_op("torchlmoe::linear_recurrence_triton_backward", mutates_args=())
def linear_recurrence_backward(
    grad_o: Tensor,
    grad_final: Tensor,
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
) -> list[Tensor]:
    """Gradients of all tensors but cu_seqlens, in order, each in its dtype; empty for those that are None."""
    if scale == 0:  # o is zero, and the kernels divide by it
        grad_o, scale = torch.zeros_like(grad_o), 1.0
    problem = problem_of(
        q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale, cu_seqlens, chunks_per_span=1
    )
    terms, documents, heads, shape = problem.terms, problem.documents, problem.heads, problem.shape
    config = config_of(CONFIGS, k, problem.decays_per_channel, problem.dtype)
    key_dim, value_dim = k.shape[-1], v.shape[-1]
    all_k, all_v = (max(16, triton.next_power_of_2(width)) for width in (key_dim, value_dim))
    block_k, block_v = min(config.block_k, all_k), min(config.block_v, all_v)
    tiles_k, tiles_v = triton.cdiv(key_dim, block_k), triton.cdiv(value_dim, block_v)
    if initial_state is not None:
        initial_state = initial_state.contiguous()

    def like(x: Tensor | None, *size: int, dtype: torch.dtype | None = None) -> Tensor | None:
        return None if x is None else torch.empty(size or x.shape, dtype=dtype or x.dtype, device=x.device)

    matrices, states = chunk_matrices(problem), empty_states(problem)
    n = like(erase, *v.shape, dtype=problem.dtype)
    scan(problem, matrices, initial_state=initial_state, states=states, n=n)

    # The pass over the states leaves the gradient of what k writes, if that is v or z; where its programs would not
    # fill the chip, it leaves that of v, on which no state depends, to a program for every chunk.
    busy = fill_a_chip(problem, tiles_v)
    v_on_the_way = erase_key is None and value_log_decay is None and (erase is not None or busy)
    dz = like(erase, *v.shape, dtype=problem.dtype)
    dv = dz if v_on_the_way and erase is not None else torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v_on_the_way:
        dz = dv
    do = None if q is None else strided(grad_o)
    state_grads, initial_grad = empty_states(problem), like(initial_state)
    common = dict(PER_CHANNEL=shape["PER_CHANNEL"], DOT=shape["DOT"], V=value_dim, C=shape["C"], SPAN=shape["SPAN"])
    of_keys = dict(GROUP=shape["GROUP"], K=key_dim)
    of_scan = dict(num_warps=config.scan_warps, num_stages=config.stages)
    of_grads = dict(num_warps=config.grads_warps, num_stages=config.stages)
    reverse_kernel[(problem.num_documents * heads * tiles_v,)](
        terms, matrices, do, strided(dz), grad_final.contiguous(), state_grads, initial_grad, documents, scale, heads,
        **of_keys, **common, BLOCK_K=all_k, BLOCK_V=block_v, IS_BETA=shape["IS_BETA"], **of_scan,
    )  # fmt: skip

    chunks = problem.num_spans
    grads = empty_matrices(problem)
    if q is not None or erase is not None:
        score_grads_kernel[(chunks * heads,)](
            terms, strided(n), do, strided(dz), grads, documents, scale, heads, **common, BLOCK_V=block_v, **of_grads,
        )  # fmt: skip
    dh = like(value_log_decay)
    if not v_on_the_way:
        value_grads_kernel[(chunks * heads * tiles_v,)](
            terms, matrices, states, state_grads, do, strided(dz), strided(dv), strided(dh), documents, scale, heads,
            **of_keys, **common, BLOCK_K=all_k, BLOCK_V=block_v, **of_grads,
        )  # fmt: skip
    of_heads = (*v.shape[:3], key_dim)
    dq, dk = like(q, *of_heads), torch.empty(of_heads, dtype=k.dtype, device=k.device)
    dg, derase = like(log_decay), like(erase)
    if dg is not None and not shape["PER_CHANNEL"]:
        dg = like(log_decay, *v.shape[:3], tiles_k, dtype=torch.float32)
    if shape["IS_BETA"]:
        derase = like(erase, *v.shape[:3], tiles_k, dtype=torch.float32)
    derase_key = like(erase_key)
    du = None if bonus is None else torch.zeros(chunks, heads, key_dim, dtype=torch.float32, device=bonus.device)
    key_grads_kernel[(chunks * heads * tiles_k,)](
        terms, strided(n), grads, states, state_grads, do, strided(dz), strided(dq), strided(dk), strided(dg),
        strided(derase), strided(derase_key), du, documents, scale, heads, **of_keys, **common,
        BLOCK_K=block_k, BLOCK_V=block_v, IS_BETA=shape["IS_BETA"], **of_grads,
    )  # fmt: skip

    if (group := shape["GROUP"]) > 1:
        dq, dk = (None if x is None else x.unflatten(2, (-1, group)).sum(3) for x in (dq, dk))
    if dg is not None and not shape["PER_CHANNEL"]:
        dg = dg.sum((0, 1, 3) if log_decay.dim() == 1 else 3).to(log_decay.dtype)
    if shape["IS_BETA"]:
        derase = derase.sum(3).to(erase.dtype)
    if du is not None:
        du = du.sum(0).to(bonus.dtype)
    found = (dq, dk, dv.to(v.dtype), dg, derase, derase_key, dh, du, initial_grad)
    return [k.new_empty(0) if grad is None else grad for grad in found]


@linear_recurrence_backward.register_fake
def _(grad_o, grad_final, q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, scale, initial_state, *rest):
    tensors = (q, k, v, log_decay, erase, erase_key, value_log_decay, bonus, initial_state)
    return [k.new_empty(0 if x is None else x.shape) if x is None else x.new_empty(x.shape) for x in tensors]


@register_flop_formula(torch.ops.torchlmoe.linear_recurrence_triton_backward)
def _(grad_o, grad_final, *shapes, **kwargs) -> int:
    return 2 * flops(*shapes)


def _setup_context(ctx, inputs, output) -> None:
    *terms, ctx.scale, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*terms, initial_state, cu_seqlens)


def _autograd(ctx, grad_o, grad_final):
    *terms, initial_state, cu_seqlens = ctx.saved_tensors
    grads = linear_recurrence_backward(grad_o, grad_final, *terms, ctx.scale, initial_state, cu_seqlens)
    *of_terms, of_state = [None if x is None else grad for x, grad in zip((*terms, initial_state), grads, strict=True)]
    return (*of_terms, None, of_state, None)


linear_recurrence.register_autograd(_autograd, setup_context=_setup_context)
