"""The chunked form and the span summary against the token loop in float64, over awkward shapes and extreme gates."""

import itertools
import sys

import pytest
import torch

from torchlmoe.ops import elementwise_recurrence, elementwise_span_summary

# What the decay, and q and k, are: constant or varying over tokens, real or complex.
FORMS = {
    "selective": dict(decay="step", qk="token"),  # Mamba
    "full": dict(decay="token", qk="token"),  # fully gated fast weights, HGRN
    "constant": dict(decay="constant", qk="constant", dtype=torch.complex128),
    "constant_of_one_value": dict(decay="constant", qk="constant", dtype=torch.complex128, value_dim=1),  # S4
    "complex_selective": dict(decay="step", qk="token", dtype=torch.complex128),
    "complex_decay_real_keys": dict(decay="constant", qk="token"),
    # Those that are convolutions, taken as such whatever their length.
    "convolved": dict(decay="constant", qk="constant", dtype=torch.complex128),
    "convolved_of_one_value": dict(decay="constant", qk="constant", dtype=torch.complex128, value_dim=1),
    "convolved_real": dict(decay="real", qk="constant"),
    "convolved_real_keys": dict(decay="constant", qk="constant"),
}
LENGTHS = [1, 2, 63, 64, 65, 200]
DOCUMENTS = [0, 0, 1, 2, 66, 66, 67, 190, 200, 200]  # empty, one-token, and longer ones
PER_TOKEN = {"v", "step", "q", "k", "log_decay"}


@pytest.fixture(autouse=True)
def convolve_any_length(request, monkeypatch):
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and "convolved" in parameters.params.get("form", ""):
        monkeypatch.setattr(sys.modules["torchlmoe.ops.elementwise_recurrence"], "MIN_CONVOLVED", 1)


def make_inputs(form, batch_size, length, *, heads=2, key_dim=5, num_states=None):
    """Float64 inputs with zero keys and gates of 0, -30 and ordinary mixed in one tensor."""
    generator = torch.Generator().manual_seed(0)
    number, value_dim = form.get("dtype", torch.float64), form.get("value_dim", 3)

    def randn(*shape, dtype=torch.float64):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    def mixed(x):
        kind = torch.rand(x.shape, generator=generator)
        return torch.where(kind < 0.1, 0.0, torch.where(kind < 0.2, 30.0, x))

    def rates(*shape):
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    tokens, matrix = (batch_size, length), (heads, key_dim, value_dim)
    qk_shape = (heads, key_dim) if form["qk"] == "constant" else (*tokens, heads, key_dim)
    inputs = dict(
        q=randn(*qk_shape, dtype=number), k=randn(*qk_shape, dtype=number), v=randn(*tokens, heads, value_dim)
    )
    if form["qk"] == "token":
        inputs["k"] = inputs["k"] * (torch.rand(*tokens, heads, 1, generator=generator) > 0.1)
    if form["decay"] == "step":
        inputs["log_decay"], inputs["step"] = -rates(*matrix), mixed(rates(*tokens, heads, value_dim))
    else:
        inputs["log_decay"] = -mixed(rates(*(tokens if form["decay"] == "token" else ()), *matrix))
    if number.is_complex or form["decay"] == "constant":
        inputs["log_decay"] = torch.complex(inputs["log_decay"], randn(*inputs["log_decay"].shape))
    state_dtype = inputs["log_decay"].dtype
    inputs["initial_state"] = randn(num_states or batch_size, *matrix, dtype=state_dtype)
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def single(x):
    return x.detach().to(torch.complex64 if x.is_complex() else torch.float32)


