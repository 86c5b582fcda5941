"""The recurrence chunk by chunk in plain PyTorch: the path of every CPU, and wherever no kernel serves.

In a chunk with start state S, G the inclusive cumulative sum of the log decay, e what is erased (at b = k):

    P = tril <q, k>        L = strict_tril <e, k>         <x, y>_ij = sum_d x_id y_jd exp(G_id - G_jd)
    V' = (I + L)^-1 (V - (e * exp G) S)                   what is really written; V' = V where nothing is erased
    O  = (q * exp G) S + P V'
    S <- exp(G_C) S + (k * exp(G_C - G))^T V'

Only S <- ... and V' run one chunk after another (over all documents and heads at once). The forward hands S, V' and
(I + L)^-1 of every chunk to the backward, which runs the mirrored scan. With dS the gradient of the chunk's last state:

    dV' = P^T dO + (k * exp(G_C - G)) dS                  dV = (I + L)^-T dV'
    dP  = tril(dO V'^T)                                   dL = -strict_tril(dV V'^T)
    d(q * exp G) = dO S^T    d(e * exp G) = -dV S^T       d(k * exp(G_C - G)) = V' dS^T
    dS <- (q * exp G)^T dO + exp(G_C) dS - (e * exp G)^T dV
    dg = reverse_cumsum(q * dq + e * de - k * dk) + sum_v S_C * dS      per chunk, so that extreme gates do not cancel

q and e do the same things to k and S, so they are stacked as the "readers" of a chunk and go through them together.

Legend: M chunks, H heads of v, N = M * H, R readers, C tokens a chunk, K key width, V value width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlmoe.ops.chunk_layout import ChunkLayout, chunk_layout, kept_layout
from torchlmoe.ops.decayed_scores import ChannelDecayScores, ScalarDecayScores, Scores, UndecayedScores

CHUNK_SIZE = 64


@dataclass
class _Chunks:
    """All that both directions need, cut into chunks and promoted to at least float32."""

    layout: ChunkLayout
    num_heads: int
    k_NCK: Tensor
    v_NCV: Tensor
    readers_NRCK: Tensor | None  # q times scale, then e, those of them that there are
    beta_NC: Tensor | None  # where e = beta * k
    scores: Scores
    from_start: Tensor | None  # exp(G), [N, C, 1 or K]
    to_end: Tensor | None  # exp(G_C - G)
    whole: Tensor | None  # exp(G_C), [N, 1 or K, 1]

    def from_start_of(self, x_NRCK: Tensor) -> Tensor:
        return x_NRCK if self.from_start is None else x_NRCK * self.from_start[:, None]

    def to_end_of(self, x_NCK: Tensor) -> Tensor:
        return x_NCK if self.to_end is None else x_NCK * self.to_end

    def steps(self) -> list[tuple[slice, int]]:
        """The rows of each step of the scan, and how many documents' heads take part."""
        return [
            (slice(start * self.num_heads, (start + count) * self.num_heads), count * self.num_heads)
            for start, count in zip(self.layout.starts(), self.layout.num_active, strict=True)
        ]


def layout_of(v: Tensor, cu_seqlens: Tensor | None) -> ChunkLayout:
    """The layout of v's rows or documents. Raises ValueError for bounds that are none."""
    batch_size, length = v.shape[:2]
    return chunk_layout(batch_size, length, None if cu_seqlens is None else cu_seqlens.tolist(), CHUNK_SIZE, v.device)


def kept_layout_of(v: Tensor, cu_seqlens: Tensor | None) -> ChunkLayout:
    """`layout_of`, made once for all layers of a step, both ways: for real tensors, not for traced ones."""
    return kept_layout(v, cu_seqlens, CHUNK_SIZE)


