"""The Triton convolution against torch's conv1d, one document at a time, in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.test_causal_conv import DOCUMENTS, conv1d_per_document
from torchlmoe.kernels.causal_conv import causal_conv
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.layers.short_convolution import ShortConvolution


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_inputs(batch_size, length, width, channels, with_bias=True):
    inputs = dict(x=randn(batch_size, length, channels), weight=randn(channels, width, seed=1))
    return inputs | (dict(bias=randn(channels, seed=2)) if with_bias else {})


def expected_of(inputs, bounds, activation):
    total = conv1d_per_document(inputs["x"], inputs["weight"], bounds, False)
    total = total if "bias" not in inputs else total + inputs["bias"]
    return F.silu(total) if activation else total


def check(device, inputs, wanted, cu_seqlens=None, activation=True, dtype=torch.float32, tolerance=1e-5):
    """Output and gradients against those of `wanted`, a function of the inputs."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    expected = wanted(leaves)
    cotangent = randn(*expected.shape, seed=9)
    expected = [expected, *torch.autograd.grad(expected, list(leaves.values()), cotangent)]
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
    bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    y = causal_conv(leaves["x"], leaves["weight"], leaves.get("bias"), leaves.get("state"), bounds, activation)
    found = [y, *torch.autograd.grad(y, list(leaves.values()), cotangent.to(device, dtype))]
    for name, x, reference in zip(("y", *inputs), found, expected, strict=True):
        assert x.dtype is dtype
        error = (x.cpu().double() - reference).norm()
        assert error <= tolerance * reference.norm(), f"{name}: {error / reference.norm():.1e}"


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("length", [1, 3, 16, 40])
def test_rows(length, activation, device):
    """Rows shorter than the filter, and tiles that are not full, included."""
    inputs = make_inputs(2, length, 4, 19)
    check(device, inputs, lambda leaves: expected_of(leaves, [0, length], activation), activation=activation)


@pytest.mark.parametrize("width", [1, 3, 7])
def test_widths(width, device):
    inputs = make_inputs(1, 20, width, 5, with_bias=False)
    check(device, inputs, lambda leaves: expected_of(leaves, [0, 20], True))


@pytest.mark.parametrize("documents", [*DOCUMENTS.values(), [0, 3, 15, 16, 17, 17, 50]])
def test_packed_documents(documents, device):
    inputs = make_inputs(1, documents[-1], 4, 5)
    check(device, inputs, lambda leaves: expected_of(leaves, documents, True), cu_seqlens=documents)


def test_bounds_that_are_not_side_by_side(device):
    x, weight = randn(1, 10, 5).float().to(device), randn(5, 4, seed=1).float().to(device)
    bounds = torch.tensor([0, 99, 5, 99, 10, 99], dtype=torch.int32, device=device)[::2]
    expected = causal_conv(x, weight, None, None, bounds.contiguous(), False)
    assert torch.equal(causal_conv(x, weight, None, None, bounds, False), expected)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("length", [1, 2, 20])
def test_state(length, width, device):
    """The inputs before a row, and their gradient."""
    inputs = make_inputs(2, length, width, 5) | dict(state=randn(2, width - 1, 5, seed=3))

    def wanted(leaves):
        extended = leaves | dict(x=torch.cat([leaves["state"], leaves["x"]], 1))
        return expected_of(extended, [0, length + width - 1], True)[:, width - 1 :]

    check(device, inputs, wanted)


def test_half(device, half):
    inputs = {name: x.to(half).double() for name, x in make_inputs(2, 20, 4, 5).items()}
    tolerance = 2 * torch.finfo(half).eps
    check(device, inputs, lambda x: expected_of(x, [0, 20], True), dtype=half, tolerance=tolerance)


def test_documents_do_not_meet(device):
    """Another document's values leave no trace, not even a NaN or a rounding error, forward or backward."""
    bounds = torch.tensor([0, 5, 9], dtype=torch.int32, device=device)
    x, weight = randn(1, 9, 3).float().to(device), randn(3, 4, seed=1).float().to(device)
    results = []
    for first in (0.0, torch.nan):
        given = x.clone()
        given[:, :5] += first
        given.requires_grad_()
        y = causal_conv(given, weight, None, None, bounds, True)
        results.append((y[:, 5:], torch.autograd.grad(y[:, 5:].sum(), given)[0][:, 5:]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_strides(device):
    """Channels of a wider tensor, whatever lies between rows; an expanded gradient."""
    wide = torch.full((2, 30, 12), torch.nan, device=device)
    x = wide[:, 3:20, 2:7].copy_(randn(2, 17, 5)).detach().requires_grad_()
    weight = randn(5, 4, seed=1).float().to(device)
    packed = x.detach().clone().requires_grad_()
    y, expected = (causal_conv(x, weight, None, None, None, True) for x in (x, packed))
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    found, wanted = torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), packed)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_registered_operation(device):
    inputs = make_inputs(2, 3, 3, 5) | dict(state=randn(2, 2, 5, seed=3))
    leaves = [x.float().to(device).requires_grad_() for x in inputs.values()]
    torch.library.opcheck(
        torch.ops.torchlmoe.causal_conv_triton.default,
        (*leaves, None, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("bias", [True, False])
def test_module_takes_it(bias, device, monkeypatch):
    """On a GPU the module runs this operation, with and without a cache, and gets what it gets on a CPU."""
    module = ShortConvolution(6, 4, bias=bias)
    module.init_weights()

    def run(device):
        x, bounds = randn(1, 9, 6).float().to(device), torch.tensor([[0, 4, 9]], dtype=torch.int32, device=device)
        sequence, row = SequenceLayout.of_packed_rows(bounds, 9), SequenceLayout.of_rows(1, 9, device)
        cache = module.to(device).init_cache(1, torch.float32, device)
        parts = zip(*(each.split([1, 2, 5, 1], 1) for each in (x, row.positions)), strict=True)
        pieces = [module(part, sequence=SequenceLayout(positions), cache=cache) for part, positions in parts]
        results = module(x, sequence=sequence), module(x, sequence=row), torch.cat(pieces, 1), cache["inputs"]
        return [result.cpu() for result in results]

    expected = run("cpu")
    torch.testing.assert_close(expected[2], expected[1])
    monkeypatch.setattr("torchlmoe.ops.causal_conv.kernels_serve", lambda *_: True)
    torch.testing.assert_close(run(device), expected)
