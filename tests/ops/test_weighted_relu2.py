"""weighted_relu2 against its formula under autograd, in every dtype, without rows, and compiled."""

import pytest
import torch

from torchlmoe.ops.weighted_relu2 import weighted_relu2


def inputs(num_rows, dtype):
    generator = torch.Generator().manual_seed(0)
    up, grad = (torch.randn(num_rows, 5, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(num_rows, generator=generator).to(torch.promote_types(dtype, torch.float32))
    return up.requires_grad_(), weight.requires_grad_(), grad


@pytest.mark.parametrize("num_rows", [0, 1, 23])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_equals_formula(num_rows, dtype, tolerance):
    *leaves, grad = inputs(num_rows, dtype)
    y = weighted_relu2(*leaves)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    up, weight = (leaf.detach().double().requires_grad_() for leaf in leaves)
    y = up.clamp(min=0).square() * weight[:, None]
    expected = [y, *torch.autograd.grad(y, (up, weight), grad.double())]
    for ours, theirs, like in zip(found, expected, [leaves[0], *leaves], strict=True):
        assert ours.dtype is like.dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_derivative_and_compiled():
    up, weight, _ = inputs(7, torch.float64)
    torch.autograd.gradcheck(weighted_relu2, (up, weight))
    compiled = torch.compile(weighted_relu2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(up, weight), weighted_relu2(up, weight))