def _cut(q, k, v, log_decay, erase, scale, layout) -> _Chunks:
    batch_size, length, num_heads, _ = v.shape
    dtype = torch.promote_types(v.dtype, torch.float32)

    def cut(x: Tensor) -> Tensor:
        return layout.to_chunks(x, num_heads).to(dtype)

    k_NCK, v_NCV = cut(k), cut(v)
    readers = []
    if q is not None:
        readers.append(cut(q) * scale)
    beta_NC = None
    if erase is not None:
        beta_NC = cut(erase) if erase.dim() == 3 else None
        readers.append(cut(erase) if beta_NC is None else k_NCK * beta_NC[..., None])

    scores: Scores = UndecayedScores()
    from_start = to_end = whole = None
    if log_decay is not None:
        if log_decay.dim() == 1:
            log_decay = log_decay.expand(batch_size, length, num_heads)
        total = cut(log_decay).double().cumsum(1)
        if log_decay.dim() == 3:
            scores = ScalarDecayScores(total, dtype)
            total = total[..., None]
        else:
            scores = ChannelDecayScores(total, dtype)
        from_start = total.to(dtype).exp()
        to_end = (total[:, -1:] - total).to(dtype).exp()
        whole = from_start[:, -1, :, None]
    readers_NRCK = torch.stack(readers, 1) if readers else None
    return _Chunks(layout, num_heads, k_NCK, v_NCV, readers_NRCK, beta_NC, scores, from_start, to_end, whole)


