"""weighted_swiglu against its formula under autograd: one block of rows and several, every dtype, no rows."""

import pytest
import torch
import torch.nn.functional as F

import torchlmoe.ops.weighted_swiglu as module
from torchlmoe.ops.weighted_swiglu import weighted_swiglu


def make_inputs(num_rows, width, dtype):
    generator = torch.Generator().manual_seed(0)
    gate_up, grad = (torch.randn(num_rows, n, generator=generator).to(dtype) for n in (2 * width, width))
    weight = torch.rand(num_rows, generator=generator).to(torch.promote_types(dtype, torch.float32))
    return gate_up.requires_grad_(), weight.requires_grad_(), grad


@pytest.mark.parametrize("block_elements", [1, 20, 1 << 18])
@pytest.mark.parametrize("num_rows", [0, 1, 23])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_equals_formula(num_rows, block_elements, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block_elements)
    *leaves, grad = make_inputs(num_rows, 5, dtype)
    y = weighted_swiglu(*leaves)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    gate, up = exact[0].chunk(2, -1)
    y = F.silu(gate) * up * exact[1][:, None]
    expected = [y, *torch.autograd.grad(y, exact, grad.double())]
    for ours, theirs, like in zip(found, expected, [leaves[0], *leaves], strict=True):
        assert ours.dtype is like.dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_registered_operation():
    gate_up, weight, _ = make_inputs(23, 5, torch.float64)
    torch.autograd.gradcheck(weighted_swiglu, (gate_up, weight))
    torch.library.opcheck(
        torch.ops.torchlmoe.weighted_swiglu.default,
        (gate_up, weight),
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_dynamic",
        ),
    )
