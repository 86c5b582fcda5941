"""A block compiled as one graph equals the eager one, and neither new documents nor new lengths compile it anew."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.parallel.small_blocks import PACKED, block_of, run
from torchlmoe.mixers import MIXERS
from torchlmoe.parallel.compile import compile_block
from torchlmoe.parallel.precision import compute_in
from torchlmoe.parallel.recompute import recompute


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def assert_equal_and_compiled_once(block, compiled, dtype, tolerance=1e-12):
    """aot_eager traces all that inductor would compile, without waiting for the C++ compiler."""
    compile_block(compiled, backend="aot_eager")
    for bounds, num_graphs in zip(PACKED, (1, 1, 2, 2), strict=True):  # the second is for all lengths
        found, expected = run(compiled, bounds, dtype), run(block, bounds, dtype)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert counters["stats"]["unique_graphs"] == num_graphs


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_is_one_graph(mixer):
    assert_equal_and_compiled_once(block_of(mixer, "dense"), block_of(mixer, "dense"), torch.float64)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_experts_bfloat16_and_recompute(mode):
    """In bfloat16 on a CPU the experts' runs are filled up, by a number that depends on the choices."""
    block, compiled = (block_of("gated_deltanet", dtype=torch.float32, num_shared_experts=1) for _ in range(2))
    if mode != "none":
        recompute(compiled, mode)
    for each in (block, compiled):
        compute_in(torch.bfloat16, each)
    assert_equal_and_compiled_once(block, compiled, torch.bfloat16, tolerance=1e-2)


def test_equal_blocks_share_their_graph():
    blocks = [block_of("bla", "dense", torch.float32) for _ in range(3)]
    for block in blocks:
        recompute(block, "full")
        compute_in(torch.bfloat16, block)
        compile_block(block, backend="aot_eager")
        run(block, PACKED[0], torch.bfloat16)
    assert counters["stats"]["unique_graphs"] == 1
