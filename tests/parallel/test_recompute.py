"""Recompute changes the kept tensors, not the results; choices of experts are kept, and each is counted once."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parallel.small_blocks import PACKED, block_of, run
from torchlmoe.mixers import MIXERS
from torchlmoe.parallel.precision import compute_in
from torchlmoe.parallel.recompute import recompute

MOE = dict(num_shared_experts=1, capacity_factor=1.0, z_loss_weight=0.1)


class Operations(TorchDispatchMode):
    """Counts the operations that run within it."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen[operation.overloadpacket._qualified_op_name] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_equals_no_recompute(mixer, mode):
    block, again = block_of(mixer, **MOE), block_of(mixer, **MOE)
    recompute(again, mode)
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in block.named_parameters()]
    expected = run(block, PACKED[0], torch.float64)
    torch.testing.assert_close(run(again, PACKED[0], torch.float64), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_one_process_in_bfloat16_casts_again(mode):
    block, again = block_of("gated_deltanet"), block_of("gated_deltanet")
    recompute(again, mode)
    results = []
    for each in (block, again):
        each.float()
        compute_in(torch.bfloat16, each)
        results.append(run(each, PACKED[0], torch.bfloat16))
        assert {parameter.grad.dtype for parameter in each.parameters()} == {torch.float32}
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def operations_of_backward(mode):
    block = block_of("gated_deltanet")
    if mode != "none":
        recompute(block, mode)
    with Operations() as operations:
        run(block, PACKED[0], torch.float64, before_backward=operations.seen.clear)
    return operations.seen


def test_what_runs_again():
    """Full recompute runs all but the choice of experts again; selective nothing that costs."""
    none, selective, full = (operations_of_backward(mode) for mode in ("none", "selective", "full"))
    for operation in ("torchlmoe::top_indices", "torchlmoe::sort_slots"):
        assert none[operation] == selective[operation] == full[operation] == 0
    for operation in ("torchlmoe::linear_recurrence", "torchlmoe::grouped_matmul", "aten::mm"):
        assert none[operation] == selective[operation] < full[operation]
    assert none["torchlmoe::causal_conv"] < selective["torchlmoe::causal_conv"] == full["torchlmoe::causal_conv"]
