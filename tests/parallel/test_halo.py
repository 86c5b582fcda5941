"""Convolutions and token shift on a split sequence equal the whole one: outputs, gradients, traffic, refusals."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from tests.conftest import run_on_ranks
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.layers.short_convolution import ShortConvolution
from torchlmoe.layers.token_shift import TokenShift
from torchlmoe.styles.halo import ConvHalo, TokenShiftHalo

CHANNELS, LENGTH = 3, 24
# Documents that begin and end at borders of 2, 3 or 4 spans and beside them, straddle all, have one token or none.
DOCUMENTS = [
    [0, 24],
    [0, 6, 8, 12, 16, 18, 24],
    [0, 5, 7, 11, 13, 15, 17, 19, 23, 24],
    [0, 1, 6, 6, 7, 8, 9, 11, 12, 12, 13, 24],
]


def modules():
    """By name, all with the same weights on every rank."""
    named = {
        "shift": TokenShift(CHANNELS),
        "1": ShortConvolution(CHANNELS, 1, bias=True),
        "2": ShortConvolution(CHANNELS, 2, bias=True, activation=False),
        "3": ShortConvolution(CHANNELS, 3, bias=True),
        "4": ShortConvolution(CHANNELS, 4),
    }
    generator = torch.Generator().manual_seed(0)
    for module in named.values():
        for parameter in module.double().parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return named


def inputs(bounds):
    """x, the gradient of y, and the layout: of one packed row, or of two rows where bounds are None."""
    rows = 2 if bounds is None else 1
    x, grad = torch.randn(2, rows, LENGTH, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if bounds is None:
        return x, grad, SequenceLayout.of_rows(rows, LENGTH)
    return x, grad, SequenceLayout.of_packed_rows(torch.tensor([bounds], dtype=torch.int32), LENGTH)


def run(module, x, grad, sequence):
    x = x.clone().requires_grad_()
    y = module(x, sequence=sequence)
    y.backward(grad)
    return y.detach(), x.grad


def call(module, x, sequence):
    return module(x, sequence=sequence)


def spans(world_size, rank, *tensors):
    return [tensor.chunk(world_size, 1)[rank] for tensor in tensors]


def check_all(world_size: int, compiled: tuple[str, ...] = ()) -> None:
    """compiled: if any, the modules to check; otherwise all, as they are."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("cp",))
    rank = mesh.get_local_rank()
    for name, whole in modules().items():
        if compiled and name not in compiled:
            continue
        split = copy.deepcopy(whole)
        style = split.context_parallel_style("all_gather", "all_gather")
        assert isinstance(style, TokenShiftHalo if name == "shift" else ConvHalo)
        parallelize_module(split, mesh, style)
        # A function around it, as a block is: what is compiled from outside leaves a module's hooks out.
        torch._dynamo.reset()
        function = torch.compile(partial(call, split), fullgraph=True, backend="aot_eager") if compiled else split
        for bounds in [None, *DOCUMENTS]:
            x, grad, sequence = inputs(bounds)
            whole.zero_grad()
            split.zero_grad()
            expected = spans(world_size, rank, *run(whole, x, grad, sequence))
            x, grad, positions = spans(world_size, rank, x, grad, sequence.positions)
            found = run(function, x, grad, replace(sequence, positions=positions))
            torch.testing.assert_close(found, tuple(expected), rtol=1e-9, atol=1e-12, msg=f"{name} {bounds}")
            for part, parameter in zip(split.parameters(), whole.parameters(), strict=True):
                dist.all_reduce(part.grad)
                torch.testing.assert_close(part.grad, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world_size", [3, 4, pytest.param(2, marks=pytest.mark.long)])
def test_equals_the_whole_sequence(world_size):
    run_on_ranks(world_size, check_all, world_size)


def check_graph_traffic_and_refusals() -> None:
    check_all(2, compiled=("shift", "4"))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    whole = modules()["4"]
    x, grad, sequence = inputs(DOCUMENTS[0])
    expected = spans(2, mesh.get_local_rank(), *run(whole, x, grad, sequence))
    x, grad, positions = spans(2, mesh.get_local_rank(), x, grad, sequence.positions)
    sequence = replace(sequence, positions=positions)
    parallelize_module(whole, mesh, ConvHalo())
    with CommDebugMode() as communication:
        found = run(whole, x, grad, sequence)
    torch.testing.assert_close(found, tuple(expected), rtol=1e-9, atol=1e-12)
    counts = {str(operation): count for operation, count in communication.get_comm_counts().items()}
    assert counts == {"c10d_functional.all_to_all_single": 2}  # one forward, one backward
    with pytest.raises(ValueError, match=r"A span of 2 tokens is shorter than the 3 that ShortConvolution looks back"):
        whole(x[:, :2], sequence=sequence)
    with pytest.raises(ValueError, match="A cache holds whole rows"):
        whole(x, sequence=sequence, cache=whole.init_cache(1, torch.float64))


def test_one_graph_one_collective_each_way_and_refusals():
    run_on_ranks(2, check_graph_traffic_and_refusals)
