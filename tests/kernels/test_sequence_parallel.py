"""Kernels under sequence parallelism: two and three gloo ranks equal one process, outputs and gradients."""

import pytest
import torch

from tests.conftest import run_on_ranks
from tests.kernels.conftest import faster_interpreter
from tests.parallel.test_sequence_parallel import assert_ranks_equal_one

WANTED = {
    "LinearRecurrence": ("both sides", "own erase key"),
    "ElementwiseRecurrence": ("step",),
}


def kernels(communication):
    def wanted(kind, name, row_name):
        return name in WANTED.get(kind, ()) and row_name == "straddling"

    with faster_interpreter():
        assert_ranks_equal_one(communication, torch.float32, 1e-4, backend="triton", wanted=wanted)


@pytest.mark.parametrize(("world_size", "communication"), [(2, "all_gather"), (3, "ring")])
def test_ranks_equal_one_process(world_size, communication):
    run_on_ranks(world_size, kernels, communication)
