"""Causal softmax attention that does not look across packed documents.

Documents are gathered into batches of similar length and padded at the end, where the causal mask already hides the
padding from every real token. So no mask of the whole row is built, the cost depends on the documents only, and
one document cannot affect another even by a rounding error. It is one operation to torch (forward and backward
are a `torch.library.custom_op` pair), since the shapes inside depend on the documents.

Queries may be a span of the rows of keys and values. Only the document in which the span starts has keys before the
span, and the span's queries of this document see all of those: a second softmax, without a causal mask, is combined
with the softmax over the span by the sums of both (arXiv 2112.05682).
"""

from bisect import bisect_right
from collections import defaultdict
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import register_flop_formula

from torchlmoe.ops.checks import check_bounds, check_bounds_at_hand, num_documents
from torchlmoe.ops.fake_values import equal_documents, has_values
from torchlmoe.ops.operation import custom_op, gradients_of, keep_for_backward, operation

_PAGE = 256  # longer documents are padded to a multiple of it, shorter ones to a power of two


@operation
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    query_start: int = 0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over the earlier tokens of the same document.

    q [B, S, H, D]; k, v [B, T, G, D], G a divisor of H. cu_seqlens: int32 [N + 1] bounds of documents in one row
    (B = 1, of T tokens), empty ones allowed. window: how many tokens, itself included, a token sees; all unless given.
    query_start: the place of the first query in its row, if S is less than T. scale: 1 / sqrt(D) unless given.
    Returns o like q. A NaN or an infinity in v also reaches earlier tokens of its document, through products with zero.
    Raises ValueError for bounds that do not rise from 0 to T.
    """
    if cu_seqlens is not None:
        num_documents(k, cu_seqlens)
        check_bounds_at_hand(cu_seqlens, k.shape[1])
    length = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if length == 0 or (cu_seqlens is None and k.shape[1] == length):
        mask = None if window is None or window >= length else _visible(length, length, 0, window, q.device)
        return _sdpa(q, k, v, mask, scale)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _varlen(q, k, v, cu_seqlens, window, query_start, scale)
    return _forward(q, k, v, cu_seqlens, window, query_start, scale)[0]


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, query_start: int, scale: float
) -> Tensor:
    """Run torch's flash attention on packed documents, which aligns a document's last query with its last
    key."""
    first_key = 0 if window is None else max(0, query_start - window + 1)
    query_end = query_start + q.shape[1]
    k, v = (x[:, first_key:query_end].flatten(0, 1) for x in (k, v))
    if cu_seqlens is None:
        rows = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        q_bounds, k_bounds = rows * q.shape[1], rows * (query_end - first_key)
    else:
        q_bounds = cu_seqlens.clamp(query_start, query_end) - query_start
        k_bounds = cu_seqlens.clamp(first_key, query_end) - first_key
    span = (-1 if window is None else window - 1, 0)
    lengths = (q.shape[1], query_end - first_key)
    q_rows = q.flatten(0, 1)
    o = varlen_attn(q_rows, k, v, q_bounds, k_bounds, *lengths, scale=scale, window_size=span, enable_gqa=True)
    assert isinstance(o, Tensor)
    return o.reshape(q.shape)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_positions: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend from new tokens to a cache. q [B, T, H, D]; k, v [B, S, G, D]: place s holds the token of position s.

    query_positions: int64 [B, T]; a query sees the places up to its own position, at most `window` of them.
    scale: 1 / sqrt(D) unless given.
    """
    distance = query_positions[:, :, None] - torch.arange(k.shape[1], device=k.device)
    mask = distance >= 0
    if window is not None:
        mask = mask & (distance < window)
    return _sdpa(q, k, v, mask[:, None], scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Causal without a mask. q, k, v [B, T or S, heads, D] -> [B, T, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = mask is None
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)
    return o.transpose(1, 2)


def _visible(num_queries: int, num_keys: int, first_query: int, window: int | None, device: torch.device) -> Tensor:
    """bool [queries, keys]: which keys the queries at `first_query` and on see."""
    query = first_query + torch.arange(num_queries, device=device)
    distance = query[:, None] - torch.arange(num_keys, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class _Span(NamedTuple):
    """bounds: of the queries' documents, with all rows concatenated. The first `num_queries` of each row also see
    the keys `first_key` .. query_start of their document, which come before the span."""

    bounds: tuple[int, ...]
    first_key: int
    num_queries: int


def _span(q: Tensor, num_keys: int, cu_seqlens: Tensor | None, window: int | None, query_start: int) -> _Span:
    num_rows, length = q.shape[:2]
    if cu_seqlens is None:
        bounds, first_key, end = tuple(length * row for row in range(num_rows + 1)), 0, length
    else:
        places = cu_seqlens.tolist() if has_values(cu_seqlens) else equal_documents(num_keys, cu_seqlens)
        check_bounds(places, num_keys)
        bounds = tuple(min(max(place - query_start, 0), length) for place in places)
        after = bisect_right(places, query_start)
        first_key, end = places[after - 1], bounds[after]
    if window is not None:
        first_key, end = max(first_key, query_start - window + 1), min(end, window - 1)
    return _Span(bounds, first_key, end if first_key < query_start else 0)


@lru_cache(maxsize=4)
def _batches(bounds: tuple[int, ...], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """The tokens of each batch of documents, int64 [documents, padded length], and the slot of each
    token of the row, int64 [T]. Made once for the forward and backward of all layers of a step."""
    groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, end in zip(bounds, bounds[1:], strict=False):
        if end > start:
            groups[_padded_length(end - start)].append((start, end))
    if len(groups) == 1 and sum(map(len, groups.values())) == 1:
        groups = {bounds[-1]: [(0, bounds[-1])]}
    batches, tokens_of_slots = [], []
    for padded_length, documents in groups.items():
        bounds_N2 = torch.tensor(documents, device=device)
        tokens = bounds_N2[:, :1] + torch.arange(padded_length, device=device)
        batches.append(torch.minimum(tokens, bounds_N2[:, 1:] - 1))  # padding repeats the document's own last token
        tokens_of_slots.append(torch.where(tokens < bounds_N2[:, 1:], tokens, bounds[-1]).flatten())
    # Padded slots sort to the end.
    return batches, torch.cat(tokens_of_slots).argsort()[: bounds[-1]]


def _padded_length(length: int) -> int:
    return 1 << (length - 1).bit_length() if length <= _PAGE else -(-length // _PAGE) * _PAGE


def _take(x: Tensor, tokens: Tensor, num_heads: int) -> Tensor:
    """[B, T, G, ...] -> [documents, num_heads, padded length, ...]; head h takes from head h // (num_heads / G)."""
    rows = x.flatten(0, 1).index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2)
    return rows if rows.shape[1] == num_heads else rows.repeat_interleave(num_heads // rows.shape[1], 1)


def _put(parts: list[Tensor], place: Tensor, num_rows: int, num_heads: int) -> Tensor:
    """The inverse of `_take`; heads that shared a source are summed."""
    rows = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts]).index_select(0, place)
    rows = rows if rows.shape[1] == num_heads else rows.unflatten(1, (num_heads, -1)).sum(2)
    return rows.unflatten(0, (num_rows, -1))


def _share(x: Tensor, num_heads: int) -> Tensor:
    """[B, n, H, ...] -> [B, num_heads, H / num_heads * n, ...]: joins the queries that share a key head."""
    return x.unflatten(2, (num_heads, -1)).movedim(1, 3).flatten(2, 3)


def _unshare(x: Tensor, num_queries: int) -> Tensor:
    return x.unflatten(2, (-1, num_queries)).movedim(3, 1).flatten(2, 3)


def _has_kernels(q: Tensor) -> bool:
    """Whether torch has kernels that return and accept the sums of the softmax; otherwise the formula is computed."""
    return q.device.type == "cpu"


def _bias(q: Tensor, window: int | None) -> Tensor | None:
    """The mask of a batch q [.., T, D]: zero or -inf [T, T], or None if a causal mask is enough."""
    length = q.shape[-2]
    if _has_kernels(q) and (window is None or window >= length):
        return None
    return torch.where(_visible(length, length, 0, window, q.device), 0.0, -torch.inf).to(q.dtype)


def _past(q: Tensor, k: Tensor, span: _Span, window: int | None, query_start: int) -> tuple[slice, Tensor | None]:
    """The places of the keys before the span, and the bias of all queries that share a head; None if all see all."""
    num_queries, num_keys = span.num_queries, query_start - span.first_key
    past = slice(span.first_key, query_start)
    if window is None or num_keys + num_queries <= window:
        return past, None
    seen = _visible(num_queries, num_keys, num_keys, window, q.device)
    return past, torch.where(seen, 0.0, -torch.inf).to(q.dtype).repeat(q.shape[2] // k.shape[2], 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q [documents, H, S, D]; k, v [documents, H, T, D] -> o, and the logarithm of each softmax's sum
    [documents, H, S]. causal: only without a bias."""
    if _has_kernels(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = _scores(q, k, bias, dtype, scale)
    logsumexp = scores.logsumexp(-1)
    return (scores - logsumexp[..., None]).exp().to(v.dtype) @ v, logsumexp


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    logsumexp: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """o and logsumexp may belong to a softmax over more keys than k."""
    if _has_kernels(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, o, logsumexp, 0.0, causal, attn_mask=bias, scale=scale
        )
    weight = (_scores(q, k, bias, logsumexp.dtype, scale) - logsumexp[..., None]).exp()
    grad_weight = (grad @ v.mT).to(weight.dtype)
    grad_scores = (weight * (grad_weight - (grad * o).sum(-1, keepdim=True)) * scale).to(q.dtype)
    return grad_scores @ k, grad_scores.mT @ q, weight.to(v.dtype).mT @ grad


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, dtype: torch.dtype, scale: float) -> Tensor:
    scores = (q @ k.mT).to(dtype) * scale
    return scores if bias is None else scores + bias


@custom_op("torchlmoe::packed_attention")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, query_start: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns o [B, S, H, D] and the logarithm of each softmax's sum [B, S, H] for the backward."""
    num_rows, length, num_heads = q.shape[:3]
    span = _span(q, k.shape[1], cu_seqlens, window, query_start)
    batches, place = _batches(span.bounds, q.device)
    k_own, v_own = (x[:, query_start : query_start + length] for x in (k, v))
    parts = []
    for tokens in batches:
        q_part, k_part, v_part = (_take(x, tokens, num_heads) for x in (q, k_own, v_own))
        bias = _bias(q_part, window)
        parts.append(_attend(q_part, k_part, v_part, bias, bias is None, scale))
    o, logsumexp = (_put(list(part), place, num_rows, num_heads) for part in zip(*parts, strict=True))
    if n := span.num_queries:
        past, bias = _past(q, k, span, window, query_start)
        q_n, k_past, v_past = _share(q[:, :n], k.shape[2]), k[:, past].transpose(1, 2), v[:, past].transpose(1, 2)
        o_past, sum_past = (_unshare(x, n) for x in _attend(q_n, k_past, v_past, bias, False, scale))
        total = torch.logaddexp(logsumexp[:, :n], sum_past)
        own_weight, past_weight = ((x - total).exp()[..., None] for x in (logsumexp[:, :n], sum_past))
        o[:, :n] = own_weight * o[:, :n] + past_weight * o_past
        logsumexp[:, :n] = total
    return o, logsumexp


@_forward.register_fake
def _(q, k, v, cu_seqlens, window, query_start, scale):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=dtype)


@custom_op("torchlmoe::packed_attention_backward")
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor | None,
    window: int | None,
    query_start: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, length, num_heads = q.shape[:3]
    span = _span(q, k.shape[1], cu_seqlens, window, query_start)
    batches, place = _batches(span.bounds, q.device)
    own = slice(query_start, query_start + length)
    inside = torch.zeros(sum(tokens.numel() for tokens in batches), dtype=torch.bool, device=q.device)
    inside[place] = True
    parts, start = [], 0
    for tokens in batches:
        # A padded slot repeats a token, whose gradient must not be added twice.
        real = inside[start : start + tokens.numel()].view(tokens.shape)[:, None, :, None]
        start += tokens.numel()
        grad_part, q_part, k_part, v_part, o_part, sum_part = (
            _take(x, tokens, num_heads) for x in (grad, q, k[:, own], v[:, own], o, logsumexp)
        )
        grad_part, bias = grad_part.where(real, 0), _bias(q_part, window)
        inputs = (grad_part, q_part, k_part, v_part, o_part, sum_part)
        parts.append(_attend_backward(*inputs, bias, bias is None, scale))
    grad_q, grad_k, grad_v = (
        _put(list(part), place, num_rows, x.shape[2])
        for part, x in zip(zip(*parts, strict=True), (q, k, v), strict=True)
    )
    if k.shape[1] == length:
        return grad_q, grad_k, grad_v
    all_k, all_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    all_k[:, own], all_v[:, own] = grad_k, grad_v
    if n := span.num_queries:
        past, bias = _past(q, k, span, window, query_start)
        grad_n, q_n, o_n, sum_n = (_share(x[:, :n], k.shape[2]) for x in (grad, q, o, logsumexp))
        k_past, v_past = k[:, past].transpose(1, 2), v[:, past].transpose(1, 2)
        grad_q_n, grad_k, grad_v = _attend_backward(grad_n, q_n, k_past, v_past, o_n, sum_n, bias, False, scale)
        grad_q[:, :n] += _unshare(grad_q_n, n)
        all_k[:, past], all_v[:, past] = grad_k.transpose(1, 2), grad_v.transpose(1, 2)
    return grad_q, all_k, all_v


@_backward.register_fake
def _(grad, q, k, v, o, logsumexp, cu_seqlens, window, query_start, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))  # type: ignore[return-value]


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    keep_for_backward(ctx, output[:1], output[1])


def _autograd(ctx, *grads_of_outputs):
    (grad,) = gradients_of(ctx, grads_of_outputs)
    q, k, v, o, logsumexp, cu_seqlens = ctx.saved_tensors
    return (*_backward(grad, q, k, v, o, logsumexp, cu_seqlens, *ctx.options), None, None, None, None)


torch.library.register_autograd("torchlmoe::packed_attention", _autograd, setup_context=_setup_context)


def _flops(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, window: int | None, query_start: int) -> int:
    """FLOPs of scores and values over the whole square of each document, as torch counts SDPA, and over past keys."""
    span = _span(q, k.shape[1], cu_seqlens, window, query_start)
    pairs = sum((end - start) ** 2 for start, end in pairwise(span.bounds))
    pairs += len(q) * span.num_queries * (query_start - span.first_key)
    return 4 * q.shape[2] * q.shape[3] * pairs


@register_flop_formula(torch.ops.torchlmoe.packed_attention, get_raw=True)
def _forward_flops(q, k, v, cu_seqlens, window, query_start, scale, **kwargs) -> int:
    return _flops(q, k, cu_seqlens, window, query_start)


@register_flop_formula(torch.ops.torchlmoe.packed_attention_backward, get_raw=True)
def _backward_flops(grad, q, k, v, o, logsumexp, cu_seqlens, window, query_start, scale, **kwargs) -> int:
    return 5 * _flops(q, k, cu_seqlens, window, query_start) // 2
