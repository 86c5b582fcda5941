"""Causal softmax attention that does not look across packed documents.

Documents are gathered into batches of similar length and padded at the end, where a causal mask already hides the
padding from every real token. So no mask of the whole row is built, the cost is that of the documents alone, and
what one document holds cannot reach another even as a rounding error. One operation to torch (forward and backward
are a `torch.library.custom_op` pair), since the shapes within depend on the documents.
"""

from collections import defaultdict
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import register_flop_formula

_PAGE = 256  # longer documents are padded to a multiple of it, shorter ones to a power of two


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the earlier tokens of the same document.

    q [B, T, H, D]; k, v [B, T, G, D], G a divisor of H. cu_seqlens: int32 [N + 1] bounds of documents in one row
    (B = 1), empty ones allowed. window: how many tokens, itself included, a token sees; all unless given. Returns o
    like q.
    """
    length = q.shape[1]
    if cu_seqlens is None or length == 0:
        return _sdpa(q, k, v, None if window is None or window >= length else _visible(length, window, q.device))
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        # torch's own operation on packed documents, by flash attention.
        span = (-1 if window is None else window - 1, 0)
        bounds = (cu_seqlens, cu_seqlens, length, length)
        o = varlen_attn(q[0], k[0], v[0], *bounds, window_size=span, enable_gqa=True)
        assert isinstance(o, Tensor)
        return o[None]
    return _forward(q, k, v, cu_seqlens, window)[0]


def cached_attention(q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor, *, window: int | None = None) -> Tensor:
    """Attention of new tokens to a cache. q [B, T, H, D]; k, v [B, S, G, D]: place s holds the token of position s.

    query_positions: int64 [B, T]; a query sees the places up to its own position, at most `window` of them.
    """
    distance = query_positions[:, :, None] - torch.arange(k.shape[1], device=k.device)
    mask = distance >= 0
    if window is not None:
        mask = mask & (distance < window)
    return _sdpa(q, k, v, mask[:, None])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal without a mask. q, k, v [B, T or S, heads, D] -> [B, T, H, D]."""
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return o.transpose(1, 2)


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [T, T]: which places a place sees."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


@lru_cache(maxsize=4)
def _batches(bounds: tuple[int, ...], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """The tokens of each batch of documents, int64 [documents, padded length], and where among all their slots each
    token of the row lies, int64 [T]. Made once for all layers of a step, both ways."""
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
    """[1, T, G, ...] -> [documents, num_heads, padded length, ...]; head h takes from head h // (num_heads / G)."""
    rows = x[0].index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2)
    return rows if rows.shape[1] == num_heads else rows.repeat_interleave(num_heads // rows.shape[1], 1)


def _put(parts: list[Tensor], place: Tensor, num_heads: int) -> Tensor:
    """The way back; heads that shared a source are summed."""
    rows = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts]).index_select(0, place)
    return (rows if rows.shape[1] == num_heads else rows.unflatten(1, (num_heads, -1)).sum(2))[None]


def _has_kernels(q: Tensor) -> bool:
    """Whether torch has kernels that give and take the sums of the softmax; elsewhere the formula serves."""
    return q.device.type == "cpu"


def _bias(q: Tensor, window: int | None) -> Tensor | None:
    """What hides places from a batch q [.., T, D]: zero or -inf [T, T], or None where plain causality serves."""
    length = q.shape[-2]
    if _has_kernels(q) and (window is None or window >= length):
        return None
    return torch.where(_visible(length, window, q.device), 0.0, -torch.inf).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """q, k, v [documents, H, T, D] -> o, and the logarithm of each softmax's sum [documents, H, T]."""
    if _has_kernels(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, bias is None, attn_mask=bias)
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.mT).to(dtype) * q.shape[-1] ** -0.5 + bias
    logsumexp = scores.logsumexp(-1)
    return (scores - logsumexp[..., None]).exp().to(v.dtype) @ v, logsumexp


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsumexp: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if _has_kernels(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, o, logsumexp, 0.0, bias is None, attn_mask=bias
        )
    scale = q.shape[-1] ** -0.5
    weight = ((q @ k.mT).to(logsumexp.dtype) * scale + bias - logsumexp[..., None]).exp()
    grad_weight = (grad @ v.mT).to(weight.dtype)
    grad_scores = (weight * (grad_weight - (grad * o).sum(-1, keepdim=True)) * scale).to(q.dtype)
    return grad_scores @ k, grad_scores.mT @ q, weight.to(v.dtype).mT @ grad


@torch.library.custom_op("torchlmoe::packed_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Returns o [1, T, H, D] and the logarithm of each softmax's sum [1, T, H] for the backward."""
    batches, place = _batches(tuple(cu_seqlens.tolist()), q.device)
    num_heads = q.shape[2]
    parts = []
    for tokens in batches:
        q_part, k_part, v_part = (_take(x, tokens, num_heads) for x in (q, k, v))
        parts.append(_attend(q_part, k_part, v_part, _bias(q_part, window)))
    o, logsumexp = (_put(list(part), place, num_heads) for part in zip(*parts, strict=True))
    return o, logsumexp


@_forward.register_fake
def _(q, k, v, cu_seqlens, window):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.custom_op("torchlmoe::packed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsumexp: Tensor, cu_seqlens: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    batches, place = _batches(tuple(cu_seqlens.tolist()), q.device)
    num_heads = q.shape[2]
    inside = torch.zeros(sum(tokens.numel() for tokens in batches), dtype=torch.bool, device=q.device)
    inside[place] = True
    parts, start = [], 0
    for tokens in batches:
        # A padded slot repeats a token, whose gradient must not come in twice.
        real = inside[start : start + tokens.numel()].view(tokens.shape)[:, None, :, None]
        start += tokens.numel()
        grad_part, q_part, k_part, v_part, o_part, sum_part = (
            _take(x, tokens, num_heads) for x in (grad, q, k, v, o, logsumexp)
        )
        grad_part = grad_part.where(real, 0)
        parts.append(_attend_backward(grad_part, q_part, k_part, v_part, o_part, sum_part, _bias(q_part, window)))
    grad_q, grad_k, grad_v = (
        _put(list(part), place, x.shape[2]) for part, x in zip(zip(*parts, strict=True), (q, k, v), strict=True)
    )
    return grad_q, grad_k, grad_v


@_backward.register_fake
def _(grad, q, k, v, o, logsumexp, cu_seqlens, window):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))  # type: ignore[return-value]


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    q, k, v, o, logsumexp, cu_seqlens = ctx.saved_tensors
    return (*_backward(grad, q, k, v, o, logsumexp, cu_seqlens, ctx.window), None, None)


torch.library.register_autograd("torchlmoe::packed_attention", _autograd, setup_context=_setup_context)


def _flops(q: Tensor, cu_seqlens: Tensor) -> int:
    """Scores and values over the whole square of each document, as torch counts SDPA."""
    return 4 * q.shape[2] * q.shape[3] * int(cu_seqlens.long().diff().square().sum())


@register_flop_formula(torch.ops.torchlmoe.packed_attention, get_raw=True)
def _forward_flops(q, k, v, cu_seqlens, window, **kwargs) -> int:
    return _flops(q, cu_seqlens)


@register_flop_formula(torch.ops.torchlmoe.packed_attention_backward, get_raw=True)
def _backward_flops(grad, q, k, v, o, logsumexp, cu_seqlens, window, **kwargs) -> int:
    return 5 * _flops(q, cu_seqlens) // 2
