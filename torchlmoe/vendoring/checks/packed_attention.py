"""packed_attention: equals softmax under the mask of the whole row, for spans of queries and a cache too."""

import pytest
import torch

from torchlmoe.ops.packed_attention import cached_attention, packed_attention

LAYOUT = [0, 1, 18, 18, 40]  # bounds of documents


def queries_and_keys(rows: int = 1) -> list[torch.Tensor]:
    """q [B, 40, 4, 8], k and v [B, 40, 2, 8]."""
    torch.manual_seed(0)
    return [torch.randn(rows, 40, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]


def by_mask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, bounds: list[int], scale: float | None
) -> torch.Tensor:
    token = torch.arange(40)
    document = torch.bucketize(token, torch.tensor(bounds[1:]), right=True)
    distance = token[:, None] - token
    seen = (distance >= 0) & (document[:, None] == document) & (distance < (window or 40))
    k, v = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * (scale or q.shape[-1] ** -0.5)
    return torch.einsum("bhst,bthd->bshd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [True, False])
def test_attention_equals_the_masked_formula(packed, window, scale):
    """With gradients, and those across documents exactly zero."""
    tensors, bounds = queries_and_keys(1 if packed else 2), LAYOUT if packed else [0, 40]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if packed else None
    found = packed_attention(*tensors, cu_seqlens=cu_seqlens, window=window, scale=scale)
    q, k, v = tensors
    expected = by_mask(q, k, v, window, bounds, scale)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(o, tensors, weight, retain_graph=True) for o in (found, expected)]
    torch.testing.assert_close(*gradients)
    if packed:
        for start, end in zip(bounds, bounds[1:], strict=False):
            for gradient in torch.autograd.grad(found[:, start:end].sum(), tensors, retain_graph=True):
                assert not gradient[:, :start].any()
                assert not gradient[:, end:].any()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [True, False])
def test_spans_of_queries_are_those_of_the_whole(packed, window):
    (q, k, v), bounds = queries_and_keys(), torch.tensor(LAYOUT, dtype=torch.int32) if packed else None
    options = dict(cu_seqlens=bounds, window=window, scale=0.7)
    whole = packed_attention(q, k, v, **options)
    for start, end in [(0, 10), (10, 30), (30, 40)]:
        part = packed_attention(q[:, start:end], k, v, **options, query_start=start)
        torch.testing.assert_close(part, whole[:, start:end])
        found, expected = (
            torch.autograd.grad(o.square().sum(), (q, k, v), retain_graph=True) for o in (part, whole[:, start:end])
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", [None, 5])
def test_decoding_from_a_cache(window):
    q, k, v = queries_and_keys(2)
    whole = packed_attention(q, k, v, window=window, scale=0.7)
    for start, end in [(0, 7), (7, 8), (39, 40)]:
        positions = torch.arange(start, end).expand(2, -1)
        part = cached_attention(q[:, start:end], k, v, positions, window=window, scale=0.7)
        torch.testing.assert_close(part, whole[:, start:end])
