"""The kernels of the linear recurrence against the token loop in float64: every term, awkward shapes, both dtypes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.model.test_decoder import BOUNDS, build, tokens
from tests.ops.test_linear_recurrence import STRONG_GATES, TENSORS, TERMS, assert_close, make_inputs, run
from torchlmoe.ops import kernel_backend, linear_recurrence, span_summary

DOCUMENTS = [0, 0, 1, 2, 67, 67, 131]  # empty, one-token, of a chunk and one, of a chunk
WIDTHS = dict(key_dim=40, value_dim=72)  # tiles that are not full, several of them


def on(device, inputs, dtype=torch.float32):
    return {name: x.detach().to(device, dtype) for name, x in inputs.items()}


def check(inputs, device, **options):
    """In float32: outputs, final state and all gradients."""
    expected = run(inputs, backend="reference", **options)
    options = {name: x.to(device) for name, x in options.items()}
    found = run_on(on(device, inputs), **options)
    assert_close({name: x.cpu() for name, x in found.items()}, expected, 1e-5, 1e-4)


def run_on(inputs, backend="triton", **options):
    return run(inputs, inputs["v"].dtype, backend=backend, **options)


# What each of the others has a part of is in one of these; the rest is long.
COMBINED = ("none", "scalar", "channel_value_bonus", "head_bonus", "gated_delta", "channel_delta", "elsewhere", "rwkv7")


@pytest.mark.parametrize(
    "terms", [terms if terms in COMBINED else pytest.param(terms, marks=pytest.mark.long) for terms in TERMS]
)
def test_packed_documents(terms, device):
    inputs = make_inputs(TERMS[terms], 1, DOCUMENTS[-1], value_heads=1, num_states=len(DOCUMENTS) - 1, **WIDTHS)
    check(inputs, device, cu_seqlens=torch.tensor(DOCUMENTS, dtype=torch.int32))


@pytest.mark.parametrize("terms", ["channel_value_bonus", "gated_delta", "rwkv7"])
@pytest.mark.parametrize("length", [1, 63, 65])
def test_rows(terms, length, device):
    """Rows of a batch, and heads that share q and k."""
    check(make_inputs(TERMS[terms], 2 if length == 1 else 1, length, heads=2, value_heads=4), device)


# Bounds of five documents: of one token each, one of none, and one of all tokens.
DECODED = ([0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 2, 3], [0, 0, 0, 4, 4, 4])


@pytest.mark.parametrize("terms", ["head_bonus", "channel_value_bonus", "gated_delta", "rwkv7"])
def test_decoding_of_packed_documents(terms, device, monkeypatch):
    """About a token for each document: no launch over chunks, also if one document has all tokens."""
    from torchlmoe.kernels import linear_recurrence as kernels

    def fail(*_, **__):
        raise AssertionError("a launch over chunks")

    for bounds in DECODED:
        inputs = make_inputs(TERMS[terms], 1, bounds[-1], value_heads=4, heads=2, num_states=5, **WIDTHS)
        bounds = torch.tensor(bounds, dtype=torch.int32)
        check(inputs, device, cu_seqlens=bounds)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(kernels, "scan", fail)
            patch.setattr(kernels, "chunk_matrices", fail)
            linear_recurrence(
                **on(device, inputs), output_final_state=True, cu_seqlens=bounds.to(device), backend="triton"
            )


@pytest.mark.parametrize("key_dim", [65, 129])
def test_wide_keys(key_dim, device):
    """Their chunks are shorter."""
    check(make_inputs(TERMS["gated_delta"], 1, 35, value_heads=1, key_dim=key_dim), device)
    check(make_inputs(TERMS["channel"], 1, 35, value_heads=1, key_dim=key_dim), device)


@pytest.mark.parametrize("terms", ["channel_value", "gated_delta"])
def test_long_row(terms, device):
    check(make_inputs(TERMS[terms], 1, 200, value_heads=1), device)


@pytest.mark.parametrize("terms", ["scalar", "channel_value_bonus", "channel_bonus", "elsewhere"])
def test_few_or_many_programs(terms, device, monkeypatch):
    """Where programs for documents, heads and tiles of values would not fill a chip, states are stored on the way, each
    shared by two chunks, and read by all spans at a time; backward, chunks wait less for one another."""
    from torchlmoe.kernels import recurrence_launch

    bounds = torch.tensor([0, 0, 130, 331, 332], dtype=torch.int32, device=device)
    inputs = make_inputs(TERMS[terms], 1, 332, value_heads=1, num_states=4)
    for fills in (1, 1000):
        monkeypatch.setattr(recurrence_launch, "FILLS", fills)
        check(inputs, device, cu_seqlens=bounds)


@pytest.mark.parametrize("terms", ["head", "scalar", "channel_value", "channel_bonus", "gated_delta"])
@pytest.mark.parametrize("gates", STRONG_GATES)
def test_gradient_of_strong_gates(terms, gates, device):
    """Nothing is lost to a difference of sums; a token's gates are each compared with gates of similar size."""
    inputs = make_inputs(TERMS[terms], 1, 66)
    names = [name for name in ("log_decay", "value_log_decay") if name in inputs]
    with torch.no_grad():
        for name in names:
            inputs[name].copy_(STRONG_GATES[gates](inputs[name].shape))
    expected, found = run(inputs, backend="reference"), run_on(on(device, inputs))
    for name in names:
        grad, reference, weak = found[f"d{name}"].cpu().double(), expected[f"d{name}"], inputs[name] > -8
        for group in (weak, ~weak):
            assert (grad - reference)[group].norm() <= 1e-4 * reference[group].norm(), name


