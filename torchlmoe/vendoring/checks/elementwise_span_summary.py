"""elementwise_span_summary: the affine map that it returns takes a span's first state to its last one."""

import pytest
import torch

from torchlmoe.ops.elementwise_recurrence import elementwise_recurrence, elementwise_span_summary


@pytest.mark.parametrize("rates", ["per token", "with a step", "constant"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_elementwise_map_equals_the_recurrence(rates, backend):
    """With its gradients, for documents of many tokens, one and none."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, 40, 41, 41], dtype=torch.int32)
    tensors = {"k": torch.randn(1, 41, 2, 3, dtype=torch.float64), "v": torch.randn(1, 41, 2, 4, dtype=torch.float64)}
    of_tokens = (1, 41) if rates == "per token" else ()
    tensors["log_decay"] = -torch.rand(*of_tokens, 2, 3, 4, dtype=torch.float64) / 8
    if rates == "with a step":
        tensors["step"] = torch.rand(1, 41, 2, 4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in tensors.values()]
    first, weight = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64)
    transition, state = elementwise_span_summary(**tensors, cu_seqlens=bounds, backend=backend)
    found = transition * first + state
    q = torch.zeros_like(tensors["k"])
    _, expected = elementwise_recurrence(
        q, **tensors, initial_state=first, output_final_state=True, cu_seqlens=bounds, backend="reference"
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert expected is not None
    gradients = [torch.autograd.grad((x * weight).sum(), leaves) for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)
