"""causal_conv: equals conv1d of each document, continues from a state, and has the gradients of finite differences."""

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.ops.causal_conv import causal_conv

ROW = [0, 1, 3, 3, 20]  # bounds of documents


def tensors() -> list[torch.Tensor]:
    """x [1, 20, 3], weight [3, 4] and bias [3]."""
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 20, 3), (3, 4), (3,))]


def by_conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight[:, None], bias, groups=len(weight)).transpose(1, 2)


@pytest.mark.parametrize("activation", [True, False])
def test_equals_conv1d_of_each_document(activation):
    x, weight, bias = tensors()
    y = causal_conv(x, weight, bias, cu_seqlens=torch.tensor(ROW, dtype=torch.int32), activation=activation)
    documents = [x[:, start:end] for start, end in zip(ROW, ROW[1:], strict=False) if start < end]
    expected = torch.cat([by_conv1d(document, weight, bias) for document in documents], 1)
    torch.testing.assert_close(y, F.silu(expected) if activation else expected)


def test_state_is_what_came_before():
    x, weight, bias = tensors()
    whole, pieces = causal_conv(x, weight, bias), [causal_conv(x[:, :5], weight, bias)]
    pieces += [causal_conv(x[:, t : t + 1], weight, bias, state=x[:, t - 3 : t]) for t in range(5, 20)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_gradients_of_the_convolution():
    bounds = torch.tensor(ROW, dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *given: causal_conv(*given, cu_seqlens=bounds), tensors())
