"""What holds for every operation: autocast, transforms, bounds, empty inputs, tensors without values, NaN, padding."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from torchlmoe.layers.norms import rms_norm
from torchlmoe.ops import (
    elementwise_recurrence,
    elementwise_span_summary,
    linear_recurrence,
    online_gradient,
    span_summary,
)
from torchlmoe.ops.causal_conv import causal_conv
from torchlmoe.ops.chunk_layout import MOST_SLOTS_PER_TOKEN, chunk_plans
from torchlmoe.ops.grouped_matmul import grouped_matmul
from torchlmoe.ops.packed_attention import packed_attention
from torchlmoe.ops.time_invariant import CHUNK_SIZE
from torchlmoe.ops.weighted_relu2 import weighted_relu2
from torchlmoe.ops.weighted_swiglu import weighted_swiglu
from torchlmoe.routing.dispatch import Slots, gather_slots, permute_slots, reorder_choices, sum_slots

HEADS, KEY, VALUE = 2, 4, 3
TOKEN, HEAD = "token", "head"  # of what a term has its shape: [B, T, HEADS, ...] or [HEADS, ...]
QKV = {"q": (TOKEN, KEY), "k": (TOKEN, KEY), "v": (TOKEN, VALUE)}
KV = {"k": (TOKEN, KEY), "v": (TOKEN, VALUE)}
CONSTANT = {"k": (HEAD, KEY), "v": (TOKEN, VALUE), "log_decay": (HEAD, KEY, VALUE)}
STATE = dict(output_final_state=True)
OPERATIONS = {
    "scalar": (linear_recurrence, QKV | {"log_decay": (TOKEN,)}, STATE),
    "delta": (linear_recurrence, QKV | {"log_decay": (TOKEN, KEY), "erase": (TOKEN,)}, STATE),
    "value_decay": (linear_recurrence, QKV | {"value_log_decay": (TOKEN, VALUE), "bonus": (HEAD, KEY)}, STATE),
    "summary": (span_summary, KV | {"log_decay": (TOKEN,), "erase": (TOKEN,)}, {}),
    "scan": (elementwise_recurrence, QKV | {"log_decay": (HEAD, KEY, VALUE), "step": (TOKEN, VALUE)}, STATE),
    "convolution": (elementwise_recurrence, CONSTANT | {"q": (HEAD, KEY)}, STATE),
    "elementwise_summary": (elementwise_span_summary, KV | {"log_decay": (TOKEN, KEY, VALUE)}, {}),
    "online_gradient": (
        online_gradient,
        QKV | {"learning_rate": (TOKEN,), "norm_weight": (HEAD, VALUE), "norm_bias": (HEAD, VALUE)},
        STATE,
    ),
    "causal_conv": (causal_conv, {"x": (TOKEN,), "weight": (HEAD, 3)}, dict(activation=True)),
    "attention": (packed_attention, {"q": (TOKEN, KEY), "k": (TOKEN, KEY), "v": (TOKEN, KEY)}, {}),
}
WITH_REFERENCE = [name for name in OPERATIONS if name not in ("causal_conv", "attention")]
BOUNDS = (0, 1, 1, 140, 300)
EMPTY = [((0, 300), None), ((0, 1), None), ((2, 0), None), ((1, 0), (0, 0, 0)), ((1, 0), (0,))]


def make(name, batch_size, length, dtype=torch.float32):
    generator, inputs = torch.Generator().manual_seed(0), {}
    for term, (kind, *widths) in OPERATIONS[name][1].items():
        shape = (batch_size, length, HEADS, *widths) if kind == TOKEN else (HEADS, *widths)
        x = torch.randn(shape, generator=generator, dtype=dtype)
        if term.endswith("decay"):
            x = -x.abs()
        elif term in ("step", "learning_rate", "erase"):
            x = x.sigmoid()
        inputs[term] = (x / 2).requires_grad_()
    return inputs


def forward(name, inputs, bounds=None, **options):
    function, _, fixed = OPERATIONS[name]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if isinstance(bounds, tuple) else bounds
    return tree_leaves(function(**inputs, **fixed, **options, cu_seqlens=cu_seqlens))


def loss_of(results):
    return sum((x.abs() * torch.arange(1, x.shape[-1] + 1, device=x.device)).sum() for x in results)


def backward(results, inputs, **options):
    return torch.autograd.grad(loss_of(results), list(inputs.values()), **options)


@pytest.mark.parametrize(("dtype", "bounds"), [(torch.bfloat16, None), (torch.float16, BOUNDS)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_changes_nothing(name, dtype, bounds):
    inputs = make(name, 1, 300)
    expected = forward(name, inputs, bounds)
    grads = backward(expected, inputs)
    with torch.autocast("cpu", dtype):
        results = forward(name, inputs, bounds)
        inside = backward(results, inputs, retain_graph=True)
    outside = backward(results, inputs)
    for x, y in zip((*expected, *grads, *grads), (*results, *inside, *outside), strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=0)


def transforms_of(function, x):
    """Forward-mode derivatives and the transforms of torch.func, of function(x)."""
    yield lambda: torch.func.jvp(function, (x,), (x,))[1]
    yield lambda: torch.func.grad(lambda x: function(x).sum())(x)
    yield lambda: torch.func.vmap(function)(x[None])

    def dual():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent

    yield dual


SLOTS = Slots.sorted_by_expert(torch.tensor([[1, 0], [0, 1], [1, 0]]), 2)
OTHERS = {
    "grouped_matmul": lambda x: grouped_matmul(x, torch.ones(1, 4, 4), torch.tensor([6], dtype=torch.int32)),
    "weighted_swiglu": lambda x: weighted_swiglu(x, torch.ones(6)),
    "weighted_relu2": lambda x: weighted_relu2(x, torch.ones(6)),
    "gather_slots": lambda x: gather_slots(x[:3], SLOTS),
    "sum_slots": lambda x: sum_slots(x, SLOTS),
    "permute_slots": lambda x: permute_slots(x, SLOTS, SLOTS),
    "reorder_choices": lambda x: reorder_choices(x[:3, :2], SLOTS),
    "scale_to_unit": lambda x: rms_norm(x, None, 1e-6),
}


@pytest.mark.parametrize("name", [*OPERATIONS, *OTHERS])
def test_transforms_are_refused(name):
    """In forward mode a custom operation without it would give no derivative, and say nothing."""
    if name in OTHERS:
        function, called, x, remedy = OTHERS[name], name, torch.ones(6, 4), "use reverse-mode autograd"
    else:
        inputs = {term: x.detach() for term, x in make(name, 1, 3).items()}
        term = "x" if name == "causal_conv" else "v"
        x, called = inputs.pop(term), OPERATIONS[name][0].__name__
        remedy = 'call it with backend = "reference"' if name in WITH_REFERENCE else "use reverse-mode autograd"

        def function(x):
            return forward(name, inputs | {term: x})[0]

    for transform in transforms_of(function, x):
        with pytest.raises(RuntimeError, match=f"^{called} supports no forward-mode derivative .*; {remedy}"):
            transform()


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_reference_serves_transforms(name):
    """The derivative along x of a scalar is x's product with its gradient; vmap takes rows that vary."""
    inputs = {term: x.detach() for term, x in make(name, 1, 3, torch.float64).items()}
    x = inputs.pop("v")

    def function(x):
        return loss_of(forward(name, inputs | {"v": x}, backend="reference"))

    gradient = torch.func.grad(function)(x)
    x_ = x.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss_of(forward(name, inputs | {"v": x_})), x_)[0])
    torch.testing.assert_close(torch.func.jvp(function, (x,), (x,))[1], (x * gradient).sum())
    both = torch.stack([x, x.flip(-1)])
    torch.testing.assert_close(torch.func.vmap(function)(both), torch.stack([function(x) for x in both]))