def _scan(
    chunks: _Chunks, erased_key: Tensor | None, inverse_NCC: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each chunk's first state [N, K, V], V' [N, C, V], and the documents' last states, longest first."""
    layout, num_heads = chunks.layout, chunks.num_heads
    v_NCV = chunks.v_NCV
    num_documents = layout.order_N.shape[0]
    state = v_NCV.new_zeros(num_documents * num_heads, chunks.k_NCK.shape[-1], v_NCV.shape[-1])
    if initial_state is not None:
        state = initial_state.index_select(0, layout.order_N).to(v_NCV.dtype).flatten(0, 1)
    written_key = chunks.to_end_of(chunks.k_NCK).mT
    written = torch.bmm(written_key, v_NCV) if erased_key is None else None

    starts, values = [], []
    finished = []  # states of documents that end, shortest first
    for rows, count in chunks.steps():
        finished.append(state[count:])
        state = state[:count]
        starts.append(state)
        decayed = state if chunks.whole is None else state * chunks.whole[rows]
        if written is not None:
            state = decayed + written[rows]
        else:
            assert erased_key is not None
            assert inverse_NCC is not None
            residual = torch.baddbmm(v_NCV[rows], erased_key[rows], state, alpha=-1)
            values.append(torch.bmm(inverse_NCC[rows], residual))
            state = torch.baddbmm(decayed, written_key[rows], values[-1])
    final = torch.cat([state, *reversed(finished)]).unflatten(0, (num_documents, num_heads))
    return torch.cat(starts), torch.cat(values) if values else v_NCV, final


def _restore_order(x_N: Tensor, layout: ChunkLayout) -> Tensor:
    return torch.empty_like(x_N).index_copy(0, layout.order_N, x_N)


def chunked_forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: ChunkLayout | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments as in `linear_recurrence`; layout: that of v, if it is at hand.

    Returns o [B, T, H, V] in v's dtype, the final state [documents, H, K, V], and for the backward the first state of
    every chunk, V' and (I + L)^-T (empty where nothing is erased).

    Made of differentiable torch operations throughout, so it can also be traced or differentiated by autograd.
    """
    batch_size, length, num_heads, _ = v.shape
    empty = v.new_empty(0, dtype=torch.promote_types(v.dtype, torch.float32))
    if batch_size * length == 0:
        return torch.zeros_like(v), _empty_state(k, v, initial_state, cu_seqlens), empty, empty.clone(), empty.clone()
    chunks = _cut(q, k, v, log_decay, erase, scale, layout or layout_of(v, cu_seqlens))
    p_NCC = inverse_NCC = erased_key = read_key = None
    if chunks.readers_NRCK is not None:
        scores = chunks.scores.forward(chunks.readers_NRCK, chunks.k_NCK)
        decayed = chunks.from_start_of(chunks.readers_NRCK)
        if q is not None:
            p_NCC, read_key = scores[:, 0], decayed[:, 0]
        if erase is not None:
            erased_key = decayed[:, -1]
            identity = torch.eye(scores.shape[-1], dtype=scores.dtype, device=scores.device)
            # The diagonal is taken as ones, so that L stands for I + L.
            inverse_NCC = torch.linalg.solve_triangular(
                scores[:, -1], identity.expand_as(scores[:, -1]), upper=False, unitriangular=True
            )
    starts, value, final = _scan(chunks, erased_key, inverse_NCC, initial_state)
    final = _restore_order(final, chunks.layout)
    if p_NCC is None or read_key is None:
        o = torch.zeros_like(v)
    else:
        o = torch.baddbmm(torch.bmm(read_key, starts), p_NCC, value)
        o = chunks.layout.to_tokens(o, num_heads, (batch_size, length), num_heads).to(v.dtype)
    if inverse_NCC is None:
        return o, final, starts, empty, empty.clone()
    return o, final, starts, value, inverse_NCC.mT.contiguous()


def _empty_state(k: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The final states where there is no token at all: what came in."""
    if initial_state is not None:
        return initial_state.clone()
    num_documents = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(v.dtype, torch.float32)
    return torch.zeros(num_documents, v.shape[2], k.shape[-1], v.shape[-1], dtype=dtype, device=v.device)


def chunked_backward(
    grad_o: Tensor,
    grad_final: Tensor,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    layout: ChunkLayout,
    final: Tensor,
    starts: Tensor,
    value: Tensor,
    inverse_T: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, log_decay, erase and initial_state, each in its own dtype; None where there is none.

    The last four arguments are what `chunked_forward` returned beside o.
    """
    batch_size, length, num_heads, _ = v.shape
    if batch_size * length == 0:
        none = [None if x is None else torch.zeros_like(x) for x in (q, k, v, log_decay, erase)]
        return (*none, None if initial_state is None else grad_final)  # type: ignore[return-value]
    chunks = _cut(q, k, v, log_decay, erase, scale, layout)
    readers, k_NCK = chunks.readers_NRCK, chunks.k_NCK
    if erase is None:
        value = chunks.v_NCV
    decayed = None if readers is None else chunks.from_start_of(readers)
    written_key = chunks.to_end_of(k_NCK)

    grad_rows = []  # the gradient that each reader's product with S has: dO, and -dV
    grad_value = read_grad = None
    if readers is not None and decayed is not None and q is not None:
        grad_o_NCV = layout.to_chunks(grad_o, num_heads).to(k_NCK.dtype)
        grad_value = torch.bmm(chunks.scores.forward(readers[:, :1], k_NCK)[:, 0].mT, grad_o_NCV)
        read_grad = torch.bmm(decayed[:, 0].mT, grad_o_NCV)
        grad_rows.append(grad_o_NCV)
    erased_key = None if erase is None or decayed is None else decayed[:, -1]

    # The mirrored scan: documents come in at their last chunk.
    last_grad = grad_final.index_select(0, layout.order_N).to(k_NCK.dtype).flatten(0, 1)
    grad_state = last_grad[:0]
    grad_ends, grad_values, grad_inputs = [], [], []  # dS at each chunk's end, dV', -dV
    for rows, count in reversed(chunks.steps()):
        grad_state = torch.cat([grad_state, last_grad[grad_state.shape[0] : count]])
        grad_ends.append(grad_state)
        if grad_value is None:
            grad_value_rows = torch.bmm(written_key[rows], grad_state)
        else:
            grad_value_rows = torch.baddbmm(grad_value[rows], written_key[rows], grad_state)
        grad_values.append(grad_value_rows)
        if chunks.whole is not None:
            grad_state = grad_state * chunks.whole[rows]
        if read_grad is not None:
            grad_state = grad_state + read_grad[rows]
        if erased_key is not None:
            grad_inputs.append(torch.bmm(inverse_T[rows], grad_value_rows).neg_())
            grad_state = torch.baddbmm(grad_state, erased_key[rows].mT, grad_inputs[-1])
    grad_initial = torch.cat([grad_state, last_grad[grad_state.shape[0] :]])
    grad_end_NKV = torch.cat(grad_ends[::-1])
    if erased_key is None:
        grad_v_NCV = torch.cat(grad_values[::-1])
    else:
        grad_rows.append(torch.cat(grad_inputs[::-1]))
        grad_v_NCV = -grad_rows[-1]

    grad_k_NCK = chunks.to_end_of(torch.bmm(value, grad_end_NKV.mT))
    grad_readers = None
    if readers is not None:
        rows_NRCV = torch.stack(grad_rows, 1)
        flat = rows_NRCV.flatten(1, 2)
        grad_scores = torch.bmm(flat, value.mT).unflatten(1, rows_NRCV.shape[1:3])
        if erase is not None:
            grad_scores[:, -1].diagonal(dim1=-2, dim2=-1).zero_()  # L is strict
        grad_readers, grad_k = chunks.scores.backward(grad_scores, readers, k_NCK)
        grad_k_NCK = grad_k_NCK.add_(grad_k)
        grad_readers += chunks.from_start_of(torch.bmm(flat, starts.mT).unflatten(1, rows_NRCV.shape[1:3]))

    def to_tokens(x: Tensor, like: Tensor) -> Tensor:
        return layout.to_tokens(x, num_heads, (batch_size, length), like.shape[2]).to(like.dtype)

    grad_log_decay = None
    if log_decay is not None:
        per_head = log_decay.dim() < 4
        flow = k_NCK * -grad_k_NCK
        if per_head:
            flow = flow.sum(-1)
        if readers is not None and grad_readers is not None:
            read_flow = readers * grad_readers
            flow = flow + (read_flow.sum((1, 3)) if per_head else read_flow.sum(1))
        at_end = (_ends(chunks, starts, final) * grad_end_NKV).sum((1, 2) if per_head else 2)
        grad_decay_NC = flow.flip(1).cumsum(1).flip(1) + at_end[:, None]
        grad_log_decay = layout.to_tokens(grad_decay_NC, num_heads, (batch_size, length), num_heads)
        if log_decay.dim() == 1:
            grad_log_decay = grad_log_decay.sum((0, 1))
        grad_log_decay = grad_log_decay.to(log_decay.dtype)

    grad_q = grad_erase = None
    if q is not None and grad_readers is not None:
        grad_q = to_tokens(grad_readers[:, 0] * scale, q)
    if erase is not None and grad_readers is not None:
        grad_e_NCK = grad_readers[:, -1]
        if chunks.beta_NC is None:
            grad_erase = to_tokens(grad_e_NCK, erase)
        else:
            grad_erase = to_tokens((grad_e_NCK * k_NCK).sum(-1), erase)
            grad_k_NCK.addcmul_(grad_e_NCK, chunks.beta_NC[..., None])
    grad_initial_state = None
    if initial_state is not None:
        grad_initial_state = _restore_order(grad_initial.unflatten(0, (-1, num_heads)), layout).to(initial_state.dtype)
    return grad_q, to_tokens(grad_k_NCK, k), to_tokens(grad_v_NCV, v), grad_log_decay, grad_erase, grad_initial_state


def _ends(chunks: _Chunks, starts: Tensor, final: Tensor) -> Tensor:
    """Each chunk's last state: the first of the document's next chunk, or the document's last."""
    last = final.index_select(0, chunks.layout.order_N).flatten(0, 1)
    steps = chunks.steps()
    ends = []
    for (_, count), following in zip(steps, [*steps[1:], None], strict=True):
        if following is None:
            ends.append(last[:count])
        else:
            rows, going_on = following
            ends += [starts[rows], last[going_on:count]]
    return torch.cat(ends)
