"""The recurrence chunk by chunk in plain PyTorch: used on CPUs, and on a GPU if no kernel serves the call.

Let S be the state at the start of a chunk, and G and H the inclusive cumulative sums of log_decay and value_log_decay.
A token has readers x: q and, if given, erase. It has writers y with values w: k with v and, if erase is given,
erase_key with n, which removes the old value. If erase_key = k, n replaces v, and k is the only writer:

    P    = <x, y>                                         scores: see `chunk_decay.py`; strict for erase
    n    = T z - T (erase * exp G) S                      z = v if erase_key = k, otherwise -<erase, k> v
    T    = (I + <erase, erase_key>)^-1
    o_i  = (S^T (q_i * exp G_i)) * exp H_i + sum_j P_ij w_j * exp(H_i - H_j)
    S   <- exp(G_C) S exp(H_C) + sum_j (y_j * exp(G_C - G_j)) (w_j * exp(H_C - H_j))^T

With a bonus u, q reads the state before the token's own decay, and P_ii = sum q_i u k_i.

Only n and S <- ... run one chunk after another (over all documents and heads at once). Everything else is computed for
a slab of chunks at a time, few enough to stay in a cache. The forward keeps the first state of every slab for the
backward (`chunked_backward.py`), which runs each slab again and then in reverse.

Legend: N chunks of a slab times heads of v, C tokens per chunk, R readers, W writers, K key width, V value width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlmoe.ops.chunk_decay import CausalMask, ChannelDecay, MatrixDecay, Undecayed
from torchlmoe.ops.chunk_layout import ChunkLayout, Slab, chunk_layouts, chunk_plans, restore_order

SLAB_TOKENS = 4096  # times heads; 1 MiB for a tensor of 64 channels


@dataclass(frozen=True)
class Terms:
    """The arguments of `linear_recurrence` that have a token or head dimension."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    erase: Tensor | None
    erase_key: Tensor | None
    value_log_decay: Tensor | None
    bonus: Tensor | None
    scale: float


def layouts_of(v: Tensor, cu_seqlens: Tensor | None) -> tuple[ChunkLayout, ...]:
    """The layouts of v's rows or documents, for real tensors. Raises ValueError for invalid bounds."""
    bounds = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    return chunk_layouts(*_layout_key(v, bounds), v.device)


def num_kept(v: Tensor, bounds: tuple[int, ...] | None) -> int:
    """Number of states that `chunked_forward` keeps for the backward; v may be without values."""
    return v.shape[2] * sum(plan.num_first for plan in chunk_plans(*_layout_key(v, bounds)))


