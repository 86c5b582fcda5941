"""grouped_matmul: equals one product after another, with its gradients, for groups of many rows, one and none."""

import pytest
import torch

from torchlmoe.ops.grouped_matmul import grouped_matmul

ENDS = [7, 7, 8, 20]  # of the groups' rows


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_a_loop_over_groups(dtype, error):
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((20, 8), (4, 12, 8)))
    y = grouped_matmul(x, weight, torch.tensor(ENDS, dtype=torch.int32))
    groups = zip([0, *ENDS], ENDS, weight.double(), strict=False)
    expected = torch.cat([x.double()[start:end] @ matrix.mT for start, end, matrix in groups])
    grad = torch.randn_like(y)
    of_found, of_expected = (torch.autograd.grad(o, (x, weight), grad.to(o.dtype)) for o in (y, expected))
    for a, b in zip((y, *of_found), (expected, *of_expected), strict=True):
        assert (a.double() - b.double()).norm() <= error * b.double().norm()


def test_gradients_of_both_orders():
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (3, 2, 3)))
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *given: grouped_matmul(*given, offsets), (x, weight))
    assert torch.autograd.gradgradcheck(lambda *given: grouped_matmul(*given, offsets), (x, weight))
