"""The recurrence chunk by chunk in plain PyTorch: the path of every CPU, and wherever no kernel serves.

In a chunk with start state S, G the inclusive cumulative sum of the log decay, e what is erased (at b = k):

    P = tril <q, k>        L = strict_tril <e, k>         <x, y>_ij = sum_d x_id y_jd exp(G_id - G_jd)
    V' = (I + L)^-1 (V - (e * exp G) S)                   what is really written; V' = V where nothing is erased
    O  = (q * exp G) S + P V'
    S <- exp(G_C) S + (k * exp(G_C - G))^T V'

Only S <- ... and V' run one chunk after another (over all documents and heads at once). The backward keeps nothing
but the inputs, runs the forward scan again and then the mirrored scan. With dS the gradient of the chunk's last state:

    dV' = P^T dO + (k * exp(G_C - G)) dS                  dV = (I + L)^-T dV'
    dP  = tril(dO V'^T)                                   dL = -strict_tril(dV V'^T)
    d(q * exp G) = dO S^T    d(e * exp G) = -dV S^T       d(k * exp(G_C - G)) = V' dS^T
    dS <- (q * exp G)^T dO + exp(G_C) dS - (e * exp G)^T dV
    dg = reverse_cumsum(q * dq + e * de - k * dk) + sum_v S_C * dS      per chunk, so that extreme gates do not cancel

Legend: M chunks, H heads of v, N = M * H, C tokens a chunk, K key width, V value width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlmoe.ops.chunk_layout import ChunkLayout, chunk_layout
from torchlmoe.ops.decayed_scores import ChannelDecayScores, ScalarDecayScores, UndecayedScores

CHUNK_SIZE = 64


@dataclass
class _Chunks:
    """All that both directions need, cut into chunks and promoted to at least float32."""

    layout: ChunkLayout
    q_NCK: Tensor | None  # times scale
    k_NCK: Tensor
    v_NCV: Tensor
    e_NCK: Tensor | None
    beta_NC: Tensor | None  # where e = beta * k
    scores: UndecayedScores | ScalarDecayScores | ChannelDecayScores
    from_start: Tensor | None  # exp(G), [N, C, 1 or K]
    to_end: Tensor | None  # exp(G_C - G)
    whole: Tensor | None  # exp(G_C), [N, 1 or K, 1]
    inverse_NCC: Tensor | None  # (I + L)^-1

    def decayed_from_start(self, x_NCK: Tensor) -> Tensor:
        return x_NCK if self.from_start is None else x_NCK * self.from_start

    def decayed_to_end(self, x_NCK: Tensor) -> Tensor:
        return x_NCK if self.to_end is None else x_NCK * self.to_end


def _cut(q, k, v, log_decay, erase, scale, cu_seqlens) -> _Chunks:
    batch_size, length, num_heads, _ = v.shape
    layout = chunk_layout(batch_size, length, cu_seqlens, CHUNK_SIZE, v.device)
    dtype = torch.promote_types(v.dtype, torch.float32)

    def cut(x: Tensor) -> Tensor:
        return layout.to_chunks(x, num_heads).to(dtype)

    q_NCK = None if q is None else cut(q)
    if q_NCK is not None and scale != 1.0:
        q_NCK = q_NCK * scale
    k_NCK, v_NCV = cut(k), cut(v)

    scores: UndecayedScores | ScalarDecayScores | ChannelDecayScores = UndecayedScores()
    from_start = to_end = whole = None
    if log_decay is not None:
        if log_decay.dim() == 1:
            log_decay = log_decay.expand(batch_size, length, num_heads)
        total = cut(log_decay).double().cumsum(1)
        if log_decay.dim() == 3:
            scores = ScalarDecayScores(total)
            total = total[..., None]
        else:
            scores = ChannelDecayScores(total, dtype)
        from_start = total.to(dtype).exp()
        to_end = (total[:, -1:] - total).to(dtype).exp()
        whole = from_start[:, -1, :, None]

    e_NCK = beta_NC = inverse_NCC = None
    if erase is not None:
        if erase.dim() == 3:
            beta_NC = cut(erase)
            e_NCK = k_NCK * beta_NC[..., None]
        else:
            e_NCK = cut(erase)
        lower = scores.forward(e_NCK, k_NCK, -1)
        identity = torch.eye(lower.shape[-1], dtype=dtype, device=lower.device)
        # The diagonal is taken as ones, so `lower` stands for I + L.
        inverse_NCC = torch.linalg.solve_triangular(
            lower, identity.expand_as(lower), upper=False, unitriangular=True
        )
    return _Chunks(
        layout, q_NCK, k_NCK, v_NCV, e_NCK, beta_NC, scores, from_start, to_end, whole, inverse_NCC
    )


def _scan(
    chunks: _Chunks, num_heads: int, initial_state: Tensor | None
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Returns the states at the start and at the end of the chunks of each step, V' [N, C, V], and the final states.

    Final states are in the layout's order of documents, [documents, H, K, V].
    """
    layout = chunks.layout
    k_NCK, v_NCV = chunks.k_NCK, chunks.v_NCV
    num_documents = len(layout.order_N)
    state = k_NCK.new_zeros(num_documents * num_heads, k_NCK.shape[-1], v_NCV.shape[-1])
    if initial_state is not None:
        state = initial_state.index_select(0, layout.order_N).to(k_NCK.dtype).flatten(0, 1)
    written_key = chunks.decayed_to_end(k_NCK).mT
    erased_key = None if chunks.e_NCK is None else chunks.decayed_from_start(chunks.e_NCK)
    # Without an erase term what is written does not depend on the state: one product for all chunks.
    written = None if erased_key is not None else torch.bmm(written_key, v_NCV)

    starts, ends, values = [], [], []
    finished = []  # states of documents that end, shortest first
    for start, count in zip(layout.starts(), layout.num_active, strict=True):
        rows = slice(start * num_heads, (start + count) * num_heads)
        finished.append(state[count * num_heads :])
        state = state[: count * num_heads]
        starts.append(state)
        decayed = state if chunks.whole is None else state * chunks.whole[rows]
        if written is not None:
            state = decayed + written[rows]
        else:
            residual = torch.baddbmm(v_NCV[rows], erased_key[rows], state, alpha=-1)
            value = torch.bmm(chunks.inverse_NCC[rows], residual)
            state = torch.baddbmm(decayed, written_key[rows], value)
            values.append(value)
        ends.append(state)
    final = torch.cat([state, *reversed(finished)]).unflatten(0, (num_documents, num_heads))
    new_values = torch.cat(values) if values else v_NCV
    return starts, ends, new_values, final


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
) -> tuple[Tensor, Tensor]:
    """Arguments as in `linear_recurrence`. Returns (o [B, T, H, V] in v's dtype, final state [documents, H, K, V]).

    Made of differentiable torch operations throughout, so it can also be traced or differentiated by autograd.
    """
    batch_size, length, num_heads, value_dim = v.shape
    if batch_size * length == 0:
        return torch.zeros_like(v), _empty_state(k, v, initial_state, cu_seqlens)
    chunks = _cut(q, k, v, log_decay, erase, scale, cu_seqlens)
    starts, _, value, final = _scan(chunks, num_heads, initial_state)
    final = _restore_order(final, chunks.layout)
    if chunks.q_NCK is None:
        return torch.zeros_like(v), final
    scores = chunks.scores.forward(chunks.q_NCK, chunks.k_NCK, 0)
    o = torch.baddbmm(torch.bmm(chunks.decayed_from_start(chunks.q_NCK), torch.cat(starts)), scores, value)
    return chunks.layout.to_tokens(o, num_heads, (batch_size, length), num_heads).to(v.dtype), final


