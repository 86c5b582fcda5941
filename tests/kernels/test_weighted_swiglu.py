"""The Triton hidden layer of an expert against its formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.test_weighted_swiglu import make_inputs
from torchlmoe.kernels.weighted_swiglu import weighted_swiglu


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize(("num_rows", "width"), [(0, 4), (1, 1), (23, 40), (9, 16)])
def test_equals_formula(num_rows, width, precise, device, half):
    dtype = torch.float32 if precise else half
    tolerance = 1e-6 if precise else 2 * torch.finfo(half).eps
    gate_up, weight, grad = (x.detach().to(device) for x in make_inputs(num_rows, width, dtype))
    wide = torch.full((num_rows, 4 * width + 3), torch.nan, dtype=dtype, device=device)
    strided = wide[:, 3 : 3 + 2 * width].copy_(gate_up).requires_grad_()
    leaves = [strided, weight.requires_grad_()]
    y = weighted_swiglu(*leaves)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    exact = [x.detach().double().requires_grad_() for x in (gate_up, weight)]
    gate, up = exact[0].chunk(2, -1)
    y = F.silu(gate) * up * exact[1][:, None]
    expected = [y, *torch.autograd.grad(y, exact, grad.double())]
    for ours, theirs, like in zip(found, expected, [gate_up, gate_up, weight], strict=True):
        assert ours.dtype is like.dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_registered_operation(device):
    gate_up, weight, _ = (x.detach().to(device).requires_grad_() for x in make_inputs(3, 5, torch.float32))
    torch.library.opcheck(
        torch.ops.torchlmoe.weighted_swiglu_triton.default,
        (gate_up, weight),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
