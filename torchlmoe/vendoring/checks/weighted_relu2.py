"""weighted_relu2: equals its formula, and has the gradients of finite differences."""

import torch
import torch.nn.functional as F

from torchlmoe.ops.weighted_relu2 import weighted_relu2


def test_relu2_equals_its_formula():
    torch.manual_seed(0)
    up, weight = torch.randn(9, 7, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
    torch.testing.assert_close(weighted_relu2(up, weight), F.relu(up).square() * weight[:, None])
    low = weighted_relu2(up.bfloat16(), weight.float())
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.double(), F.relu(up).square() * weight[:, None], rtol=0.03, atol=0.03)


def test_gradients_of_relu2():
    torch.manual_seed(0)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 6), (5,))]
    assert torch.autograd.gradcheck(weighted_relu2, given)
