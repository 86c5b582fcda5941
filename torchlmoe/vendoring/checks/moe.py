"""MoE: equals a loop over experts, forward and backward, keeps to its capacity, and balances."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.layers.sequence import SequenceLayout

ROUTED: dict[str, Any] = dict(num_experts=6, top_k=2, expert_dim=10)
WIDTH = 8


def layer(**options: Any) -> MoE:
    torch.manual_seed(0)
    moe = MoE(WIDTH, **(ROUTED | options), init_std=0.5)
    moe.init_weights()
    return moe.double()


def swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ gate_up.mT).chunk(2, -1)
    return (F.silu(gate) * up) @ down.mT


def by_loop(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """Softmax over all experts, the best two, their weights made to sum to one."""
    probability = F.linear(x, moe.router.weight.to(x.dtype)).softmax(-1)
    weight, chosen = probability.topk(2)
    weight = weight / weight.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for expert in range(ROUTED["num_experts"]):
        share = (weight * (chosen == expert)).sum(-1, keepdim=True)
        y = y + share * swiglu(x, moe.experts.gate_up_proj[expert], moe.experts.down_proj[expert])
    return y


@pytest.mark.parametrize("shared", [False, True])
def test_equals_a_loop_over_experts(shared):
    moe = layer(**(dict(num_shared_experts=1, shared_expert_gate=True) if shared else {}))
    x = torch.randn(2, 15, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = by_loop(moe, x)
    if moe.shared_expert is not None and moe.shared_expert_gate is not None:
        expected = expected + moe.shared_expert_gate(x).sigmoid() * moe.shared_expert(x)
    found = moe(x, sequence=SequenceLayout.of_rows(2, 15, loss_weight=0.0))
    torch.testing.assert_close(found, expected)
    leaves, weight = [x, *moe.parameters()], torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, weight) for y in (found, expected)))


def test_capacity_drops_in_training_alone():
    moe, x = layer(capacity_factor=0.5), torch.randn(1, 30, WIDTH, dtype=torch.float64)
    dense, sequence = by_loop(moe, x), SequenceLayout.of_rows(1, 30)
    torch.testing.assert_close(moe.eval()(x, sequence=sequence), dense)
    moe.train()(x, sequence=sequence).sum().backward()
    counted = moe.pop_counters()
    assert counted["counts"].sum() == 60
    room = -(-60 // 2 // ROUTED["num_experts"])
    assert counted["dropped"] == (counted["counts"] - room).clamp(min=0).sum() > 0


def test_balance_loss_is_injected_in_the_backward():
    """Its gradient reaches the router without a path through the output."""
    x = torch.randn(1, 30, WIDTH, dtype=torch.float64)
    gradients = []
    for weight in (0.0, 0.5):
        moe = layer(aux_loss_weight=weight)
        moe(x, sequence=SequenceLayout.of_rows(1, 30)).sum().backward()
        assert moe.router.weight.grad is not None
        gradients.append(moe.router.weight.grad)
        counted = moe.pop_counters()
        probability = F.linear(x[0], moe.router.weight.double()).softmax(-1)
        fraction = counted["counts"] / counted["counts"].sum()
        loss = weight * ROUTED["num_experts"] * (fraction * probability.mean(0)).sum()
        torch.testing.assert_close(counted["aux_loss"], loss.detach())
    (expected,) = torch.autograd.grad(loss, moe.router.weight)
    torch.testing.assert_close(gradients[1] - gradients[0], expected)
