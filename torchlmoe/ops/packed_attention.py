"""Causal softmax attention that does not look across packed documents, on top of SDPA.

Documents are gathered into batches of similar length and padded at the end, where a causal mask already hides the
padding from every real token. So no mask of the whole row is built, the cost is that of the documents alone, and
what one document holds cannot reach another even as a rounding error.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

_PAGE = 256  # longer documents are padded to a multiple of it, shorter ones to a power of two


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the earlier tokens of the same document.

    q [B, T, H, D]; k, v [B, T, G, D], G a divisor of H. cu_seqlens: int32 [N + 1] bounds of documents in one row
    (B = 1), empty ones allowed. window: how many tokens, itself included, a token sees; all unless given. Returns o
    like q.
    """
    if cu_seqlens is None:
        return _attend(q, k, v, window=window)
    length = q.shape[1]
    bounds = cu_seqlens.tolist()
    groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, end in zip(bounds, bounds[1:], strict=False):
        if end > start:
            groups[_padded_length(end - start)].append((start, end))
    if len(groups) == 1 and next(iter(groups.values())) == [(0, length)]:
        return _attend(q, k, v, window=window)

    outputs, tokens_of_outputs = [], []
    for padded_length, documents in groups.items():
        start, end = torch.tensor(documents, device=q.device).unbind(1)
        tokens = start[:, None] + torch.arange(padded_length, device=q.device)
        inside = tokens < end[:, None]
        flat = torch.minimum(tokens, end[:, None] - 1).flatten()  # padding repeats the document's own last token
        parts = (x[0].index_select(0, flat).unflatten(0, tokens.shape) for x in (q, k, v))
        outputs.append(_attend(*parts, window=window).flatten(0, 1))
        tokens_of_outputs.append(torch.where(inside, tokens, length).flatten())
    # Where token t lies among the outputs; padded slots sort to the end.
    place = torch.cat(tokens_of_outputs).argsort()[:length]
    return torch.cat(outputs).index_select(0, place)[None]


def _padded_length(length: int) -> int:
    return 1 << (length - 1).bit_length() if length <= _PAGE else -(-length // _PAGE) * _PAGE


def _attend(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
    length = q.shape[1]
    mask = None
    if window is not None and window < length:
        place = torch.arange(length, device=q.device)
        distance = place[:, None] - place
        mask = (distance >= 0) & (distance < window)
    return _sdpa(q, k, v, mask)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal without a mask. q, k, v [B, T or S, heads, D] -> [B, T, H, D]."""
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return o.transpose(1, 2)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor, *, window: int | None = None) -> Tensor:
    """Attention of new tokens to a cache. q [B, T, H, D]; k, v [B, S, G, D]: place s holds the token of position s.

    query_positions: int64 [B, T]; a query sees the places up to its own position, at most `window` of them.
    """
    distance = query_positions[:, :, None] - torch.arange(k.shape[1], device=k.device)
    mask = distance >= 0
    if window is not None:
        mask = mask & (distance < window)
    return _sdpa(q, k, v, mask[:, None])
