"""causal_conv against torch's conv1d, one document at a time, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.ops.causal_conv import causal_conv

DOCUMENTS = {
    "one": [0, 13],
    "several": [0, 4, 13],
    "awkward": [
        0,
        0,
        1,
        2,
        2,
        5,
        12,
        13,
        13,
    ],  # empty ones at both ends and within, one-token ones, shorter than width
    "single_tokens": [0, 1, 2, 3],
}


def make_inputs(batch_size, length, width, channels=3):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x, weight, grad = (
        randn(batch_size, length, channels),
        randn(channels, width),
        randn(batch_size, length, channels),
    )
    return x.requires_grad_(), weight.requires_grad_(), grad


def conv1d_per_document(x, weight, bounds, activation):
    width, outputs = weight.shape[1], []
    for start, end in itertools.pairwise(bounds):
        if end > start:
            padded = F.pad(x[:, start:end].mT, (width - 1, 0))
            outputs.append(F.conv1d(padded, weight[:, None], groups=weight.shape[0]).mT)
    y = torch.cat(outputs, 1)
    return F.silu(y) if activation else y


def assert_matches(inputs, bounds, activation, cu_seqlens):
    x, weight, grad = inputs
    y = causal_conv(x, weight, cu_seqlens=cu_seqlens, activation=activation)
    expected = conv1d_per_document(x, weight, bounds, activation)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(y, (x, weight), grad)
    wanted = torch.autograd.grad(expected, (x, weight), grad)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 13])
def test_rows(length, width, activation):
    """Rows shorter than the filter included."""
    assert_matches(make_inputs(2, length, width), [0, length], activation, None)


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_packed_documents(documents, width, activation):
    bounds = DOCUMENTS[documents]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    assert_matches(make_inputs(1, bounds[-1], width), bounds, activation, cu_seqlens)


def test_documents_do_not_meet():
    """Another document's values leave no trace, not even a NaN or a rounding error, forward or backward."""
    cu_seqlens = torch.tensor([0, 5, 9], dtype=torch.int32)
    x, weight, grad = make_inputs(1, 9, 4)
    y = causal_conv(x, weight, cu_seqlens=cu_seqlens)
    (dx,) = torch.autograd.grad(y, x, grad)
    poisoned = x.detach().clone()
    poisoned[:, :5] = torch.nan
    poisoned.requires_grad_()
    y_poisoned = causal_conv(poisoned, weight, cu_seqlens=cu_seqlens)
    (dx_poisoned,) = torch.autograd.grad(y_poisoned, poisoned, grad)
    assert torch.equal(y_poisoned[:, 5:], y[:, 5:])
    assert torch.equal(dx_poisoned[:, 5:], dx[:, 5:])


def test_no_tokens():
    x, weight, _ = make_inputs(1, 0, 4)
    y = causal_conv(x, weight, cu_seqlens=torch.zeros(2, dtype=torch.int32))
    assert y.shape == x.shape
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape
    assert not dweight.any()


@pytest.mark.parametrize("bounds", [None, [0, 0, 1, 6, 13]])
def test_finite_differences(bounds):
    x, weight, _ = make_inputs(1, 13, 3, channels=2)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    torch.autograd.gradcheck(lambda x, weight: causal_conv(x, weight, cu_seqlens=cu_seqlens), (x, weight))


@pytest.mark.parametrize("bounds", [None, [0, 0, 1, 6, 13]])
def test_registered_operation(bounds):
    x, weight, _ = make_inputs(1, 13, 4)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.torchlmoe.causal_conv.default,
        (x, weight, cu_seqlens, True),
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_dynamic",
        ),
    )


@pytest.mark.parametrize("bounds", [None, [0, 5, 64]])
def test_bfloat16_is_rounded_once(bounds):
    """Forward and backward, at documents' edges too."""
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    x, weight, grad = (tensor.detach().bfloat16() for tensor in make_inputs(1, 64, 4))
    results = []
    for leaves in ([x, weight], [x.double(), weight.double()]):
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = causal_conv(*leaves, cu_seqlens=cu_seqlens, activation=False)
        results.append([y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
    for found, expected in zip(*results, strict=True):
        assert ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype, tolerance):
    x, weight, grad = (tensor.detach().to(dtype) for tensor in make_inputs(2, 64, 4))
    results = []
    for leaves in ([x, weight], [x.double(), weight.double()]):
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = causal_conv(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
    for found, expected in zip(*results, strict=True):
        assert found.dtype is dtype
        assert (found.double() - expected).norm() <= tolerance * expected.norm()