@pytest.mark.parametrize("terms", ["head", "scalar", "channel_value", "channel_delta"])
def test_gates_of_minus_infinity(terms, device):
    inputs = make_inputs(TERMS[terms], 1, 66, value_heads=1)
    with torch.no_grad():
        for gate in {"log_decay", "value_log_decay"} & set(inputs):
            inputs[gate].masked_fill_(inputs[gate] <= inputs[gate].quantile(0.2), -torch.inf)
    check(inputs, device)


@pytest.mark.parametrize("terms", ["none", "scalar", "channel", "value", "channel_bonus", "gated_delta", "rwkv7"])
def test_half(terms, device, half):
    """Half precision in and out: within 2e-2, and twice what the chunked form makes of the same numbers."""
    inputs = make_inputs(TERMS[terms], 1, 131, value_heads=1, **WIDTHS)
    expected = run(inputs, backend="reference")
    inputs = on(device, inputs, half)
    found, chunked = run_on(inputs), run_on(inputs, "chunked")
    assert found["o"].dtype is half
    assert found["final_state"].dtype is torch.float32
    assert_close({name: x.cpu() for name, x in found.items()}, expected, 2e-2)
    for name, x in expected.items():
        assert (found[name].cpu() - x).norm() <= 2 * (chunked[name].cpu() - x).norm() + 1e-4 * x.norm(), name


@pytest.mark.parametrize("terms", ["scalar", "channel_value_bonus", "gated_delta", "rwkv7"])
def test_half_of_small_gradients(terms, device, half):
    """A small scale costs a small gradient no digits."""
    inputs = on(device, make_inputs(TERMS[terms], 1, 66, value_heads=1), half)

    def grads(inputs, backend):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        o, _ = linear_recurrence(**leaves, scale=0.1, backend=backend)
        cotangent = 1e-4 * torch.linspace(-1, 1, o.numel(), dtype=torch.float64, device=device).view(o.shape).sin()
        return torch.autograd.grad(o, list(leaves.values()), cotangent.to(half).to(o.dtype))

    expected = grads(on(device, inputs, torch.float64), "reference")
    results = zip(inputs, expected, grads(inputs, "triton"), grads(inputs, "chunked"), strict=True)
    for name, x, found, chunked in results:
        assert (found - x).norm() <= 2 * (chunked - x).norm() + torch.finfo(half).eps * x.norm(), name


def test_scale_of_zero(device):
    inputs = {name: x.requires_grad_() for name, x in on(device, make_inputs(TERMS["gated_delta"], 1, 20)).items()}
    o, state = linear_recurrence(**inputs, scale=0.0, output_final_state=True, backend="triton")
    assert not o.any()
    found = torch.autograd.grad(o.sum() + state.square().sum(), list(inputs.values()))
    _, state = linear_recurrence(**inputs, output_final_state=True, backend="chunked")
    torch.testing.assert_close(
        found, torch.autograd.grad(state.square().sum(), list(inputs.values()), materialize_grads=True)
    )


@pytest.mark.parametrize("terms", ["scalar_value", "channel_bonus", "gated_delta", "rwkv7"])
def test_strides(terms, device):
    """Slices of wider tensors, heads before tokens, and a last dim that is not the innermost."""
    inputs = on(device, make_inputs(TERMS[terms], 2, 20))
    expected = run_on(inputs)

    def elsewhere(name, x):
        if name == "k":
            return x.mT.contiguous().mT
        wide = torch.full((2, x.shape[2], 41, 100), torch.nan, device=device).movedim(1, 2)[:, 3:23]
        return (wide[..., : x.shape[-1]] if x.dim() == 4 else wide[..., 0]).copy_(x)

    others = {name: elsewhere(name, x) if x.shape[:2] == (2, 20) else x for name, x in inputs.items()}
    assert_close(run_on(others), expected, 1e-6)


