"""Kernels under sequence parallelism: two and three gloo ranks equal one process, outputs and gradients."""

import pytest
import torch

from tests.conftest import run_on_ranks
from tests.parallel.test_sequence_parallel import assert_ranks_equal_one

WANTED = {
    "LinearRecurrence": ("scalar", "both sides", "channel, bonus", "gated delta", "own erase key"),
    "ElementwiseRecurrence": ("step",),
}


def kernels():
    def wanted(kind, name, row_name):
        return name in WANTED.get(kind, ()) and row_name in ("straddling", "at borders")

    for communication in ("all_gather", "ring"):
        assert_ranks_equal_one(communication, torch.float32, 1e-4, backend="triton", wanted=wanted)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process(world_size):
    run_on_ranks(world_size, kernels)
