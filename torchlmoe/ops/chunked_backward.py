"""The gradient of the chunked recurrence, slab by slab from the last to the first, each slab recomputed from its start.

In the notation of `chunked.py`, with dS the gradient of a chunk's last state and P' the gradient of the scores:

    dw   = columns(P_q, do) + (y * exp(G_C - G)) dS * exp(H_C - H)                  (for v and n alike)
    dz   = T^T dn                                                (dn, of n, is the dw of the last writer)
    dv   = dz if erase_key = k, otherwise dv - <erase, k>^T dz
    P'_q = pair(do, w)      P'_erase = -dz w^T, strict      (`pair` and `columns` of the value side's decay)
    dx   = rows(P', y) + exp G * (do * exp H, -dz) S^T
    dy   = columns(P', x) + exp(G_C - G) * (w * exp(H_C - H)) dS^T
    dS  <- (q * exp G)^T (do * exp H) + exp(G_C) dS exp(H_C) - (T (erase * exp G))^T dn
    dg_s = sum_{i>=s} x_i * (dx_i through S) + sum_{j<s} y_j * (dy_j through dS) + sum_{i>=s>j} P'_ij P_ij
           + sum S * exp(G_C) dS exp(H_C)              (dh likewise of do, o and v, dv; per channel level by level)

The gradient of a decay is summed from the terms that pass through it: a difference of two sums would lose the digits
of a gate that lets little through.

A read before the token's own decay counts from the preceding token. The bonus is not part of dg and dh.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlmoe.ops.chunk_decay import ChannelDecay, MatrixDecay
from torchlmoe.ops.chunk_layout import ChunkLayout, restore_order
from torchlmoe.ops.chunked import Chunks, Terms, carry, cut, decayed, make_strict, scan

PER_TOKEN = ("q", "k", "v", "log_decay", "erase", "erase_key", "value_log_decay")


def chunked_backward(
    grad_o: Tensor,
    grad_final: Tensor,
    terms: Terms,
    initial_state: Tensor | None,
    layouts: Sequence[ChunkLayout],
    kept: Tensor,
) -> list[Tensor | None]:
    """Gradients of the tensors of `terms`, in their order, and of initial_state, each in its dtype; None for None.

    kept: the last result of `chunked_forward`.
    """
    num_heads = terms.v.shape[2]
    tensors = {name: x for name in PER_TOKEN if (x := getattr(terms, name)) is not None}
    per_head = terms.log_decay is not None and terms.log_decay.dim() == 1
    if per_head:
        tensors["log_decay"] = tensors["log_decay"].expand(terms.v.shape[:3])
    result = {name: torch.empty_like(x, memory_format=torch.contiguous_format) for name, x in tensors.items()}
    grad_bonus: list[Tensor] = []
    grad_initial: list[Tensor] = []

    kept_end = kept.shape[0]
    for layout in reversed(layouts):
        last_grad = grad_final.index_select(0, layout.order_N).to(kept.dtype).flatten(0, 1)
        grad_state = last_grad[:0]
        for slab in reversed(layout.slabs):
            chunks = cut(terms, slab)
            kept_start = kept_end - slab.num_active[0] * num_heads
            _, w_NCWV = scan(chunks, kept[kept_start:kept_end], [])
            kept_end = kept_start
            rows_NCRV = w_NCWV.new_empty(*chunks.x_NCRK.shape[:3], w_NCWV.shape[-1])
            if chunks.reads:
                slab.cut_into(grad_o, rows_NCRV[:, :, 0])
            grads, grad_state = _slab_backward(chunks, w_NCWV, rows_NCRV, grad_state, last_grad)
            if chunks.reads:
                grads["q"].mul_(terms.scale)
            for name in tensors:
                slab.paste(grads[name], result[name])
            if "bonus" in grads:
                grad_bonus.append(grads["bonus"].unflatten(0, (-1, num_heads)).sum(0))
        grad_initial = [grad_state, last_grad[grad_state.shape[0] :], *grad_initial]

    if per_head:
        result["log_decay"] = result["log_decay"].sum((0, 1))
    if terms.bonus is not None:
        result["bonus"] = sum(grad_bonus, terms.bonus.new_zeros(terms.bonus.shape, dtype=kept.dtype))
        result["bonus"] = result["bonus"].to(terms.bonus.dtype)
    if initial_state is not None:
        in_order = restore_order(layouts, torch.cat(grad_initial).unflatten(0, (-1, num_heads)))
        result["initial_state"] = in_order.to(initial_state.dtype)
    return [result.get(name) for name in (*PER_TOKEN, "bonus", "initial_state")]


def _slab_backward(
    chunks: Chunks, w_NCWV: Tensor, rows_NCRV: Tensor, grad_state: Tensor, last_grad: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the slab's terms, [N, C, ...] (of the bonus [N, K]), and of the states at its start.

    rows: the gradient of what each reader has read; that of q is given, that of erase is filled in.
    """
    grad_o_NCV, before = rows_NCRV[:, :, 0] if chunks.reads else None, chunks.bonus_N1K is not None
    x_NCRK, y_NCWK, scores, starts_NKV = chunks.x_NCRK, chunks.y_NCWK, chunks.scores_NCRCW, chunks.starts_NKV
    key_decay, value_decay = chunks.key_decay, chunks.value_decay
    read_keys, written_keys = chunks.read_keys_NCRK, chunks.written_keys_NCWK

    grad_added = None
    if grad_o_NCV is not None:
        grad_added = torch.bmm(read_keys[:, :, 0].mT, decayed(grad_o_NCV, value_decay.from_start))
    if grad_o_NCV is not None and value_decay.whole is None:
        grad_w_NCWV = value_decay.columns(scores[:, :, :1], grad_o_NCV.unsqueeze(2))
    else:
        grad_w_NCWV = torch.zeros_like(w_NCWV)
    grad_state, grad_end_NKV = _mirrored_scan(chunks, grad_w_NCWV, grad_added, grad_state, last_grad)

    grad_v = grad_w_NCWV[:, :, -1]
    if chunks.inverse_NCC is not None:
        grad_v = torch.bmm(chunks.inverse_NCC.mT, grad_v)  # dz
        torch.neg(grad_v, out=rows_NCRV[:, :, -1])
    if chunks.writes_v:
        grad_v = decayed(torch.bmm(written_keys[:, :, 0], grad_end_NKV), value_decay.to_end).add_(grad_w_NCWV[:, :, 0])
        if chunks.inverse_NCC is not None:
            grad_v.baddbmm_(scores[:, :, -1, :, 0].mT, rows_NCRV[:, :, -1])

    grad_y = torch.bmm(decayed(w_NCWV, value_decay.to_end).flatten(1, 2), grad_end_NKV.mT).view_as(y_NCWK)
    if key_decay.to_end is not None:
        grad_y *= key_decay.to_end.unsqueeze(2)
    grad_x, grad_scores = torch.empty_like(x_NCRK), None
    if x_NCRK.shape[2]:
        grad_x = torch.bmm(decayed(rows_NCRV, value_decay.from_start).flatten(1, 2), starts_NKV.mT).view_as(x_NCRK)
        if key_decay.from_start is not None:
            grad_x *= key_decay.from_start.unsqueeze(2)
        grad_scores = value_decay.pair(rows_NCRV, w_NCWV)
        if before or chunks.inverse_NCC is not None:
            make_strict(grad_scores)

    def through(*dims: int) -> Tensor:
        """What passes from the first state of each chunk to its last, summed over keys (1), values (2) or both."""
        return carry(starts_NKV, chunks.whole(), None).mul_(grad_end_NKV).sum(dims)

    grads = {"v": grad_v}
    if isinstance(key_decay, MatrixDecay):
        from_start, to_end = ((x * grad).sum((2, 3)) for x, grad in ((x_NCRK, grad_x), (y_NCWK, grad_y)))
        within = None
        if grad_scores is not None:  # one by one, as `sum` over one or two elements is slow
            products = (grad_scores * scores).unbind(2)
            within = sum((x for of_reader in products for x in of_reader.unbind(-1)), start=starts_NKV.new_zeros(()))
        grads["log_decay"] = _passing(from_start, to_end, through(1, 2), within, before)
    if isinstance(key_decay, ChannelDecay):
        grads["log_decay"] = key_decay.gradient(grad_scores, x_NCRK, y_NCWK, grad_x, grad_y, through(2), before)
    elif grad_scores is not None:
        key_decay.backward(grad_scores, x_NCRK, y_NCWK, grad_x, grad_y)
    if isinstance(value_decay, ChannelDecay):
        readers, read_NCRV, of_scores = w_NCWV[:, :, :0], w_NCWV[:, :, :0], None
        if grad_o_NCV is not None:
            readers, of_scores = grad_o_NCV.unsqueeze(2), scores[:, :, :1]
            read_NCRV = decayed(torch.bmm(read_keys[:, :, 0], starts_NKV), value_decay.from_start).unsqueeze(2)
        grads["value_log_decay"] = value_decay.gradient(
            of_scores, readers, w_NCWV, read_NCRV, grad_v.unsqueeze(2), through(1), before
        )

    k_NCK, grad_k = y_NCWK[:, :, 0], grad_y[:, :, 0]
    weight, bonus_N1K = chunks.bonus_weight(), chunks.bonus_N1K
    if weight is not None and bonus_N1K is not None and grad_o_NCV is not None:
        # Only after the decay's gradient: the bonus reads before the decay.
        q_NCK = x_NCRK[:, :, 0]
        grad_weight = (grad_o_NCV * chunks.v_NCV).sum(-1, keepdim=True)
        grads["v"] = torch.addcmul(grad_v, weight, grad_o_NCV)
        grads["bonus"] = (grad_weight * q_NCK * k_NCK).sum(1)
        grad_x[:, :, 0].addcmul_(grad_weight * bonus_N1K, k_NCK)
        grad_k.addcmul_(grad_weight * bonus_N1K, q_NCK)
    if chunks.inverse_NCC is not None:
        grads["erase"] = grad_x[:, :, -1]
        if chunks.beta_NC is not None:
            grads["erase"] = (grad_x[:, :, -1] * y_NCWK[:, :, -1]).sum(-1)
            grad_y[:, :, -1].addcmul_(grad_x[:, :, -1], chunks.beta_NC[..., None])
        grads["erase_key"] = grad_y[:, :, -1]
    if grad_o_NCV is not None:
        grads["q"] = grad_x[:, :, 0]
    grads["k"] = grad_k
    return grads, grad_state


