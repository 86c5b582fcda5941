"""The Triton form of the elementwise recurrence against the token loop in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from tests.ops.test_elementwise_recurrence import FORMS, assert_close, make_inputs, piece, run, single
from torchlmoe.kernels import elementwise_recurrence as kernels
from torchlmoe.ops import elementwise_recurrence, elementwise_span_summary

LENGTHS = [1, 15, 16, 17, 50]  # the interpreter's chunks have 16 tokens
DOCUMENTS = [0, 0, 1, 17, 34, 34, 36, 36]  # empty, one-token, and around a chunk's length


def check(inputs, device, tolerance=1e-4, **options):
    """In float32, outputs and all gradients, against the token loop in float64."""
    expected = run(inputs, backend="reference", **options)
    options = {name: x.to(device) for name, x in options.items()}
    found = run({name: single(x).to(device) for name, x in inputs.items()}, backend="triton", **options)
    assert_close({name: x.cpu() for name, x in found.items()}, expected, tolerance)


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length, device):
    check(make_inputs(FORMS["selective"], 2, length, heads=1, key_dim=2), device)
    check(make_inputs(FORMS["constant_of_one_value"], 2, length, key_dim=2), device)


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents(form, device):
    inputs = make_inputs(FORMS[form], 1, DOCUMENTS[-1], key_dim=2, num_states=len(DOCUMENTS) - 1)
    check(inputs, device, cu_seqlens=torch.tensor(DOCUMENTS, dtype=torch.int32))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (2, 72), (40, 2)])
def test_widths(key_dim, value_dim, device):
    """Tiles that are not full, several tiles; a plain scan is a key of one."""
    check(make_inputs(FORMS["selective"] | dict(value_dim=value_dim), 1, 9, heads=1, key_dim=key_dim), device)


def test_long_row(device):
    check(make_inputs(FORMS["full"], 1, 200, heads=1, key_dim=2), device)


def test_key_varies_and_query_does_not(device):
    inputs = make_inputs(FORMS["selective"], 1, 20, key_dim=2)
    check(inputs | {"q": inputs["q"][0, 0]}, device)
    check(inputs | {"k": inputs["k"][0, 0]}, device)


def test_strides(device):
    """Slices of wider tensors, rows of a batch at any distance, and dims in any order, are read as they lie."""
    inputs = {name: single(x).to(device) for name, x in make_inputs(FORMS["selective"], 2, 20, key_dim=2).items()}
    expected = run(inputs, backend="triton")

    def among_others(x):
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, device=device)
        wide = torch.cat([wide, wide], 1)
        narrow = wide[:, : x.shape[1], ..., 1 : 1 + x.shape[-1]]
        return narrow.copy_(x)

    others = {name: among_others(x) for name, x in inputs.items() if x.dim() == 4}
    others["log_decay"] = inputs["log_decay"].mT.contiguous().mT
    assert_close(run(others, backend="triton"), expected, 1e-6)


def test_extreme_gates_keep_their_digits(device):
    """Ordinary gates keep their gradient among gates of -30 and of -infinity."""
    inputs = make_inputs(FORMS["full"], 1, 40, heads=1, key_dim=2)
    with torch.no_grad():
        inputs["log_decay"][:, 20] = -torch.inf
    expected = run(inputs, backend="reference")
    found = run({name: single(x).to(device) for name, x in inputs.items()}, backend="triton")
    assert_close({name: x.cpu() for name, x in found.items()}, expected, 1e-4)
    ordinary = inputs["log_decay"] > -2
    error = (found["dlog_decay"].cpu() - expected["dlog_decay"])[ordinary].abs().max()
    assert error <= 1e-5 * expected["dlog_decay"][ordinary].abs().max()


ONE_TOKEN = [name for name in FORMS if name not in ("convolved", "convolved_of_one_value", "convolved_real_keys")]


@pytest.mark.parametrize("form", ONE_TOKEN)
@pytest.mark.parametrize("with_state", [True, False])
def test_one_token(form, with_state, device):
    """Keys and columns are several tiles, of which the last is not full."""
    of_one_value = FORMS[form].get("value_dim") == 1
    inputs = make_inputs(dict(value_dim=18) | FORMS[form], 2, 1, heads=18 if of_one_value else 1, key_dim=5)
    if not with_state:
        del inputs["initial_state"]
    check(inputs, device)


@pytest.mark.parametrize("form", ONE_TOKEN)
@pytest.mark.parametrize("prefill", [18, 0])
def test_decode(form, prefill, device):
    """Steps after a prefill from a state, or from nothing, give the whole."""
    inputs = {name: x.detach() for name, x in make_inputs(FORMS[form], 2, prefill + 4).items()}
    if prefill == 0:
        del inputs["initial_state"]
    o, final_state = elementwise_recurrence(**inputs, output_final_state=True, backend="reference")
    inputs = {name: single(x).to(device) for name, x in inputs.items()}
    state = inputs.pop("initial_state", None)
    ends, outputs = range(prefill or 1, prefill + 5), []
    for start, end in zip([0, *ends], ends, strict=False):
        options = dict(initial_state=state, output_final_state=True, backend="triton")
        output, state = elementwise_recurrence(**piece(inputs, start, end), **options)
        outputs.append(output)
    assert_close({"o": torch.cat(outputs, 1).cpu(), "state": state.cpu()}, {"o": o, "state": final_state}, 1e-5)


class Operations(TorchDispatchMode):
    """Notes what does more than to make a view or room for a result."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not operation.is_view and "empty" not in operation.name():
            self.noted.append(operation.name())
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["selective", "full", "constant"])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("with_query", [True, False])
def test_one_token_is_one_launch(form, with_state, with_query, device, monkeypatch):
    """And nothing else: no chunks are cut, and nothing is copied, converted or filled. Nothing is kept, either."""
    inputs = {name: single(x).to(device) for name, x in make_inputs(FORMS[form], 2, 1, key_dim=2).items()}
    inputs["v"] = torch.cat([inputs["v"]] * 2, -1)[..., : inputs["v"].shape[-1]]
    if inputs["log_decay"].dim() == 3:  # as Mamba has it
        inputs["log_decay"] = inputs["log_decay"].mT.contiguous().mT
    order = ("q", "k", "v", "log_decay", "step", "initial_state")
    absent = {"q": not with_query, "initial_state": not with_state}
    terms = [None if absent.get(name) else inputs.get(name) for name in order]
    launches = []
    monkeypatch.setattr(
        KernelInterface, "__getitem__", lambda kernel, grid: lambda *_, **__: launches.append(kernel.__name__)
    )
    with Operations() as operations:
        _, state, kept = kernels.elementwise_recurrence._init_fn(*terms, None)
    assert launches == ["_step_kernel"]
    assert operations.noted == []
    assert state.shape == inputs["initial_state"].shape
    assert kept.numel() == 0