@pytest.mark.parametrize("terms", TERMS)
def test_prefill_then_decode(terms, device):
    """A prefix, three single tokens and the rest give the whole."""
    inputs = on(device, make_inputs(TERMS[terms], 2, 21, **WIDTHS))
    expected, last = linear_recurrence(**inputs, scale=0.7, output_final_state=True, backend="reference")
    state, pieces = inputs.pop("initial_state"), []
    for start, end in [(0, 0), (0, 10), (10, 11), (11, 12), (12, 21)]:
        piece = {name: x[:, start:end] if x.shape[:2] == (2, 21) else x for name, x in inputs.items()}
        piece |= dict(scale=0.7, initial_state=state, output_final_state=True)
        o, state = linear_recurrence(**piece, backend="triton")
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("terms", ["scalar", "channel_value", "gated_delta", "rwkv7"])
def test_span_summary(terms, device):
    bounds = torch.tensor([0, 0, 1, 66], dtype=torch.int32)
    inputs = make_inputs(TERMS[terms], 1, 66, value_heads=1, num_states=3)
    del inputs["q"], inputs["initial_state"]

    def summary(inputs, **options):
        transition, state = span_summary(**inputs, **options)
        parts = [*(transition if isinstance(transition, tuple) else [transition]), state]
        grads = torch.autograd.grad(sum(x.square().sum() for x in parts), list(inputs.values()))
        return {str(index): x.cpu() for index, x in enumerate([*parts, *grads])}

    expected = summary(inputs, cu_seqlens=bounds, backend="reference")
    leaves = {name: x.requires_grad_() for name, x in on(device, inputs).items()}
    assert_close(summary(leaves, cu_seqlens=bounds.to(device), backend="triton"), expected, 1e-4)


@pytest.mark.parametrize("documents", [[0], [0, 0, 0]])
@pytest.mark.parametrize("terms", ["channel_value_bonus", "gated_delta"])
def test_no_tokens(terms, documents, device):
    num_states = len(documents) - 1
    inputs = on(device, make_inputs(TERMS[terms], 1, 0, num_states=max(1, num_states)))
    inputs["initial_state"] = inputs["initial_state"][:num_states]
    found = run_on(inputs, cu_seqlens=torch.tensor(documents, dtype=torch.int32, device=device))
    assert torch.equal(found["final_state"], inputs["initial_state"])
    assert all(not grad.any() for name, grad in found.items() if name.startswith("d") and name != "dinitial_state")


@pytest.mark.parametrize("terms", ["channel_bonus", "gated_delta"])
def test_registered_operation(terms, device):
    inputs = on(device, make_inputs(TERMS[terms], 1, 5))
    linear_recurrence(**inputs, backend="triton")
    tensors = [inputs[name].requires_grad_() if name in inputs else None for name in (*TENSORS, "initial_state")]
    torch.library.opcheck(
        torch.ops.torchlmoe.linear_recurrence_triton.default,
        (*tensors[:-1], 0.7, tensors[-1], None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compiles_whole_and_counts(device):
    """One graph, and as many FLOPs as the chunked form's."""
    inputs = {name: x.requires_grad_() for name, x in on(device, make_inputs(TERMS["scalar"], 1, 5)).items()}

    def read(backend):
        return linear_recurrence(**inputs, backend=backend)[0]

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled("triton"), read("triton"))
    counts = []
    for backend in ("triton", "chunked"):
        with FlopCounterMode(display=False) as counter:
            read(backend).sum().backward()
        counts.append(counter.get_flop_counts()["Global"])
    assert list(counts[0].values()) == list(counts[1].values())
    assert len(counts[0]) == 2


def test_model_trains_alike(device):
    """Three steps of a small model, by the kernels and by the chunked form."""

    def losses(backend):
        arguments = "--model.layer_pattern LD --model.layers.D.mixer gated_deltanet --model.mixer gla --model.backend"
        model = build(*arguments.split(), backend, dtype=torch.float32).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        batch, bounds, found = tokens(2, 24).to(device), BOUNDS.to(device), []
        for _ in range(3):
            loss = model(batch, bounds, batch.roll(-1, 1)) / batch.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return torch.stack(found)

    expected = losses("chunked")
    assert expected[2] < expected[0] - 0.1
    torch.testing.assert_close(losses("triton"), expected, rtol=1e-4, atol=1e-4)


def test_refusals(device, monkeypatch):
    inputs = on(device, make_inputs(TERMS["scalar"], 1, 4))
    wide = on(device, make_inputs((), 1, 4, key_dim=257))
    with pytest.raises(ValueError, match="since its keys are 257 wide, more than 256"):
        linear_recurrence(**wide, backend="triton")
    if device.type == "cpu":
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of tokens, 4"):
            linear_recurrence(
                **inputs | dict(initial_state=None), cu_seqlens=torch.tensor([0, 3]).int(), backend="triton"
            )
    monkeypatch.setattr(kernel_backend, "_triton", lambda: (None, False))
    if device.type == "cpu":
        with pytest.raises(ValueError, match="on a CPU its kernels run only with TRITON_INTERPRET=1"):
            linear_recurrence(**inputs, backend="triton")
    monkeypatch.setattr(kernel_backend, "_triton", lambda: ("triton is not installed", False))
    with pytest.raises(ValueError, match="triton is not installed"):
        linear_recurrence(**inputs, backend="triton")
