"""Mini-batches in their dual form against the token loop in float64, and that against autograd of the inner loss."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.ops import online_gradient
from torchlmoe.ops.mini_batches import norm_gradient, normed

TERMS = {
    "plain": (),
    "ttt": ("step_scale",),
    "decay": ("log_decay",),
    "momentum": ("log_momentum",),
    "titans": ("log_decay", "log_momentum"),
    "decay_and_scale": ("log_decay", "step_scale"),
    "momentum_and_scale": ("log_momentum", "step_scale"),
}
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 300]  # the last is longer than a span of mini-batches
DOCUMENTS = [0, 0, 1, 2, 66, 66, 67, 190, 200, 200]  # empty, one-token, and longer ones
# Decays of -30 wipe the weights out, and the layer norm of next to nothing magnifies rounding by 1 / sqrt(eps), in the
# token loop as well: with 1e-4, that loop in float32 misses the limits of float32 for one seed in five.
NORM_EPS, FLOAT32_NORM_EPS = 1e-4, 0.1
NOT_PER_TOKEN = {"norm_weight", "norm_bias", "step_scale", "initial_state"}


def make_inputs(terms, batch_size, length, *, heads=2, key_dim=5, value_dim=4, num_states=None):
    """Float64 inputs with zero keys, and gates of 0, -30 and ordinary mixed in one tensor."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def mixed(*shape):
        kind = torch.rand(*shape, generator=generator)
        ordinary = -torch.rand(*shape, dtype=torch.float64, generator=generator)
        return torch.where(kind < 0.1, 0.0, torch.where(kind < 0.2, -30.0, ordinary))

    tokens, parts = (batch_size, length, heads), 3 if "log_momentum" in terms else 2
    inputs = dict(
        q=randn(*tokens, key_dim),
        k=F.normalize(randn(*tokens, key_dim), dim=-1) * (torch.rand(*tokens, 1, generator=generator) > 0.1),
        v=randn(*tokens, value_dim),
        learning_rate=torch.rand(*tokens, dtype=torch.float64, generator=generator) * 0.2,
        norm_weight=1 + 0.2 * randn(heads, value_dim),
        norm_bias=0.2 * randn(heads, value_dim),
        **{name: mixed(*tokens) for name in terms if name != "step_scale"},
        initial_state=randn(num_states or batch_size, heads, parts, key_dim, value_dim),
    )
    if "step_scale" in terms:
        inputs["step_scale"] = torch.rand(
            heads if "log_decay" in terms else 1, 16, dtype=torch.float64, generator=generator
        )
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def run(inputs, dtype=torch.float64, norm_eps=NORM_EPS, **options):
    """Output, final state and the gradient of every input, for a fixed random cotangent."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    o, state = online_gradient(**leaves, norm_eps=norm_eps, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype)).sum() for x in (o, state)
    )
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o, "final_state": state, **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def assert_close(found, expected, tolerance, gradient_tolerance=None):
    for name, reference in expected.items():
        limit = gradient_tolerance or tolerance if name.startswith("d") else tolerance
        error = (found[name].double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)
        assert torch.isfinite(found[name]).all(), name
        assert error <= limit, f"{name}: {error:.2e} > {limit:.0e}"


def assert_equals_token_loop(inputs, **options):
    """In float64 and in float32. Returns the results of the loop in float64."""
    expected = run(inputs, backend="reference", **options)
    assert_close(run(inputs, **options), expected, 1e-9)
    of_float32 = run(inputs, norm_eps=FLOAT32_NORM_EPS, backend="reference", **options)
    assert_close(run(inputs, torch.float32, FLOAT32_NORM_EPS, **options), of_float32, 1e-5, 1e-4)
    return expected


@pytest.mark.parametrize("terms", TERMS)
def test_descends_the_inner_loss(terms):
    """The token loop, with gradients that autograd takes of the loss as the papers write it."""
    inputs = {name: x.detach() for name, x in make_inputs(TERMS[terms], 1, 21, heads=1).items()}
    inputs["initial_state"][:, :, 1] = inputs["initial_state"][:, :, 0]
    scale = torch.ones(4, dtype=torch.float64)
    if "step_scale" in inputs:
        inputs["step_scale"] = inputs["step_scale"][:, :4]
        scale = inputs["step_scale"][0]
    o, final = online_gradient(**inputs, mini_batch_size=4, output_final_state=True, backend="reference")
    row = {name: x[0, :, 0] for name, x in inputs.items() if name not in NOT_PER_TOKEN}
    weights, momentum = inputs["initial_state"][0, 0, 1], torch.zeros(5, 4, dtype=torch.float64)
    if "log_momentum" in TERMS[terms]:
        momentum = inputs["initial_state"][0, 0, 2]
    read = weights
    for t in range(21):
        if t % 4 == 0:
            weights = read
            anchor = weights.clone().requires_grad_()
        normed = F.layer_norm(row["k"][t] @ anchor, (4,), inputs["norm_weight"][0], inputs["norm_bias"][0], 1e-6)
        (gradient,) = torch.autograd.grad((normed - row["v"][t]).square().sum() / 2, anchor)
        kept = row["log_momentum"][t].exp() if "log_momentum" in row else 0.0
        momentum = kept * momentum - row["learning_rate"][t] * gradient
        weights = (row["log_decay"][t].exp() if "log_decay" in row else 1.0) * weights + momentum
        read = (1 - scale[t % 4]) * anchor.detach() + scale[t % 4] * weights
        torch.testing.assert_close(o[0, t, 0], row["q"][t] @ read, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(final[0, 0, :2], torch.stack([anchor, weights]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_dual_form_equals_token_loop(terms, length):
    inputs = make_inputs(TERMS[terms], 3 if length < 63 else 1, length)
    assert_equals_token_loop(inputs)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("with_offset", [False, True])
def test_packed_documents(terms, with_offset):
    """Packed = each document alone, states included; empty documents hand their state on, in mid mini-batch too."""
    bounds = torch.tensor(DOCUMENTS, dtype=torch.int32)
    offset = torch.tensor([0, 3, 15, 4, 2, 0, 13, 6, 9]) if with_offset else None
    inputs = make_inputs(TERMS[terms], 1, DOCUMENTS[-1], num_states=len(DOCUMENTS) - 1)
    expected = assert_equals_token_loop(inputs, cu_seqlens=bounds, offset=offset)
    for document, (start, end) in enumerate(itertools.pairwise(DOCUMENTS)):
        alone = piece(inputs, start, end) | {"initial_state": inputs["initial_state"][document : document + 1]}
        own_offset = None if offset is None else offset[document : document + 1]
        o, state = online_gradient(**alone, norm_eps=NORM_EPS, output_final_state=True, offset=own_offset)
        torch.testing.assert_close(o, expected["o"][:, start:end], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state[0], expected["final_state"][document], rtol=1e-9, atol=1e-9)


def piece(inputs, start, end):
    return {name: x if name in NOT_PER_TOKEN else x[:, start:end] for name, x in inputs.items()}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("split", [1, 15, 16, 17, 64, 100])
def test_prefill_then_decode(terms, split):
    """Any split into a prefix, and token-by-token steps after it, gives the whole."""
    inputs = {name: x.detach() for name, x in make_inputs(TERMS[terms], 2, 130).items()}
    expected, last = online_gradient(**inputs, output_final_state=True, backend="reference")
    state, pieces = inputs.pop("initial_state"), []
    for start, end in [(0, split), *((t, t + 1) for t in range(split, split + 18)), (split + 18, 130)]:
        offset = torch.full((2,), start % 16)
        o, state = online_gradient(
            **piece(inputs, start, end), initial_state=state, offset=offset, output_final_state=True
        )
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("terms", TERMS)
def test_registered_operation(terms):
    """torch's own checks of a custom operation."""
    inputs = make_inputs(TERMS[terms], 2, 40)
    order = (
        "q", "k", "v", "learning_rate", "norm_weight", "norm_bias", "log_decay", "log_momentum", "step_scale",
        "initial_state",
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.torchlmoe.online_gradient.default,
        (*[inputs.get(name) for name in order], 1e-6, 16, None, None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_no_documents(backend):
    inputs = make_inputs((), 1, 0)
    inputs["initial_state"] = inputs["initial_state"][:0]
    none = torch.zeros(1, dtype=torch.int32)
    o, state = online_gradient(**inputs, output_final_state=True, cu_seqlens=none, backend=backend)
    assert o.shape == inputs["v"].shape
    assert state.shape == inputs["initial_state"].shape


def test_low_precision_inputs():
    """bfloat16 in and out, the state in float32 within."""
    inputs = {name: x.detach().to(torch.bfloat16) for name, x in make_inputs(TERMS["titans"], 1, 70).items()}
    expected = run(inputs, backend="reference")
    found = run(inputs, torch.bfloat16)
    assert found["o"].dtype is torch.bfloat16
    assert found["final_state"].dtype is torch.float32
    assert_close(found, expected, 1e-2)


def test_norm_of_rows_with_a_large_mean():
    """The layer norm of the inner loss keeps its digits in float32 if a mean is 300 times the deviation."""
    z = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) + 300
    unit, *norm = normed(z, NORM_EPS)
    exact = z.double().requires_grad_()
    expected = F.layer_norm(exact, (32,), eps=NORM_EPS)
    grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    expected.backward(grad.double())
    found = {"unit": unit, "gradient": norm_gradient(grad, *norm)}
    assert_close(found, {"unit": expected.detach(), "gradient": exact.grad}, 1e-6)


def test_refusals():
    inputs = {name: x.detach() for name, x in make_inputs(TERMS["plain"], 1, 8).items()}
    with pytest.raises(ValueError, match="backend = 'triton' is not supported"):
        online_gradient(**inputs, backend="triton")
    with pytest.raises(ValueError, match="mini_batch_size = 0 must be at least 1"):
        online_gradient(**inputs, mini_batch_size=0)
    with pytest.raises(ValueError, match=r"learning_rate has shape \[1, 8\]"):
        online_gradient(**(inputs | {"learning_rate": torch.zeros(1, 8)}))
    with pytest.raises(ValueError, match=r"step_scale has shape \[2, 8\]; .* it must be \[2, 16\]"):
        online_gradient(**(inputs | {"step_scale": torch.zeros(2, 8)}))
    with pytest.raises(ValueError, match=r"initial_state has shape .* it must be \[1, 2, 3, 5, 4\]"):
        online_gradient(**inputs, log_momentum=torch.zeros(1, 8, 2))
    with pytest.raises(ValueError, match="must be int32"):
        online_gradient(**inputs, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="must be int32"):
        online_gradient(**inputs, cu_seqlens=torch.tensor([], dtype=torch.int32))
    for backend in ("chunked", "reference"):
        with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 8"):
            online_gradient(**inputs, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32), backend=backend)