@pytest.mark.parametrize("form", ["selective", "full", "constant"])
def test_span_summary(form, device):
    bounds = torch.tensor(DOCUMENTS, dtype=torch.int32)
    inputs = make_inputs(FORMS[form], 1, DOCUMENTS[-1], key_dim=2, num_states=len(DOCUMENTS) - 1)
    del inputs["q"], inputs["initial_state"]
    _, expected = elementwise_span_summary(**inputs, cu_seqlens=bounds, backend="reference")
    wanted = torch.autograd.grad(expected.abs().square().sum(), list(inputs.values()))
    leaves = {name: single(x).to(device).requires_grad_() for name, x in inputs.items()}
    _, state = elementwise_span_summary(**leaves, cu_seqlens=bounds.to(device), backend="triton")
    found = torch.autograd.grad(state.abs().square().sum(), list(leaves.values()))
    names = ("state", *inputs)
    assert_close(dict(zip(names, (state.cpu(), *(x.cpu() for x in found)), strict=True)),
                 dict(zip(names, (expected, *wanted), strict=True)), 1e-4)  # fmt: skip


def test_half(device, half):
    """Half precision in and out: within 2e-2, and twice what the chunked form is off."""
    inputs = make_inputs(FORMS["selective"], 1, 35, key_dim=2)
    inputs = {name: x.detach().to(device, half) for name, x in inputs.items()}
    expected = run({name: x.double() for name, x in inputs.items()}, backend="reference")
    found, chunked = run(inputs, backend="triton"), run(inputs, backend="chunked")
    assert found["o"].dtype is half
    assert found["final_state"].dtype is torch.float32
    assert_close(found, expected, 2e-2)
    for name, x in expected.items():
        assert (found[name] - x).norm() <= 2 * (chunked[name] - x).norm() + 1e-6 * x.norm(), name


@pytest.mark.parametrize("documents", [[0], [0, 0, 0]])
def test_no_tokens(documents, device):
    inputs = make_inputs(FORMS["selective"], 1, 0, num_states=len(documents) - 1)
    inputs = {name: single(x).to(device).requires_grad_() for name, x in inputs.items()}
    inputs["initial_state"] = inputs["initial_state"][: len(documents) - 1]
    bounds = torch.tensor(documents, dtype=torch.int32, device=device)
    o, state = elementwise_recurrence(**inputs, output_final_state=True, cu_seqlens=bounds, backend="triton")
    assert o.shape == inputs["v"].shape
    torch.testing.assert_close(state, inputs["initial_state"])
    for grad in torch.autograd.grad(o.sum() + state.sum(), list(inputs.values())):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("form", ["selective", "full", "constant"])
@pytest.mark.parametrize("length", [1, 3])
def test_registered_operation(form, length, device):
    inputs = make_inputs(FORMS[form], 1, length, heads=1, key_dim=2)
    inputs = {name: single(x).to(device) for name, x in inputs.items()}
    elementwise_recurrence(**inputs, backend="triton")
    order = ("q", "k", "v", "log_decay", "step", "initial_state")
    torch.library.opcheck(
        torch.ops.torchlmoe.elementwise_recurrence_triton.default,
        (*[None if name not in inputs else inputs[name].requires_grad_() for name in order], None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compiled_whole(device):
    inputs = {
        name: single(x).to(device) for name, x in make_inputs(FORMS["selective"], 1, 3, heads=1, key_dim=2).items()
    }

    def read(inputs):
        return elementwise_recurrence(**inputs, backend="triton")[0]

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), read(inputs))


def test_refusal():
    inputs = {name: x.detach() for name, x in make_inputs(FORMS["selective"], 1, 4).items()}
    with pytest.raises(ValueError, match=r"backend = 'triton' is not available here, since .* float64; use 'chunked'"):
        elementwise_recurrence(**inputs, backend="triton")
