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


def document_by_document(q, k, v, bounds, window):
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    outputs = []
    for start, end in pairwise(bounds):
        scores = torch.einsum("thd,shd->hts", q[0, start:end], k[0, start:end]) / q.shape[-1] ** 0.5
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
    for groups in (4, 2, 1):
        leaves = make(bounds[-1], 4, groups)
        o = packed_attention(*leaves, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), window=window)
        expected = document_by_document(*leaves, bounds, window)
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


def test_registration():
    """Fake shapes and strides, autograd registration, and dynamic lengths, by torch's own checks."""
    leaves = make(60, 4, 2)
    torch.library.opcheck(module._forward, (*leaves, torch.tensor(BOUNDS["many"], dtype=torch.int32), 5))


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
