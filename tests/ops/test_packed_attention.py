"""Packed attention against a plain softmax over each document, by the CPU's kernels and by formula."""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torchlmoe.ops import packed_attention as module
from torchlmoe.ops.packed_attention import packed_attention

BOUNDS = {
    "many": [0, 3, 4, 4, 20, 37, 60],
    "one": [0, 40],
    "one_and_empty": [0, 0, 17, 17],
    "one_letter": [0, 1],
    "no_tokens": [0, 0],
    "pages": [0, 300, 301, 560],
}


def make(length, heads, groups, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, length, heads, 6), (1, length, groups, 6), (1, length, groups, 6)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def document_by_document(q, k, v, bounds, window, scale=None):
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    outputs = []
    for start, end in pairwise(bounds):
        scores = torch.einsum("thd,shd->hts", q[0, start:end], k[0, start:end]) * (scale or q.shape[-1] ** -0.5)
        place = torch.arange(end - start)
        distance = place[:, None] - place
        hidden = (distance < 0) | (distance >= (window or end))
        outputs.append(
            torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[0, start:end])
        )
    return torch.cat(outputs)[None]


@pytest.mark.parametrize("by_formula", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", BOUNDS)
def test_equals_a_softmax_over_each_document(name, window, by_formula, monkeypatch):
    if by_formula:
        monkeypatch.setattr(module, "_has_kernels", lambda q: False)
    bounds = BOUNDS[name]
    for groups, scale in ((4, None), (2, 0.9), (1, None)):
        leaves = make(bounds[-1], 4, groups)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        o = packed_attention(*leaves, cu_seqlens=cu_seqlens, window=window, scale=scale)
        expected = document_by_document(*leaves, bounds, window, scale)
        grad = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
        found, wanted = (torch.autograd.grad(y, leaves, grad) for y in (o, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("by_formula", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype, tolerance, by_formula, monkeypatch):
    if by_formula:
        monkeypatch.setattr(module, "_has_kernels", lambda q: False)
    low = make(60, 4, 2, dtype)
    exact = [x.detach().double().requires_grad_() for x in low]
    cu_seqlens = torch.tensor(BOUNDS["many"], dtype=torch.int32)
    results = []
    for leaves in (low, exact):
        o = packed_attention(*leaves, cu_seqlens=cu_seqlens)
        results.append([o, *torch.autograd.grad(o, leaves, torch.ones_like(o))])
    for found, wanted in zip(*results, strict=True):
        assert found.dtype is dtype
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


def as_flash(q, k, v, q_bounds, k_bounds, max_q, max_k, *, scale, window_size, enable_gqa):
    """What flash attention computes of documents whose last query meets their last key, one after another."""
    assert enable_gqa
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    outputs = []
    for (q_start, q_end), (k_start, k_end) in zip(*(pairwise(b.tolist()) for b in (q_bounds, k_bounds)), strict=True):
        num_queries, num_keys = q_end - q_start, k_end - k_start
        assert num_queries <= min(max_q, num_keys)
        assert num_keys <= max_k
        distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
        hidden = (distance < 0) | ((distance > window_size[0]) & (window_size[0] >= 0))
        scores = torch.einsum("thd,shd->hts", q[q_start:q_end], k[k_start:k_end]) * scale
        weight = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hts,shd->thd", weight, v[k_start:k_end]))
    return torch.cat(outputs)


def by_flash(q, k, v, *, cu_seqlens=None, window=None, query_start=0, scale):
    return module._varlen(q, k, v, cu_seqlens, window, query_start, scale)


@pytest.mark.parametrize("by", ["kernels", "formula", "flash"])
@pytest.mark.parametrize("window", [None, 1, 5, 25])
@pytest.mark.parametrize("name", ["many", "one", "one_and_empty", "pages"])
def test_a_span_of_queries(name, window, by, monkeypatch):
    """A span's outputs are the row's; the gradients of all spans add up to the row's."""
    monkeypatch.setattr(module, "_has_kernels", lambda q: by == "kernels")
    monkeypatch.setattr(module, "varlen_attn", as_flash)
    attend = by_flash if by == "flash" else packed_attention
    bounds = BOUNDS[name]
    cuts = sorted({0, 1, 4, 10, 20, 38, bounds[-1] - 1, bounds[-1]} & set(range(bounds[-1] + 1)))
    for groups in (4, 2, 1):
        leaves = q, k, v = make(bounds[-1], 4, groups)
        options = dict(cu_seqlens=torch.tensor(bounds, dtype=torch.int32), window=window, scale=0.9)
        spans = [attend(q[:, start:end], k, v, **options, query_start=start) for start, end in pairwise(cuts)]
        expected = document_by_document(*leaves, bounds, window, scale=0.9)
        o = torch.cat(spans, 1)
        torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
        grad = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1))
        found, wanted = (torch.autograd.grad(y, leaves, grad) for y in (o, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("by", ["kernels", "formula", "flash"])
@pytest.mark.parametrize("window", [None, 5, 25])
def test_a_span_of_queries_of_each_row(window, by, monkeypatch):
    monkeypatch.setattr(module, "_has_kernels", lambda q: by == "kernels")
    monkeypatch.setattr(module, "varlen_attn", as_flash)
    attend = by_flash if by == "flash" else packed_attention
    leaves = q, k, v = [x.detach().view(2, 30, *x.shape[2:]).requires_grad_() for x in make(60, 4, 2)]
    spans = [
        attend(q[:, start:end], k, v, window=window, query_start=start, scale=0.9)
        for start, end in pairwise([0, 7, 8, 20, 30])
    ]
    rows = [document_by_document(*(x[row : row + 1] for x in leaves), [0, 30], window, 0.9) for row in range(2)]
    o, expected = torch.cat(spans, 1), torch.cat(rows)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1))
    found, wanted = (torch.autograd.grad(y, leaves, grad) for y in (o, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_a_span_does_not_read_other_documents():
    """Nor what is beyond a window, nor what comes after it: all that is NaN, and its gradient an exact zero."""
    q, k, v = make(60, 4, 2)
    seen = torch.zeros(60, dtype=torch.bool)
    seen[16:35] = True
    k, v = (x.detach().masked_fill(~seen[:, None, None], torch.nan).requires_grad_() for x in (k, v))
    cu_seqlens = torch.tensor([0, 3, 40, 60], dtype=torch.int32)
    o = packed_attention(q[:, 20:35], k, v, cu_seqlens=cu_seqlens, window=5, query_start=20)
    grad_k, grad_v = torch.autograd.grad(o.sum(), (k, v))
    for x in (o, grad_k, grad_v):
        assert x.isfinite().all()
    assert (grad_v[0].abs().sum((1, 2)) > 0).equal(seen)


@pytest.mark.parametrize(("length", "query_start"), [(60, 0), (15, 20)])
def test_registration(length, query_start):
    """Fake shapes and strides, autograd registration, and dynamic lengths, by torch's own checks."""
    q, k, v = make(60, 4, 2)
    q = q.detach()[:, query_start : query_start + length].requires_grad_()
    cu_seqlens = torch.tensor(BOUNDS["many"], dtype=torch.int32)
    torch.library.opcheck(module._forward, (q, k, v, cu_seqlens, 5, query_start, 0.9))


def test_flops_of_a_span_are_those_of_what_it_sees():
    q, k, v = make(60, 4, 2)
    with FlopCounterMode(display=False) as counter:
        packed_attention(q[:, 10:39], k, v, cu_seqlens=torch.tensor([0, 3, 30, 60], dtype=torch.int32), query_start=10)
    # Twenty queries of the second document see it from token 10 on, and its 7 tokens before; nine are of the third.
    assert counter.get_total_flops() == 4 * 4 * 6 * (20 * 20 + 20 * 7 + 9 * 9)


def test_flops_are_those_of_the_documents():
    leaves = make(60, 4, 2)
    with FlopCounterMode(display=False) as counter:
        packed_attention(*leaves, cu_seqlens=torch.tensor(BOUNDS["many"], dtype=torch.int32)).sum().backward()
    squares = sum((end - start) ** 2 for start, end in pairwise(BOUNDS["many"]))
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    forward = 4 * 4 * 6 * squares
    assert counted == {
        "torchlmoe.packed_attention": forward,
        "torchlmoe.packed_attention_backward": forward * 5 // 2,
    }