class Calls(TorchDispatchMode):
    """The shapes of what an operation of this package returns last, and of the zeros that are made beside it."""

    def __init__(self):
        super().__init__()
        self.kept, self.zeros = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.zeros.default:
            self.zeros.append(out.shape)
        elif function.namespace == "torchlmoe" and isinstance(out, tuple):
            self.kept.append(out[-1].shape)
        return out


@pytest.mark.parametrize("name", ["scalar", "scan", "causal_conv", "attention"])
def test_no_zeros_for_kept_outputs(name):
    """Autograd makes zeros for outputs without a gradient, but what is only for the backward never has one."""
    with Calls() as calls:
        outputs = forward(name, make(name, 1, 70), (0, 70))
        kept = calls.kept[0]
        sum(out.sum() for out in outputs).backward()
    assert kept.numel() > 0
    assert kept not in calls.zeros


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradient_of_one_output(name):
    """It is the one that the output has beside zeros of the others."""
    inputs = make(name, 1, 70)
    for index in range(len(forward(name, inputs))):
        alone = forward(name, inputs)[index].sum()
        beside = sum(out.sum() * (place == index) for place, out in enumerate(forward(name, inputs)))
        of_inputs = partial(torch.autograd.grad, inputs=[*inputs.values()], materialize_grads=True)
        torch.testing.assert_close(of_inputs(alone), of_inputs(beside))


