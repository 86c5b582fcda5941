"""What starts the kernels looks at no value and moves nothing between host and device, so that CUDA graphs can hold it:
here it runs on tensors that have shapes and nothing else, each of which would raise if it were asked for a number."""

import importlib

import pytest
import torch
from triton.runtime.jit import KernelInterface

TOKENS, DOCUMENTS, HEADS, WIDTH = 200, 3, 2, 16


def empty(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that would have been launched."""
    names = []

    def launch(kernel, grid):
        assert all(isinstance(size, int) for size in grid)
        return lambda *args, **options: names.append(kernel.__name__.strip("_").removesuffix("_kernel"))

    monkeypatch.setattr(KernelInterface, "__getitem__", launch)
    return names


def module(name, monkeypatch):
    found = importlib.import_module(f"torchlmoe.kernels.{name}")
    if hasattr(found, "architecture"):
        monkeypatch.setattr(found, "architecture", lambda x: "interpreter")
    return found


BOUNDS = empty(DOCUMENTS + 1, dtype=torch.int32)
OF_VALUES, OF_KEYS = (1, TOKENS, HEADS, WIDTH), (1, TOKENS, 1, WIDTH)
STATES = empty(DOCUMENTS, HEADS, WIDTH, WIDTH, dtype=torch.float32)


@pytest.mark.parametrize("fills", [1, 1000])
@pytest.mark.parametrize("erases", [True, False])
def test_linear_recurrence(erases, fills, launches, monkeypatch):
    forward = module("linear_recurrence", monkeypatch)
    backward = module("linear_recurrence_backward", monkeypatch)
    monkeypatch.setattr(module("recurrence_launch", monkeypatch), "FILLS", fills)
    keys, values = empty(*OF_KEYS), empty(*OF_VALUES)
    erase = empty(*OF_VALUES[:3], dtype=torch.float32) if erases else None
    decay = empty(*OF_VALUES, dtype=torch.float32)
    inputs = (keys, keys, values, decay, erase, None, None if erases else decay, None, 1.0, STATES, BOUNDS)
    o, final = forward.linear_recurrence._init_fn(*inputs)
    grads = backward.linear_recurrence_backward._init_fn(o, final, *inputs)
    assert [x.shape for x in grads[:4]] == [keys.shape, keys.shape, values.shape, decay.shape]
    assert {"scores", "scan", "reverse", "score_grads", "key_grads"} <= set(launches)
    assert launches.count("scan") == (2 if fills == 1 else 3)


def test_rows_of_one_span_store_no_states(launches, monkeypatch):
    """Spans make no more programs than rows, so one pass suffices, however few programs there are."""
    monkeypatch.setattr(module("recurrence_launch", monkeypatch), "FILLS", 1000)
    row = empty(2, 32, HEADS, WIDTH)
    module("linear_recurrence", monkeypatch).linear_recurrence._init_fn(row, row, row, *[None] * 5, 1.0, None, None)
    assert launches == ["scan"]


def test_elementwise_recurrence(launches, monkeypatch):
    forward = module("elementwise_recurrence", monkeypatch)
    backward = module("elementwise_recurrence_backward", monkeypatch)
    keys, values = empty(*OF_KEYS), empty(*OF_VALUES)
    decay = empty(HEADS, WIDTH, WIDTH, dtype=torch.float32)
    inputs = (keys.expand(OF_VALUES), keys.expand(OF_VALUES), values, decay, values, STATES, BOUNDS)
    o, final, starts = forward.elementwise_recurrence._init_fn(*inputs)
    grads = backward.elementwise_recurrence_backward._init_fn(o, final, *inputs, starts)
    assert [x.shape for x in grads] == [x.shape for x in inputs[:6]]
    assert launches == ["summary", "fold", "read", "summary", "fold", "gradient"]


def test_causal_conv(launches, monkeypatch):
    conv = module("causal_conv", monkeypatch)
    inputs = (empty(1, TOKENS, WIDTH), empty(WIDTH, 4), None, None, BOUNDS, True)
    grads = conv._backward._init_fn(conv.causal_conv._init_fn(*inputs), *inputs)
    assert [x.shape for x in grads[:2]] == [x.shape for x in inputs[:2]]
    assert launches == ["forward", "backward"]