def _empty_state(k: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The final states where there is no token at all: what came in."""
    if initial_state is not None:
        return initial_state.clone()
    num_documents = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(v.dtype, torch.float32)
    return torch.zeros(num_documents, v.shape[2], k.shape[-1], v.shape[-1], dtype=dtype, device=v.device)


def chunked_backward(
    grad_o: Tensor | None,
    grad_final: Tensor | None,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, log_decay, erase and initial_state, each in its own dtype; None where there is none."""
    batch_size, length, num_heads, _ = v.shape
    if batch_size * length == 0:
        grads = [None if x is None else torch.zeros_like(x) for x in (q, k, v, log_decay, erase)]
        return (*grads, None if initial_state is None else grad_final)  # type: ignore[return-value]
    chunks = _cut(q, k, v, log_decay, erase, scale, cu_seqlens)
    layout, scores = chunks.layout, chunks.scores
    q_NCK, k_NCK, e_NCK = chunks.q_NCK, chunks.k_NCK, chunks.e_NCK
    starts, ends, value, final = _scan(chunks, num_heads, initial_state)
    written_key = chunks.decayed_to_end(k_NCK)
    erased_key = None if e_NCK is None else chunks.decayed_from_start(e_NCK)

    grad_o_NCV = grad_value = read_grad = p_NCC = None
    if q_NCK is not None and grad_o is not None:
        grad_o_NCV = layout.to_chunks(grad_o, num_heads).to(k_NCK.dtype)
        p_NCC = scores.forward(q_NCK, k_NCK, 0)
        grad_value = torch.bmm(p_NCC.mT, grad_o_NCV)
        read_grad = torch.bmm(chunks.decayed_from_start(q_NCK).mT, grad_o_NCV)

    # The mirrored scan: documents come in at their last chunk.
    grad_final_NKV = torch.zeros_like(final).flatten(0, 1)
    if grad_final is not None:
        grad_final_NKV = grad_final.index_select(0, layout.order_N).to(k_NCK.dtype).flatten(0, 1)
    grad_state = grad_final_NKV[:0]
    grad_ends: list[Tensor] = []
    grad_values: list[Tensor] = []  # dV'
    grad_inputs: list[Tensor] = []  # dV
    for start, count in zip(reversed(layout.starts()), reversed(layout.num_active), strict=True):
        rows = slice(start * num_heads, (start + count) * num_heads)
        grad_state = torch.cat([grad_state, grad_final_NKV[grad_state.shape[0] : count * num_heads]])
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
            grad_input = torch.bmm(chunks.inverse_NCC[rows].mT, grad_value_rows)
            grad_inputs.append(grad_input)
            grad_state = torch.baddbmm(grad_state, erased_key[rows].mT, grad_input, alpha=-1)
    grad_initial = torch.cat([grad_state, grad_final_NKV[grad_state.shape[0] :]])
    grad_end_NKV = torch.cat(grad_ends[::-1])
    grad_value_NCV = torch.cat(grad_values[::-1])
    grad_v_NCV = grad_value_NCV if erased_key is None else torch.cat(grad_inputs[::-1])
    start_NKV = torch.cat(starts)

    grad_k_NCK = chunks.decayed_to_end(torch.bmm(value, grad_end_NKV.mT))
    grad_q_NCK = grad_e_NCK = None
    if grad_o_NCV is not None:
        grad_p = torch.bmm(grad_o_NCV, value.mT).tril()
        grad_q_NCK, grad_k = scores.backward(grad_p, q_NCK, k_NCK)
        grad_q_NCK = grad_q_NCK + chunks.decayed_from_start(torch.bmm(grad_o_NCV, start_NKV.mT))
        grad_k_NCK = grad_k_NCK + grad_k
    if e_NCK is not None:
        grad_lower = torch.bmm(grad_v_NCV, value.mT).neg_().tril(-1)
        grad_e_NCK, grad_k = scores.backward(grad_lower, e_NCK, k_NCK)
        grad_e_NCK = grad_e_NCK - chunks.decayed_from_start(torch.bmm(grad_v_NCV, start_NKV.mT))
        grad_k_NCK = grad_k_NCK + grad_k

    def to_tokens(x: Tensor, like: Tensor) -> Tensor:
        return layout.to_tokens(x, num_heads, (batch_size, length), like.shape[2]).to(like.dtype)

    grad_log_decay = None
    if log_decay is not None:
        flow = -k_NCK * grad_k_NCK
        if grad_q_NCK is not None:
            flow = flow + q_NCK * grad_q_NCK
        if grad_e_NCK is not None:
            flow = flow + e_NCK * grad_e_NCK
        at_end = (torch.cat(ends) * grad_end_NKV).sum(-1)  # [N, K]
        if log_decay.dim() < 4:
            flow, at_end = flow.sum(-1), at_end.sum(-1)
        grad_decay_NC = flow.flip(1).cumsum(1).flip(1) + at_end[:, None]
        grad_log_decay = layout.to_tokens(grad_decay_NC, num_heads, (batch_size, length), num_heads)
        if log_decay.dim() == 1:
            grad_log_decay = grad_log_decay.sum((0, 1))
        grad_log_decay = grad_log_decay.to(log_decay.dtype)

    grad_erase = None
    if erase is not None:
        if chunks.beta_NC is not None:
            grad_erase = to_tokens((grad_e_NCK * k_NCK).sum(-1), erase)
            grad_k_NCK = grad_k_NCK + grad_e_NCK * chunks.beta_NC[..., None]
        else:
            grad_erase = to_tokens(grad_e_NCK, erase)
    grad_q = None
    if q is not None:
        if grad_q_NCK is None:
            grad_q = torch.zeros_like(q)
        else:
            grad_q = to_tokens(grad_q_NCK * scale if scale != 1.0 else grad_q_NCK, q)
    grad_initial_state = None
    if initial_state is not None:
        grad_initial_state = grad_initial.unflatten(0, (-1, num_heads))
        grad_initial_state = _restore_order(grad_initial_state, layout).to(initial_state.dtype)
    return grad_q, to_tokens(grad_k_NCK, k), to_tokens(grad_v_NCV, v), grad_log_decay, grad_erase, grad_initial_state