@pytest.mark.parametrize("name", OPERATIONS)
def test_bounds_must_rise_from_none_to_all_tokens(name):
    inputs = make(name, 1, 8)
    backends = [{}, {"backend": "reference"}] if name in WITH_REFERENCE else [{}]
    for bounds in ((1, 8), (0, 7), (0, 9), (0, 6, 4, 8), (-1, 8), (0, -1, 8), (8,)):
        for options in backends:
            with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of tokens, 8"):
                forward(name, inputs, bounds, **options)
    for bounds in (torch.tensor([0, 8]), torch.zeros(0, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"must be int32 \[N \+ 1\]"):
            forward(name, inputs, bounds)
    with pytest.raises(ValueError, match="with B = 1"):
        forward(name, make(name, 2, 8), (0, 8))


def test_convolution_continues_rows_not_documents():
    with pytest.raises(ValueError, match="causal_conv takes cu_seqlens or a state, not both"):
        forward("causal_conv", make("causal_conv", 1, 8), (0, 8), state=torch.zeros(1, 2, HEADS))


@pytest.mark.parametrize(("shape", "bounds"), EMPTY)
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_tokens_are_ordinary(name, shape, bounds):
    inputs = make(name, *shape)
    for options in [{}, {"backend": "reference"}] if name in WITH_REFERENCE else [{}]:
        results = forward(name, inputs, bounds, **options)
        grads = backward(results, inputs)  # raises for an input that had no part in the results
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize(("length", "bounds"), [(20, None), (300, None), (20, (0, 1, 1, 14, 20)), (300, BOUNDS)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_are_known_without_values(name, length, bounds):
    inputs = make(name, 1, length)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)

    def shapes(inputs, cu_seqlens):
        results = forward(name, inputs, cu_seqlens)
        return [x.shape for x in (*results, *backward(results, inputs))]

    expected = shapes(inputs, cu_seqlens)
    on_meta = tree_map(lambda x: x.detach().to("meta").requires_grad_(), inputs)
    assert shapes(on_meta, None if bounds is None else cu_seqlens.to("meta")) == expected
    with FakeTensorMode() as mode:
        fake = tree_map(mode.from_tensor, inputs)
        assert shapes(fake, None if bounds is None else mode.from_tensor(cu_seqlens)) == expected


class Packed(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, inputs, cu_seqlens):
        return forward(self.name, inputs, cu_seqlens)


@pytest.mark.parametrize("name", ["delta", "scan", "convolution", "online_gradient", "causal_conv", "attention"])
def test_exports_with_any_number_of_documents(name):
    inputs, bounds = tree_map(torch.detach, make(name, 1, 300)), torch.tensor([0, 5, 300], dtype=torch.int32)
    sizes = (dict.fromkeys(inputs), {0: Dim.DYNAMIC})
    program = export(Packed(name), (inputs, bounds), dynamic_shapes=sizes).module()
    others = torch.tensor([0, 5, 9, 9, 140, 300], dtype=torch.int32)
    for result, expected in zip(program(inputs, others), forward(name, inputs, others), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_nan_reaches_another_document(name):
    inputs = make(name, 1, 300)
    for x in inputs.values():
        if x.shape[:2] == (1, 300):
            x.data[0, 100] = torch.nan
    results = forward(name, inputs, (0, 90, 120, 300))
    own = torch.zeros(300, dtype=torch.bool)
    own[90:120] = True
    others = [x[:, ~own] if x.shape[:2] == (1, 300) else x[[0, 2]] for x in results]
    (grad,) = torch.autograd.grad(loss_of(others), inputs["x" if name == "causal_conv" else "v"])
    assert all(x.isfinite().all() for x in (*others, grad[:, ~own]))


@pytest.mark.parametrize("name", ["scalar", "delta", "value_decay", "convolution"])
def test_short_documents_beside_a_long_one_are_laid_out_apart(name):
    """The work is in proportion to the tokens, and the results are those of the definition."""
    bounds = (0, *range(200, 301), 301, 301, 306, 320)
    assert len(chunk_plans(1, 320, bounds, CHUNK_SIZE, 1)) == 3
    inputs = make(name, 1, 320, torch.float64)
    states = torch.randn(len(bounds) - 1, HEADS, KEY, VALUE, dtype=torch.float64, requires_grad=True)
    inputs["initial_state"] = states
    chunked, reference = (forward(name, inputs, bounds, backend=backend) for backend in ("chunked", "reference"))
    grads = backward(chunked, inputs), backward(reference, inputs)
    torch.testing.assert_close((chunked, grads[0]), (reference, grads[1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "bounds",
    [(0, *range(16384, 32769)), tuple(range(16385)), (0, *range(16000, 16385)), (0, 16384, *range(16400, 32768, 16))],
)
def test_padding_is_bounded(bounds):
    plans = chunk_plans(1, bounds[-1], bounds, CHUNK_SIZE, 64)
    assert sum(plan.num_slots for plan in plans) <= MOST_SLOTS_PER_TOKEN * bounds[-1]
    assert sorted(document for plan in plans for document in plan.order) == list(range(len(bounds) - 1))
