"""AttentionSequenceParallel: attention on spans of a row equals that on one process, forward and backward."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from torchlmoe.styles.attention import AttentionSequenceParallel
from torchlmoe.vendoring.checks.ranks import NUMBERS_OF_RANKS, assert_gradients_equal, on_ranks, span_of


class MaskedAttention(nn.Module):
    """Causal attention of queries that begin at token `query_start` to all keys of their document."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, query_start: int = 0):
        key = torch.arange(k.shape[1])
        query = query_start + torch.arange(q.shape[1])
        document = torch.zeros_like(key) if cu_seqlens is None else torch.bucketize(key, cu_seqlens[1:], right=True)
        seen = (query[:, None] >= key) & (document[query][:, None] == document)
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        scores = torch.einsum("bshd,bthd->bhst", q, k).masked_fill(~seen, -torch.inf)
        return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


def check_attention(mesh: DeviceMesh) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 12, heads, 4, dtype=torch.float64, generator=generator) for heads in (6, 2, 2)]
    for bounds in (None, [0, 12], [0, 1, 5, 5, 12], [0, 4, 6, 7, 8, 12]):
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        whole = [x[: 2 if bounds is None else 1].clone().requires_grad_() for x in tensors]
        expected = MaskedAttention()(*whole, cu_seqlens=cu_seqlens)
        weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
        (expected * weight).sum().backward()
        for communication in ("all_gather", "ulysses"):
            style = AttentionSequenceParallel(communication, num_heads=6)
            module = parallelize_module(MaskedAttention(), mesh, style)
            parts = [span_of(x, mesh).detach().clone().requires_grad_() for x in whole]
            o = module(*parts, cu_seqlens=cu_seqlens)
            (o * span_of(weight, mesh)).sum().backward()
            torch.testing.assert_close(o, span_of(expected, mesh), rtol=1e-9, atol=1e-11)
            pairs = zip(parts, whole, strict=True)
            assert_gradients_equal(mesh, ((part.grad, x.grad, True) for part, x in pairs))


@pytest.mark.parametrize("world_size", NUMBERS_OF_RANKS)
def test_attention_on_ranks(world_size):
    on_ranks(world_size, check_attention)
