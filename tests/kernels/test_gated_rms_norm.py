"""The Triton norms against torch's rms_norm and plain formulas, in float64."""

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.kernels.gated_rms_norm import gated_rms_norm
from torchlmoe.layers import group_norms, norms

FUNCTIONS = {"none": torch.ones_like, "silu": F.silu, "sigmoid": torch.sigmoid}


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(device, inputs, factor, activation, dtype=torch.float32, tolerance=1e-6):
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    x = leaves["x"]
    expected = x / (factor * x.square().sum(-1, keepdim=True) + 1e-6).sqrt() * leaves.get("weight", 1.0)
    expected = expected * FUNCTIONS[activation](leaves.get("gate", x.detach()))
    cotangent = randn(*expected.shape, seed=9).to(dtype).double()
    expected = [expected, *torch.autograd.grad(expected, list(leaves.values()), cotangent)]
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
    y = gated_rms_norm(leaves["x"], leaves.get("weight"), leaves.get("gate"), factor, 1e-6, activation)
    found = [y, *torch.autograd.grad(y, list(leaves.values()), cotangent.to(device, dtype))]
    for name, x, reference in zip(("y", *inputs), found, expected, strict=True):
        assert x.dtype is dtype
        error = (x.cpu().double() - reference).norm()
        assert error <= tolerance * reference.norm(), f"{name}: {error / reference.norm():.1e}"


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("shape", [(1, 3), (3, 5, 16), (2, 7, 3, 40), (2, 300)])
def test_widths_and_gates(shape, activation, device):
    inputs = dict(x=randn(*shape), weight=randn(shape[-1], seed=1))
    if activation != "none":
        inputs["gate"] = randn(*shape, seed=2)
    check(device, inputs, 1 / shape[-1], activation)


@pytest.mark.parametrize(("shape", "programs"), [((2, 3), 1024), ((2, 9, 3, 40), 1024), ((85, 2, 16), 5)])
def test_weights_of_groups(shape, programs, device, monkeypatch):
    monkeypatch.setattr("torchlmoe.kernels.gated_rms_norm.MOST_PROGRAMS", programs)
    inputs = dict(x=randn(*shape), weight=randn(*shape[-2:], seed=1))
    check(device, inputs, 1 / shape[-1], "none")
    check(device, inputs | dict(gate=randn(*shape, seed=2)), 1 / shape[-1], "silu")


@pytest.mark.parametrize("factor", [1.0, 1 / 24])
def test_without_weight(factor, device):
    check(device, dict(x=randn(4, 24)), factor, "none")
    check(device, dict(x=randn(4, 24), gate=randn(4, 24, seed=2)), factor, "silu")


def test_more_rows_than_programs(device, monkeypatch):
    """A program takes several tiles, and the weight's gradient is that of all of them."""
    monkeypatch.setattr("torchlmoe.kernels.gated_rms_norm.MOST_PROGRAMS", 2)
    check(device, dict(x=randn(85, 16), weight=randn(16, seed=1), gate=randn(85, 16, seed=2)), 1 / 16, "sigmoid")


def test_half(device, half):
    inputs = dict(x=randn(5, 40), weight=randn(40, seed=1), gate=randn(5, 40, seed=2))
    inputs = {name: x.to(half).double() for name, x in inputs.items()}
    check(device, inputs, 1 / 40, "silu", half, 2 * torch.finfo(half).eps)


def test_zero_rows_and_no_rows(device):
    x = torch.zeros(2, 8, device=device, requires_grad=True)
    y = gated_rms_norm(x, None, None, 1.0, 1e-6, "none")
    assert not y.any()
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()
    none = torch.zeros(0, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    y = gated_rms_norm(none, weight, None, 1.0, 1e-6, "none")
    dx, dweight = torch.autograd.grad(y.sum(), (none, weight))
    assert y.shape == dx.shape == none.shape
    assert not dweight.any()


def test_strides(device):
    wide = torch.full((3, 5, 2, 20), torch.nan, device=device)
    x = wide[:, :, 1, 2:18].copy_(randn(3, 5, 16)).detach().requires_grad_()
    gate = randn(3, 16, 5, seed=2).float().to(device).mT
    y = gated_rms_norm(x, None, gate, 1 / 16, 1e-6, "silu")
    torch.testing.assert_close(y, F.rms_norm(x, (16,), None, 1e-6) * F.silu(gate))
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


def test_refusal(device):
    x = torch.ones(2, 4, device=device)
    with pytest.raises(ValueError, match="activation = 'silu' must be 'silu' or 'sigmoid' with a gate, 'none' without"):
        gated_rms_norm(x, None, None, 1.0, 1e-6, "silu")
    with pytest.raises(ValueError, match=r"weight must have the shape of x's last dims; got \[4, 2\] and \[2, 4\]"):
        gated_rms_norm(x, torch.ones(4, 2, device=device), None, 1.0, 1e-6, "none")


def test_registered_operation(device):
    leaves = [randn(*shape).float().to(device).requires_grad_() for shape in ((2, 3, 8), (8,), (2, 3, 8))]
    torch.library.opcheck(
        torch.ops.torchlmoe.gated_rms_norm_triton.default,
        (*leaves, 1 / 8, 1e-6, "silu"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_modules_take_it(device, monkeypatch):
    """On a GPU all norms run this operation and get what they get on a CPU."""
    modules = [
        norms.RMSNorm(8),
        norms.RMSNorm(8, zero_centered=True),
        norms.GatedRMSNorm(8),
        norms.GatedRMSNorm(8, zero_centered=True),
        norms.GatedRMSNorm(8, activation=torch.sigmoid),
        norms.GatedRMSNorm(8, activation=torch.tanh),
        group_norms.GroupRMSNorm(8, 2),
    ]
    x, gate = randn(3, 8).float(), randn(3, 8, seed=2).float()

    def run(device):
        given = x.to(device), gate.to(device)
        results = [norms.l2_norm(given[0])]
        for module in modules:
            module.to(device).weight.data.copy_(randn(8, seed=3))
            results.append(module(*given) if isinstance(module, norms.GatedRMSNorm) else module(given[0]))
        return [result.cpu() for result in results]

    expected, calls = run("cpu"), []
    operation = torch.ops.torchlmoe.gated_rms_norm_triton
    monkeypatch.setattr("torchlmoe.layers.norms.kernels_serve", lambda *_: True)
    monkeypatch.setattr(
        "torchlmoe.kernels.gated_rms_norm.gated_rms_norm", lambda *args: (calls.append(args[-1]), operation(*args))[1]
    )
    torch.testing.assert_close(run(device), expected)
    assert calls == ["none", "none", "none", "silu", "silu", "sigmoid", "none", "none"]
