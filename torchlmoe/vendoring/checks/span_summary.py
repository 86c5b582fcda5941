"""span_summary: the affine map that it returns takes a span's first state to its last one."""

import pytest
import torch

from torchlmoe.ops.linear_recurrence import linear_recurrence
from torchlmoe.ops.span_summary import span_summary

SUMMARIES = {"decay": (), "decay per channel": (6,), "delta rule": (), "decay on both sides": (6,)}


@pytest.mark.parametrize("case", SUMMARIES)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_map_equals_the_recurrence(case, backend):
    """With its gradients, for documents of more than one chunk, one token and none."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 70, 71, 71], dtype=torch.int32)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tensors = {"k": randn(1, 71, 2, 6) * 6**-0.5, "v": randn(1, 71, 2, 5)}
    tensors["log_decay"] = -randn(1, 71, 2, *SUMMARIES[case]).abs() / 8
    if case == "delta rule":
        tensors["erase"] = randn(1, 71, 2).sigmoid()
    if case == "decay on both sides":
        tensors["value_log_decay"] = -randn(1, 71, 2, 5).abs() / 8
    leaves = [x.requires_grad_() for x in tensors.values()]
    first = randn(3, 2, 6, 5)
    transition, state = span_summary(**tensors, cu_seqlens=bounds, backend=backend)
    if isinstance(transition, tuple):
        found = transition[0][..., None] * first * transition[1][..., None, :] + state
    elif case == "delta rule":
        found = transition @ first + state
    else:
        found = transition[..., None] * first + state
    q = torch.zeros_like(tensors["k"])
    _, expected = linear_recurrence(
        q, **tensors, initial_state=first, output_final_state=True, cu_seqlens=bounds, backend="reference"
    )
    weight = randn(*first.shape)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    found, expected = (torch.autograd.grad((x * weight).sum(), leaves) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
