"""Tensors of more than 2^31 elements, and grids of more than 65,535 programs, without memory for them: launches are
interpreted on addresses that nothing lies at, and an access beyond its tensor is an error."""

from functools import partial

import pytest
import torch
from triton.runtime.jit import KernelInterface

from benchmarks.kernel_traffic import recorded
from benchmarks.launch_traffic import machine, traffic_of
from tests.kernels.conftest import INTERPRETED
from torchlmoe.ops import elementwise_recurrence, linear_recurrence
from torchlmoe.ops.causal_conv import causal_conv

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="addresses are made up in Triton's interpreter")
OVER = 1 << 31
MOST = 65_535  # programs in the second and third dimension of a grid


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def run(name, *args):
    """Count an operation's launches, the first and the last program of each. Returns their kernels' names."""
    with machine("sm_90"):
        return [kernel.split(" ")[1] for kernel in traffic_of(f"torchlmoe::{name}", args)]


def recurrence(rows, heads, key_heads=None, erases=False):
    keys, values = meta(rows, 256, key_heads or heads, 128), meta(rows, 256, heads, 128)
    decay = meta(rows, 256, heads, dtype=torch.float32)
    return keys, keys, values, decay, decay if erases else None, None, None, None, 1.0, None, None


@pytest.mark.parametrize(("rows", "elements_of"), [(1024, "values"), (480, "states")])
def test_recurrence_of_many_elements(rows, elements_of):
    """Fewer than 2^32, so that a number of 32 bits would turn negative and not come back to the tensor."""
    args = recurrence(rows, 96, erases=True)
    states = meta(rows, 96, 128, 128, dtype=torch.float32)
    chunks = rows * 256 // 64
    assert OVER < {"values": args[2].numel(), "states": chunks * 96 * 128 * 128}[elements_of] < 2 * OVER
    run("linear_recurrence_triton", *args)
    assert len(run("linear_recurrence_triton_backward", args[2], states, *args)) >= 5


def test_elementwise_recurrence_of_many_elements():
    q, v = meta(1024, 128, 1, 4), meta(1024, 128, 1, 32768)
    args = q, q, v, meta(1, 4, 32768, dtype=torch.float32), v, None, None
    states, kept = (meta(rows, 1, 4, 32768, dtype=torch.float32) for rows in (1024, 2048))
    assert v.numel() > OVER
    run("elementwise_recurrence_triton", *args)
    run("elementwise_recurrence_triton_backward", v, states, *args, kept)


def test_other_operations_of_many_elements():
    x, weight = meta(2048, 32, 65536), meta(65536, 4)
    assert x.numel() > OVER
    run("causal_conv_triton", x, weight, None, None, None, True)
    run("causal_conv_triton_backward", x, x, weight, None, None, None, True)
    rows, slots = meta(1 << 20, 4096), meta(1 << 18, 4, dtype=torch.int64)
    assert rows.numel() > OVER
    run("unpermute_triton", rows, slots.flatten(), slots, meta(1 << 18, 4))
    run("permute_triton", meta(1 << 18, 4096), slots.flatten(), slots)
    run("weighted_swiglu_triton", rows, meta(1 << 20))


def test_tokens_far_apart():
    """64 of them are 2^32 elements apart: they are copied side by side first."""
    x = torch.empty_strided((1, 64, 1, 16), (1 << 40, 1 << 26, 16, 1), dtype=torch.float16, device="meta")
    decay = meta(1, 16, 16, dtype=torch.float32)
    programs = {
        "linear_recurrence": lambda x: linear_recurrence(x, x, x, backend="triton")[0],
        "elementwise_recurrence": lambda x: elementwise_recurrence(x, x, x, log_decay=decay, backend="triton")[0],
        "causal_conv": lambda x: causal_conv(x.flatten(2), meta(16, 4)),
    }
    for name, program in programs.items():
        calls = recorded(partial(program, x.detach().requires_grad_()))
        assert [call.operation for call in calls] == [name] * 2
        for call in calls:
            run(call.name.removeprefix("torchlmoe::"), *call.args)


def test_grids_of_many_programs(monkeypatch):
    """What has no bound, such as rows, tokens and heads, is in the first dimension of the grid."""
    grids = []

    def launch(kernel, grid):
        grids.append(grid)
        return lambda *args, **options: None

    monkeypatch.setattr(KernelInterface, "__getitem__", launch)
    q, v = meta(2, 3, MOST + 1, 2), meta(2, 3, MOST + 1, 4)
    decay = meta(MOST + 1, 2, 4, dtype=torch.float32)
    states = meta(2, MOST + 1, 2, 4, dtype=torch.float32)
    elementwise = (q, q, v, decay, None, None, None)
    cases = {
        "linear_recurrence_triton": recurrence(1, MOST + 1),
        "elementwise_recurrence_triton": elementwise,
        "elementwise_recurrence_triton_backward": (v, states, *elementwise, states),
        "causal_conv_triton": (meta(MOST + 1, 64, 64), meta(64, 4), None, None, None, True),
        "permute_triton": (meta(1 << 21, 64), meta(1 << 21, dtype=torch.int64), meta(1 << 21, 1, dtype=torch.int64)),
        "weighted_swiglu_triton": (meta(1 << 20, 64), meta(1 << 20)),
        "gated_rms_norm_triton": (meta(1 << 21, 64), meta(64), None, 1 / 64, 1e-6, "none"),
    }
    with machine("sm_90"):
        for name, args in cases.items():
            before = len(grids)
            torch._library.custom_ops.OPDEFS[f"torchlmoe::{name}"]._init_fn(*args)
            assert len(grids) > before, name
    assert max(grid[0] for grid in grids) > MOST
    assert all(size <= MOST for grid in grids for size in grid[1:])
