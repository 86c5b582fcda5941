"""Projections of each memory's own, against a loop over tokens and their memories, in float64."""

import pytest
import torch

from torchlmoe.mixers.memories import Memories, MemoryLinear


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("bounds", [None, [0, 0, 5, 6, 13]])
def test_memory_linear(bounds, alignment):
    """Runs padded or not, documents packed or not; a memory that nobody chose has a gradient of zero."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 13) if bounds is None else (1, 13)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    num_tokens = shape[0] * shape[1]
    choices = torch.rand(num_tokens, 4, generator=generator).argsort(-1)[:, :2]  # of five memories
    weights = torch.rand(num_tokens, 2, dtype=torch.float64, generator=generator)
    memories = Memories.of_choices(choices, weights, 5, shape, cu_seqlens, own_projections=True, alignment=alignment)
    projection = MemoryLinear(3, 4, 5, init_std=1.0).double()
    projection.init_weights()
    x = torch.randn(*shape, 3, dtype=torch.float64, generator=generator, requires_grad=True)

    found = memories.mix(projection(x, memories)[:, :, None])[:, :, 0]
    rows = x.view(-1, 3)
    expected = torch.stack(
        [
            sum(w * (projection.weight[m] @ row) for m, w in zip(chosen, weight, strict=True))
            for row, chosen, weight in zip(rows, choices, weights, strict=True)
        ]
    ).view_as(found)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad(y, (x, projection.weight), cotangent) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert not gradients[0][1][4].any()