def run(inputs, **options):
    """Output, final state and the gradient of every input, for a fixed random cotangent."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    o, state = elementwise_recurrence(**leaves, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    parts = [torch.view_as_real(x) if x.is_complex() else x for x in (o, state)]
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in parts)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o, "final_state": state, **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def assert_close(found, expected, tolerance, gradient_tolerance=None):
    for name, reference in expected.items():
        limit = gradient_tolerance or tolerance if name.startswith("d") else tolerance
        error = (found[name].to(reference.dtype) - reference).norm() / reference.norm().clamp_min(1e-30)
        assert torch.isfinite(torch.view_as_real(found[name]) if found[name].is_complex() else found[name]).all(), name
        assert error <= limit, f"{name}: {error:.2e} > {limit:.0e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_token_loop(form, length):
    inputs = make_inputs(FORMS[form], 3 if length < 64 else 1, length)
    expected = run(inputs, backend="reference")
    assert_close(run(inputs), expected, 1e-9)
    assert_close(run({name: single(x) for name, x in inputs.items()}), expected, 1e-5, 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents(form):
    """Packed = each document alone, states included; empty documents hand their state on."""
    bounds = torch.tensor(DOCUMENTS, dtype=torch.int32)
    inputs = make_inputs(FORMS[form], 1, DOCUMENTS[-1], num_states=len(DOCUMENTS) - 1)
    expected = run(inputs, backend="reference", cu_seqlens=bounds)
    assert_close(run(inputs, cu_seqlens=bounds), expected, 1e-9)
    assert_close(run({name: single(x) for name, x in inputs.items()}, cu_seqlens=bounds), expected, 1e-5, 1e-4)
    for document, (start, end) in enumerate(itertools.pairwise(DOCUMENTS)):
        alone = piece(inputs, start, end) | {"initial_state": inputs["initial_state"][document : document + 1]}
        o, state = elementwise_recurrence(**alone, output_final_state=True)
        torch.testing.assert_close(o, expected["o"][:, start:end], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state[0], expected["final_state"][document], rtol=1e-9, atol=1e-9)


def piece(inputs, start, end):
    length = inputs["v"].shape[1]
    return {
        name: x[:, start:end] if name in PER_TOKEN and x.dim() >= 4 and x.shape[1] == length else x
        for name, x in inputs.items()
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [1, 63, 64, 100])
def test_prefill_then_decode(form, split):
    """Any split into a prefix, and token-by-token steps after it, gives the whole."""
    inputs = {name: x.detach() for name, x in make_inputs(FORMS[form], 2, 130).items()}
    expected, last = elementwise_recurrence(**inputs, output_final_state=True, backend="reference")
    state, pieces = inputs.pop("initial_state"), []
    for start, end in [(0, split), *((t, t + 1) for t in range(split, split + 5)), (split + 5, 130)]:
        o, state = elementwise_recurrence(**piece(inputs, start, end), initial_state=state, output_final_state=True)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_span_summary(form, backend):
    """S_out = transition * S_in + state, for every packed document, and differentiable."""
    bounds = torch.tensor(DOCUMENTS, dtype=torch.int32)
    inputs = make_inputs(FORMS[form], 1, DOCUMENTS[-1], num_states=len(DOCUMENTS) - 1)
    q, incoming = inputs.pop("q"), inputs.pop("initial_state")
    transition, state = elementwise_span_summary(**inputs, cu_seqlens=bounds, backend=backend)
    found_state = transition * incoming + state
    _, expected = elementwise_recurrence(
        q, **inputs, initial_state=incoming, output_final_state=True, cu_seqlens=bounds, backend="reference"
    )
    torch.testing.assert_close(found_state, expected, rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(found_state.abs().square().sum(), list(inputs.values()))
    wanted = torch.autograd.grad(expected.abs().square().sum(), list(inputs.values()))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_registered_operation(form):
    """torch's own checks of a custom operation."""
    inputs = make_inputs(FORMS[form], 2, 40)
    order = ("q", "k", "v", "log_decay", "step", "initial_state")
    torch.library.opcheck(
        torch.ops.torchlmoe.elementwise_recurrence.default,
        (*[inputs.get(name) for name in order], None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_gates_without_decay_or_memory():
    """G = 0 is a cumulative sum, G = -inf no memory at all."""
    v = torch.randn(1, 70, 1, 4, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    zero = torch.zeros(1, 1, 4, dtype=torch.float64)
    torch.testing.assert_close(elementwise_recurrence(one, one, v, log_decay=zero)[0], v.cumsum(1))
    torch.testing.assert_close(elementwise_recurrence(one, one, v, log_decay=zero - torch.inf)[0], v)
    bounds = torch.tensor([0, 0, 70], dtype=torch.int32)
    transition, _ = elementwise_span_summary(one, v, log_decay=zero - torch.inf, cu_seqlens=bounds)
    torch.testing.assert_close(transition, torch.stack([zero + 1, zero]))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_no_documents(backend):
    inputs = make_inputs(FORMS["selective"], 1, 0)
    inputs["initial_state"] = inputs["initial_state"][:0]
    none = torch.zeros(1, dtype=torch.int32)
    o, state = elementwise_recurrence(**inputs, output_final_state=True, cu_seqlens=none, backend=backend)
    assert o.shape == inputs["v"].shape
    assert state.shape == inputs["initial_state"].shape


def test_low_precision_inputs():
    """bfloat16 in and out, the state in float32 within."""
    inputs = {name: x.detach().to(torch.bfloat16) for name, x in make_inputs(FORMS["selective"], 1, 130).items()}
    expected = run({name: x.double() for name, x in inputs.items()}, backend="reference")
    found = run(inputs)
    assert found["o"].dtype is torch.bfloat16
    assert found["final_state"].dtype is torch.float32
    assert_close(found, expected, 1e-2)


def test_refusals():
    inputs = {name: x.detach() for name, x in make_inputs(FORMS["selective"], 1, 8).items()}
    with pytest.raises(ValueError, match=r"backend = 'fast' is not supported by .* 'triton' or 'reference'"):
        elementwise_recurrence(**inputs, backend="fast")
    with pytest.raises(ValueError, match=r"backend = 'triton' is not available here, since .* float64"):
        elementwise_recurrence(**inputs, backend="triton")
    with pytest.raises(ValueError, match=r"log_decay has shape \[2, 5\]"):
        elementwise_recurrence(**(inputs | {"log_decay": torch.zeros(2, 5)}))
    with pytest.raises(ValueError, match=r"log_decay has shape \[1, 8, 2, 5, 3\].* it must be \[2, 5, 3\]\."):
        elementwise_recurrence(**(inputs | {"log_decay": torch.zeros(1, 8, 2, 5, 3)}))
    with pytest.raises(ValueError, match="real floating-point"):
        elementwise_recurrence(**(inputs | {"v": inputs["v"].to(torch.complex128)}))
    with pytest.raises(ValueError, match="must be int32"):
        elementwise_recurrence(**inputs, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="must be int32"):
        elementwise_recurrence(**inputs, cu_seqlens=torch.tensor([], dtype=torch.int32))
    for backend in ("chunked", "reference"):
        with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 8"):
            elementwise_recurrence(**inputs, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32), backend=backend)


@pytest.mark.parametrize("backend", ["chunked", "reference", "triton"])
@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_no_heads_keys_or_values_are_refused(heads, key_dim, value_dim, backend):
    form = FORMS["selective"] | dict(value_dim=value_dim)
    inputs = {name: x.detach() for name, x in make_inputs(form, 1, 8, heads=heads, key_dim=key_dim).items()}
    with pytest.raises(ValueError, match="must have at least one head, one key and one value"):
        elementwise_recurrence(**inputs, backend=backend)
    del inputs["q"], inputs["initial_state"]
    with pytest.raises(ValueError, match="must have at least one head, one key and one value"):
        elementwise_span_summary(**inputs, backend=backend)