def _mirrored_scan(
    chunks: Chunks, grad_w_NCWV: Tensor, grad_added: Tensor | None, grad_state: Tensor, last_grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the slab's first states, and of every chunk's last state [N, K, V].

    grad_w: with an erase term dn is completed, in place. grad_added: the readers' part of the gradient of a chunk's
    first state. Documents enter at their last chunk.
    """
    grad_ends_NKV = torch.empty_like(chunks.starts_NKV)
    keys, erased = chunks.written_keys_NCWK[:, :, -1], chunks.erased_keys_NCK
    erase = () if erased is None else (grad_w_NCWV[:, :, -1], keys, erased.mT)
    ends, *others = (chunks.steps(x) for x in (grad_ends_NKV, grad_added, chunks.whole(), *erase))
    ends[-1][: grad_state.shape[0]] = grad_state
    per_step = list(zip(ends, [last_grad[:0], *ends[:-1]], *others, strict=True))
    for grad_end, preceding, plus, whole, *of_erase in reversed(per_step):
        num_active, num_before = grad_end.shape[0], grad_state.shape[0]
        if num_before < num_active:
            grad_end[num_before:] = last_grad[num_before:num_active]
        grad_state = carry(grad_end, whole, plus, preceding[:num_active])
        if of_erase:
            grad_n, keys, erased_keys = of_erase
            grad_n.baddbmm_(keys, grad_end)
            grad_state.baddbmm_(erased_keys, grad_n, alpha=-1)
    return grad_state, grad_ends_NKV


def _passing(from_start: Tensor, to_end: Tensor, through: Tensor, within: Tensor | None, reads_before: bool) -> Tensor:
    """Sum the terms that pass through each token's decay, [N, C].

    from_start [N, C]: each token's reads from the chunk's first state; to_end [N, C]: each token's writes to its last
    state; through [N]: from the first state to the last; within [N, C, C]: reads of one token from another.
    """
    ones = from_start.new_ones(from_start.shape[1], from_start.shape[1])
    written, read = ones.triu(1), ones.tril(-reads_before)  # [j, s] and [i, s]: whether a token is on that side of s
    passing = torch.addmm(through[:, None], from_start, read).addmm_(to_end, written)
    return passing if within is None else passing + (torch.matmul(within, written) * read).sum(1)
