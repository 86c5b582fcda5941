"""The chunked form and the summaries against the token loop in float64, over awkward shapes and extreme gates."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from torchlmoe.ops import linear_recurrence, span_summary
from torchlmoe.ops.chunk_layout import chunk_layouts
from torchlmoe.ops.chunked import layouts_of

TERMS = {
    "none": (),
    "head": ("head",),
    "scalar": ("scalar",),
    "channel": ("channel",),
    "value": ("value",),
    "scalar_value": ("scalar", "value"),
    "channel_value": ("channel", "value"),
    "bonus": ("bonus",),
    "head_bonus": ("head", "bonus"),
    "channel_bonus": ("channel", "bonus"),
    "channel_value_bonus": ("channel", "value", "bonus"),
    "delta": ("beta",),
    "gated_delta": ("scalar", "beta"),
    "channel_delta": ("channel", "beta"),
    "erase_vector": ("scalar", "vector"),
    "elsewhere": ("beta", "key"),
    "gated_elsewhere": ("head", "beta", "key"),
    "rwkv7": ("rwkv7",),
}
TENSORS = ("q", "k", "v", "log_decay", "erase", "erase_key", "value_log_decay", "bonus")
LENGTHS = [1, 2, 31, 32, 33, 65, 200]  # chunks have 32 tokens, and 64 where values are wide
DOCUMENTS = [0, 0, 1, 2, 66, 66, 67, 190, 200, 200]  # empty, one-token, and longer ones


def make_inputs(terms, batch_size, length, *, heads=1, value_heads=2, key_dim=6, value_dim=10, num_states=None, seed=0):
    """Float64 inputs with zero keys and gates of 0, -30 and ordinary mixed in one tensor."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def gates(*shape):
        gate = -torch.rand(*shape, dtype=torch.float64, generator=generator)
        kind = torch.rand(*shape, generator=generator)
        return torch.where(kind < 0.1, 0.0, torch.where(kind < 0.2, -30.0, gate))

    tokens = (batch_size, length)
    k = F.normalize(randn(*tokens, heads, key_dim), dim=-1)
    k = k * (torch.rand(*tokens, heads, 1, generator=generator) > 0.1)
    inputs = dict(q=randn(*tokens, heads, key_dim), k=k, v=randn(*tokens, value_heads, value_dim))
    heads_of = (*tokens, value_heads)
    makers = {
        "head": lambda: {"log_decay": gates(value_heads)},
        "scalar": lambda: {"log_decay": gates(*heads_of)},
        "channel": lambda: {"log_decay": gates(*heads_of, key_dim)},
        "value": lambda: {"value_log_decay": gates(*heads_of, value_dim)},
        "bonus": lambda: {"bonus": randn(value_heads, key_dim)},
        "beta": lambda: {"erase": 2 * torch.rand(*heads_of, dtype=torch.float64, generator=generator)},
        "vector": lambda: {"erase": F.normalize(randn(*heads_of, key_dim), dim=-1)},
        "key": lambda: {"erase_key": F.normalize(randn(*heads_of, key_dim), dim=-1)},
        "rwkv7": lambda: rwkv7(
            gates(*heads_of, key_dim).clamp_min(-0.6), F.normalize(randn(*heads_of, key_dim), dim=-1)
        ),
    }

    def rwkv7(gate, direction):
        """What is taken out is the state before its decay at a, and goes in at b = -a * rate."""
        rate = torch.rand(direction.shape, dtype=torch.float64, generator=generator)
        return {"log_decay": gate, "erase": direction * torch.exp(-gate), "erase_key": direction * rate}

    for term in terms:
        inputs |= makers[term]()
    inputs["initial_state"] = randn(num_states or batch_size, value_heads, key_dim, value_dim)
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def run(inputs, dtype=torch.float64, **options):
    """Output, final state and the gradient of every input, for a fixed random cotangent."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    o, state = linear_recurrence(**leaves, scale=0.7, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype)).sum() for x in (o, state)
    )
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o, "final_state": state, **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def assert_close(found, expected, tolerance, gradient_tolerance=None):
    for name, reference in expected.items():
        limit = gradient_tolerance or tolerance if name.startswith("d") else tolerance
        reference = reference.double()
        error = (found[name].double() - reference).norm() / reference.norm().clamp_min(1e-30)
        assert torch.isfinite(found[name]).all(), name
        assert error <= limit, f"{name}: {error:.2e} > {limit:.0e}"


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_token_loop(terms, length):
    inputs = make_inputs(TERMS[terms], 3 if length < 64 else 1, length)
    expected = run(inputs, backend="reference")
    assert_close(run(inputs, backend="chunked"), expected, 1e-9)
    assert_close(run(inputs, torch.float32, backend="chunked"), expected, 1e-5, 1e-4)


@pytest.mark.parametrize("terms", ["head_bonus", "value", "gated_delta", "rwkv7"])
def test_chunks_of_wide_values(terms):
    for length in (63, 64, 65, 130):
        inputs = make_inputs(TERMS[terms], 1, length, value_dim=72)
        assert_close(run(inputs, backend="chunked"), run(inputs, backend="reference"), 1e-9)


STRONG_GATES = {
    "constant": lambda shape: torch.tensor([-8.0, -12.0]).view(-1, *[1] * max(0, len(shape) - 3)).expand(shape),
    "half": lambda shape: -0.01 - 15.99 * (torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5),
    "all": lambda shape: torch.full(shape, -30.0),
}
DECAYED = [name for name, terms in TERMS.items() if {"head", "scalar", "channel", "value"} & set(terms)]


@pytest.mark.parametrize("terms", DECAYED)
@pytest.mark.parametrize("gates", STRONG_GATES)
def test_gradient_of_strong_gates(terms, gates):
    """Each head's sum of g * dg too, which is what a rate that its gates share gets."""
    inputs = make_inputs(TERMS[terms], 1, 65 if gates == "all" else 200)
    names = [name for name in ("log_decay", "value_log_decay") if name in inputs]
    with torch.no_grad():
        for name in names:
            inputs[name].copy_(STRONG_GATES[gates](inputs[name].shape))

    def gradients(dtype, backend):
        found = run(inputs, dtype, backend=backend)
        result = {f"d{name}": found[f"d{name}"] for name in names}
        for name in names:
            product = (inputs[name] * found[f"d{name}"]).detach()
            per_head = product if product.dim() == 1 else product.movedim(2, 0).flatten(1).sum(1)
            result |= {f"d{name} of head {head}": x for head, x in enumerate(per_head)}
        return result

    expected = gradients(torch.float64, "reference")
    assert_close(gradients(torch.float64, "chunked"), expected, 1e-9)
    assert_close(gradients(torch.float32, "chunked"), expected, 1e-4)


