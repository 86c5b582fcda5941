"""weighted_swiglu: equals its formula, and has the gradients of finite differences."""

import torch
import torch.nn.functional as F

from torchlmoe.ops.weighted_swiglu import weighted_swiglu


def test_swiglu_equals_its_formula():
    torch.manual_seed(0)
    gate_up, weight = torch.randn(9, 14, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
    gate, up = gate_up.chunk(2, -1)
    torch.testing.assert_close(weighted_swiglu(gate_up, weight), F.silu(gate) * up * weight[:, None])
    wide = weighted_swiglu(gate_up.bfloat16(), weight.float())
    assert wide.dtype is torch.bfloat16
    torch.testing.assert_close(wide.double(), F.silu(gate) * up * weight[:, None], rtol=0.03, atol=0.03)


def test_gradients_of_swiglu():
    torch.manual_seed(0)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 6), (5,))]
    assert torch.autograd.gradcheck(weighted_swiglu, given)