def _layout_key(v: Tensor, bounds: tuple[int, ...] | None) -> tuple[int, int, tuple[int, ...] | None, int, int]:
    """Longer chunks do more work between their tokens, and less with states; wide states are the dearer part."""
    batch_size, length, num_heads, value_dim = v.shape
    chunk_size = 32 if value_dim <= 64 else 64
    return batch_size, length, bounds, chunk_size, max(1, SLAB_TOKENS // (chunk_size * num_heads))


@dataclass
class Chunks:
    """A slab's terms, cut into chunks and promoted to at least float32, with intermediate results."""

    slab: Slab
    num_heads: int
    reads: bool
    v_NCV: Tensor
    x_NCRK: Tensor  # q times scale, then erase, if present (R may be 0)
    y_NCWK: Tensor  # k, then erase_key if it is not k
    read_keys_NCRK: Tensor  # x * exp G
    written_keys_NCWK: Tensor  # y * exp(G_C - G)
    beta_NC: Tensor | None  # if erase is a beta: x is then beta * erase_key
    bonus_N1K: Tensor | None
    key_decay: Undecayed
    value_decay: Undecayed
    scores_NCRCW: Tensor
    inverse_NCC: Tensor | None  # T, with an erase term
    erased_keys_NCK: Tensor | None  # T (erase * exp G), with an erase term
    starts_NKV: Tensor  # the first state of every chunk, from `scan`

    @property
    def writes_v(self) -> bool:
        """Whether v itself is written, alone or together with n."""
        return self.inverse_NCC is None or self.y_NCWK.shape[2] == 2

    def whole(self) -> Tensor | None:
        """exp G_C * exp H_C, [N, 1 or K, 1 or V]"""
        key, value = self.key_decay.whole, self.value_decay.whole
        if value is None:
            return None if key is None else key.unsqueeze(2)
        return value.unsqueeze(1) if key is None else key.unsqueeze(2) * value.unsqueeze(1)

    def bonus_weight(self) -> Tensor | None:
        """The weight with which q_i reads k_i v_i^T by the bonus, [N, C, 1]."""
        if self.bonus_N1K is None:
            return None
        return (self.x_NCRK[:, :, 0] * self.bonus_N1K * self.y_NCWK[:, :, 0]).sum(-1, keepdim=True)

    def steps(self, x_N: Tensor | None) -> list[Any]:
        """Split x into the rows of each step of the scan; None for each step if x is None."""
        counts = [count * self.num_heads for count in self.slab.num_active]
        return [None] * len(counts) if x_N is None else list(x_N.split(counts))


def cut(terms: Terms, slab: Slab) -> Chunks:
    """The slab's chunks, with their scores."""
    num_heads = terms.v.shape[2]
    dtype = torch.promote_types(terms.v.dtype, torch.float32)
    num_slots, chunk_size = slab.tokens_MC.shape

    def empty(*shape: int) -> Tensor:
        return terms.v.new_empty(num_heads * num_slots, *shape, dtype=dtype)

    def chunks_of(x: Tensor) -> Tensor:
        return slab.cut_into(x, empty(chunk_size, *x.shape[3:]))

    reads, erases = terms.q is not None, terms.erase is not None
    key_dim, value_dim = terms.k.shape[-1], terms.v.shape[-1]
    v_NCV = chunks_of(terms.v)
    y_NCWK = empty(chunk_size, 1 + (terms.erase_key is not None), key_dim)
    slab.cut_into(terms.k, y_NCWK[:, :, 0])
    if terms.erase_key is not None:
        slab.cut_into(terms.erase_key, y_NCWK[:, :, 1])
    x_NCRK = empty(chunk_size, reads + erases, key_dim)
    if terms.q is not None:
        slab.cut_into(terms.q, x_NCRK[:, :, 0]).mul_(terms.scale)
    beta_NC = None
    if terms.erase is not None:
        if terms.erase.dim() == 3:
            beta_NC = chunks_of(terms.erase)
            torch.mul(y_NCWK[:, :, -1], beta_NC[..., None], out=x_NCRK[:, :, -1])
        else:
            slab.cut_into(terms.erase, x_NCRK[:, :, -1])
    bonus_N1K = None if terms.bonus is None else terms.bonus.to(dtype).repeat(num_slots, 1)[:, None]
    reads_before = bonus_N1K is not None
    key_decay: Undecayed
    if terms.log_decay is None:
        key_decay = CausalMask(chunk_size, v_NCV)
    elif terms.log_decay.dim() == 4:
        key_decay = ChannelDecay(chunks_of(terms.log_decay), reads_before)
    else:
        of_tokens = chunks_of(terms.log_decay.expand(terms.v.shape[:3]))
        per_head = terms.log_decay.dim() == 1
        of_groups = terms.log_decay[:, None].expand(-1, chunk_size) if per_head else of_tokens
        key_decay = MatrixDecay(of_tokens, of_groups, reads_before, dtype)
    value_decay = Undecayed() if (h := terms.value_log_decay) is None else ChannelDecay(chunks_of(h), reads_before)

    scores_NCRCW = key_decay.pair(x_NCRK, y_NCWK)
    read_keys_NCRK = decayed(x_NCRK, key_decay.from_start)
    inverse_NCC = erased_keys_NCK = None
    if reads_before or erases:
        make_strict(scores_NCRCW)
    if erases:
        lower, one = scores_NCRCW[:, :, -1, :, -1], torch.eye(chunk_size, dtype=dtype, device=v_NCV.device)
        inverse_NCC = torch.linalg.solve_triangular(lower, one.expand_as(lower), upper=False, unitriangular=True)
        erased_keys_NCK = torch.bmm(inverse_NCC, read_keys_NCRK[:, :, -1])
    return Chunks(
        slab, num_heads, reads, v_NCV, x_NCRK, y_NCWK, read_keys_NCRK, decayed(y_NCWK, key_decay.to_end),
        beta_NC, bonus_N1K, key_decay, value_decay, scores_NCRCW, inverse_NCC, erased_keys_NCK,
        empty(key_dim, value_dim),
    )  # fmt: skip


def decayed(x: Tensor, decay_NCD: Tensor | None) -> Tensor:
    """x [N, C, D] or [N, C, R, D] times the decay, if there is any."""
    return x if decay_NCD is None else x * (decay_NCD if x.dim() == 3 else decay_NCD.unsqueeze(2))


def make_strict(scores_NCRCW: Tensor) -> None:
    """Clear the diagonal of the last reader: erase, or q if the bonus reads its own token."""
    scores_NCRCW[:, :, -1].diagonal(dim1=1, dim2=2).zero_()


def scan(chunks: Chunks, state: Tensor, finished: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Run the slab from `state` [documents * heads, K, V] of the documents that have not ended.

    Returns their last states and the written values w [N, C, W, V], and stores each chunk's first state in `chunks`.
    States of documents that have ended are appended to `finished`, shortest last.
    """
    written_keys, v_NCV = chunks.written_keys_NCWK, chunks.v_NCV
    removed = None
    added = torch.bmm(written_keys[:, :, 0].mT, decayed(v_NCV, chunks.value_decay.to_end)) if chunks.writes_v else None
    if chunks.inverse_NCC is not None:
        z_NCV = -torch.bmm(chunks.scores_NCRCW[:, :, -1, :, 0], v_NCV) if chunks.writes_v else v_NCV
        removed = torch.bmm(chunks.inverse_NCC, z_NCV)  # n of every step, after erased_keys S is subtracted
    erase = () if removed is None else (removed, chunks.erased_keys_NCK, written_keys[:, :, -1].mT)
    starts, *others = (chunks.steps(x) for x in (chunks.starts_NKV, added, chunks.whole(), *erase))
    for start, following, plus, whole, *of_erase in zip(starts, [*starts[1:], None], *others, strict=True):
        if state is not start:
            finished.append(state[start.shape[0] :])
            start.copy_(state[: start.shape[0]])
        state = carry(start, whole, plus, following)
        if of_erase:
            n, erased_keys, keys = of_erase
            n.baddbmm_(erased_keys, start, alpha=-1)
            state.baddbmm_(keys, n)
    values = [x for x in (v_NCV if chunks.writes_v else None, removed) if x is not None]
    return state, values[0].unsqueeze(2) if len(values) == 1 else torch.stack(values, 2)


def carry(state: Tensor, whole: Tensor | None, added: Tensor | None, place: Tensor | None = None) -> Tensor:
    """Return the state, or its gradient, after a chunk's decay and additions: in `place` if it fits, or a copy."""
    out = place if place is not None and place.shape == state.shape else torch.empty_like(state)
    if whole is None:
        return out.copy_(state) if added is None else torch.add(state, added, out=out)
    return torch.mul(state, whole, out=out) if added is None else torch.addcmul(added, state, whole, out=out)


def read(chunks: Chunks, w_NCWV: Tensor) -> Tensor:
    """Return o [N, C, V] of a scanned slab, without the bonus."""
    o_NCV = decayed(torch.bmm(chunks.read_keys_NCRK[:, :, 0], chunks.starts_NKV), chunks.value_decay.from_start)
    return chunks.value_decay.rows(chunks.scores_NCRCW[:, :, :1], w_NCWV, o_NCV.unsqueeze(2)).squeeze(2)


def first_states(terms: Terms, initial_state: Tensor | None, layout: ChunkLayout) -> Tensor:
    """[documents * heads, K, V] of the layout, longest document first."""
    dtype = torch.promote_types(terms.v.dtype, torch.float32)
    if initial_state is not None:
        return initial_state.index_select(0, layout.order_N).to(dtype).flatten(0, 1)
    num = layout.order_N.shape[0] * terms.v.shape[2]
    return terms.v.new_zeros(num, terms.k.shape[-1], terms.v.shape[-1], dtype=dtype)


def chunked_forward(
    terms: Terms, initial_state: Tensor | None, layouts: Sequence[ChunkLayout]
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence chunk by chunk. layouts: from `layouts_of(v)`.

    Returns o [B, T, H, V] in v's dtype, the final state [documents, H, K, V], and the first states of every slab.
    """
    v, kept, final = terms.v, [], []
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    for layout in layouts:
        state = first_states(terms, initial_state, layout)
        kept.append(state[:0])
        finished: list[Tensor] = []
        for slab in layout.slabs:
            chunks = cut(terms, slab)
            kept.append(state[: slab.num_active[0] * chunks.num_heads])
            state, w_NCWV = scan(chunks, state, finished)
            if terms.q is None:
                continue
            o_NCV = read(chunks, w_NCWV)
            if (weight := chunks.bonus_weight()) is not None:
                o_NCV = torch.addcmul(o_NCV, weight, chunks.v_NCV)
            slab.paste(o_NCV, o)
        final += [state, *reversed(finished)]
    return o, restore_order(layouts, torch.cat(final).unflatten(0, (-1, v.shape[2]))), torch.cat(kept)