@pytest.mark.parametrize("terms", DECAYED)
def test_gates_of_minus_infinity(terms):
    """Nothing passes them, and nothing is NaN."""
    inputs = make_inputs(TERMS[terms], 1, 130)
    with torch.no_grad():
        for gate in {"log_decay", "value_log_decay"} & set(inputs):
            inputs[gate].masked_fill_(inputs[gate] <= inputs[gate].quantile(0.2), -torch.inf)
    assert_close(run(inputs, backend="chunked"), run(inputs, backend="reference"), 1e-9)


@pytest.mark.parametrize("terms", DECAYED)
def test_decay_of_nothing_has_no_gradient(terms):
    """One token, no state before it, none after it in the loss: exactly zero."""
    inputs = make_inputs(TERMS[terms], 2, 1)
    inputs.pop("initial_state")
    o, _ = linear_recurrence(**inputs, backend="chunked")
    gates = [x for name, x in inputs.items() if "decay" in name]
    assert not any(grad.any() for grad in torch.autograd.grad(o.square().sum(), gates))


@pytest.mark.parametrize("terms", TERMS)
def test_packed_documents(terms):
    """Packed = each document alone, states included; empty documents hand their state on."""
    bounds = torch.tensor(DOCUMENTS, dtype=torch.int32)
    inputs = make_inputs(TERMS[terms], 1, DOCUMENTS[-1], num_states=len(DOCUMENTS) - 1)
    expected = run(inputs, backend="reference", cu_seqlens=bounds)
    assert_close(run(inputs, backend="chunked", cu_seqlens=bounds), expected, 1e-9)
    assert_close(run(inputs, torch.float32, backend="chunked", cu_seqlens=bounds), expected, 1e-5, 1e-4)

    per_token = {name for name, x in inputs.items() if x.shape[:2] == inputs["v"].shape[:2]}
    for document, (start, end) in enumerate(itertools.pairwise(DOCUMENTS)):
        alone = {name: x[:, start:end] if name in per_token else x for name, x in inputs.items()}
        alone["initial_state"] = inputs["initial_state"][document : document + 1]
        o, state = linear_recurrence(**alone, scale=0.7, output_final_state=True, backend="chunked")
        torch.testing.assert_close(o, expected["o"][:, start:end], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state[0], expected["final_state"][document], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("split", [1, 63, 64, 100])
def test_prefill_then_decode(terms, split):
    """Any split into a prefix, and token-by-token steps after it, gives the whole: by both forms' single step."""
    inputs = {name: x.detach() for name, x in make_inputs(TERMS[terms], 2, 130).items()}
    expected, last = linear_recurrence(**inputs, output_final_state=True, backend="reference")
    state, pieces = inputs.pop("initial_state"), []
    for start, end in [(0, split), *((t, t + 1) for t in range(split, split + 5)), (split + 5, 130)]:
        piece = {name: x[:, start:end] if x.shape[:2] == (2, 130) else x for name, x in inputs.items()}
        backend = "chunked" if start % 2 == 0 else "auto"
        o, state = linear_recurrence(**piece, initial_state=state, output_final_state=True, backend=backend)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("terms", [terms for terms in TERMS if "bonus" not in TERMS[terms]])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_span_summary(terms, backend):
    """S_out = transition S_in + state, for every packed document, and differentiable."""
    bounds = torch.tensor(DOCUMENTS, dtype=torch.int32)
    inputs = make_inputs(TERMS[terms], 1, DOCUMENTS[-1], num_states=len(DOCUMENTS) - 1)
    q, incoming = inputs.pop("q"), inputs.pop("initial_state")
    transition, state = span_summary(**inputs, cu_seqlens=bounds, backend=backend)
    if isinstance(transition, tuple):
        moved = transition[0][..., None] * incoming * transition[1][..., None, :]
    else:
        moved = transition @ incoming if transition.dim() == 4 else transition[..., None] * incoming
    _, expected = linear_recurrence(
        q, **inputs, initial_state=incoming, output_final_state=True, cu_seqlens=bounds, backend="reference"
    )
    torch.testing.assert_close(moved + state, expected, rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad((moved + state).square().sum(), list(inputs.values()))
    wanted = torch.autograd.grad(expected.square().sum(), list(inputs.values()))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transition_of_a_long_row(dtype):
    """Documents that forget everything beside others keep none of these' digits from them."""
    bounds = torch.tensor([0, 0, 1, 127, 128, 130, 1000, 1000, 3000, 3001], dtype=torch.int32)
    log_decay = -torch.rand(1, 3001, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 1000
    log_decay[:, 130:1000] = -30.0
    log_decay = log_decay.to(dtype).requires_grad_()
    k = torch.zeros(1, 3001, 2, 3, dtype=dtype)
    expected = torch.stack([document.double().sum(0).exp() for document in log_decay[0].split(bounds.diff().tolist())])
    transition, _ = span_summary(k, k[..., :1], log_decay=log_decay, cu_seqlens=bounds)
    assert transition.dtype is dtype
    limit = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(transition.double(), expected, rtol=limit, atol=0)
    (found,) = torch.autograd.grad(transition.sum(), log_decay)
    torch.testing.assert_close(found[0], transition.detach().repeat_interleave(bounds.diff(), 0))


@pytest.mark.parametrize("terms", TERMS)
def test_registered_operation(terms):
    """torch's own checks of a custom operation."""
    inputs = make_inputs(TERMS[terms], 2, 20)
    torch.library.opcheck(
        torch.ops.torchlmoe.linear_recurrence.default,
        (*[inputs.get(name) for name in TENSORS], 0.7, inputs["initial_state"], None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("terms", TERMS)
def test_no_tokens(terms):
    """No output, the state as it came, and zero gradients of what belongs to heads."""
    found = run(inputs := make_inputs(TERMS[terms], 2, 0), backend="chunked")
    assert torch.equal(found["final_state"], inputs["initial_state"])
    assert all(not grad.any() for name, grad in found.items() if name.startswith("d") and name != "dinitial_state")


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_no_documents(backend):
    inputs = make_inputs(TERMS["gated_delta"], 1, 0)
    inputs["initial_state"] = inputs["initial_state"][:0]
    none = torch.zeros(1, dtype=torch.int32)
    o, state = linear_recurrence(**inputs, output_final_state=True, cu_seqlens=none, backend=backend)
    assert o.shape == inputs["v"].shape
    assert state.shape == inputs["initial_state"].shape


def test_documents_of_whole_chunks_are_read_as_rows():
    """Without indices, whatever the order of dimensions in memory is."""
    inputs = make_inputs(TERMS["gated_delta"], 3, 64)
    expected = run(inputs)
    not_per_token = {"initial_state"}
    for order in ("tokens first", "heads first"):
        packed = {name: x if name in not_per_token else x.flatten(0, 1)[None] for name, x in inputs.items()}
        if order == "heads first":
            packed |= {name: packed[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v")}
        bounds = torch.tensor([0, 64, 128, 192], dtype=torch.int32)
        assert all(slab.steps is not None for layout in layouts_of(packed["v"], bounds) for slab in layout.slabs)
        for name, x in run(packed, cu_seqlens=bounds).items():
            assert torch.equal(x.reshape(expected[name].shape), expected[name]), name


def test_packings_of_many_layers_are_laid_out_once():
    """The backward of a model whose every layer packs its tokens in its own way finds the layouts of the forward."""
    outputs = []
    for layer in range(48):
        inputs = make_inputs((), 1, 60, num_states=2)
        bounds = torch.tensor([0, layer, 60], dtype=torch.int32)
        outputs.append((linear_recurrence(**inputs, cu_seqlens=bounds)[0], inputs["v"]))
    before = chunk_layouts.cache_info().misses
    for o, v in reversed(outputs):
        torch.autograd.grad(o.sum(), v)
    assert chunk_layouts.cache_info().misses == before


def test_compiles_whole():
    """One graph, and no other when only the length changes."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_recurrence, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for length in (64, 128, 192):
        inputs = make_inputs(TERMS["gated_delta"], 1, length)
        found, expected = (op(**inputs)[0] for op in (compiled, linear_recurrence))
        torch.testing.assert_close(found, expected)
        grads = (torch.autograd.grad(o.square().sum(), list(inputs.values())) for o in (found, expected))
        torch.testing.assert_close(*grads)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_low_precision_inputs():
    """bfloat16 in and out, the state in float32 within."""
    inputs = make_inputs(TERMS["gated_delta"], 1, 130)
    expected = run({name: x.to(torch.bfloat16) for name, x in inputs.items()}, backend="reference")
    leaves = {name: x.detach().to(torch.bfloat16) for name, x in inputs.items()}
    o, state = linear_recurrence(**leaves, scale=0.7, output_final_state=True, backend="chunked")
    assert o.dtype is torch.bfloat16
    assert state.dtype is torch.float32
    assert_close({"o": o, "final_state": state}, {name: expected[name] for name in ("o", "final_state")}, 1e-2)


def test_refusals():
    inputs = {name: x.detach() for name, x in make_inputs(TERMS["scalar"], 1, 8).items()}
    bonus = torch.zeros(2, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"backend = 'triton' is not available here, since .* float64"):
        linear_recurrence(**inputs, backend="triton")
    with pytest.raises(ValueError, match="backend = 'fast' is unknown"):
        linear_recurrence(**inputs, backend="fast")
    with pytest.raises(ValueError, match="bonus cannot be combined with erase"):
        linear_recurrence(**inputs, bonus=bonus, erase=torch.zeros(1, 8, 2))
    with pytest.raises(ValueError, match=r"log_decay has shape \[1, 8, 1\]"):
        linear_recurrence(**(inputs | {"log_decay": torch.zeros(1, 8, 1)}))
    with pytest.raises(ValueError, match="must be int32"):
        linear_recurrence(**inputs, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="must be int32"):
        linear_recurrence(**inputs, cu_seqlens=torch.tensor([], dtype=torch.int32))


@pytest.mark.parametrize("bounds", [[0, 9], [0, 3], [2, 8], [0, 5, 2, 8]])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_bounds_that_are_none_are_refused(bounds, backend):
    bounds = torch.tensor(bounds, dtype=torch.int32)
    inputs = make_inputs((), 1, 8, num_states=len(bounds) - 1)
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 8"):
        linear_recurrence(**inputs, cu_seqlens=bounds, backend=backend)
    k, v = inputs["k"], inputs["v"]
    for erase in (None, torch.ones(1, 8, 2)):
        with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 8"):
            span_summary(k, v, erase=erase, cu_seqlens=bounds, backend=backend)
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 1"):
        linear_recurrence(k[:, :1], k[:, :1], v[:, :1], cu_seqlens=bounds)


@pytest.mark.parametrize("backend", ["chunked", "reference", "triton"])
@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_no_heads_keys_or_values_are_refused(heads, key_dim, value_dim, backend):
    k, v = torch.zeros(1, 8, heads, key_dim), torch.zeros(1, 8, heads, value_dim)
    with pytest.raises(ValueError, match="must have at least one head, one key and one value"):
        linear_recurrence(k, k, v, backend=backend)
    with pytest.raises(ValueError, match="must have at least one head, one key and one value"):
        span_summary(k, v, erase=torch.zeros(1, 8, heads), backend=backend)
