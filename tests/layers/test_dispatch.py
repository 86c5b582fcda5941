"""The way to the experts and back against plain indexing, and its gradients against finite differences."""

import pytest
import torch

from torchlmoe.ops.grouped_matmul import grouped_matmul
from torchlmoe.routing.dispatch import Slots, gather_slots, reorder_choices, sum_slots

NUM_EXPERTS, TOP_K, DIM = 5, 3, 4


def make_choices(num_tokens):
    """Experts 1 and 4 are never chosen in half of the cases."""
    generator = torch.Generator().manual_seed(num_tokens)
    wanted = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    if num_tokens % 2:
        wanted[:, [1, 4]] = -1
    return wanted.topk(TOP_K).indices


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 20])
def test_order(num_tokens):
    expert_TK = make_choices(num_tokens)
    slots = Slots.sorted_by_expert(expert_TK, NUM_EXPERTS)
    by_hand = [
        (expert, token, k)
        for expert in range(NUM_EXPERTS)
        for token in range(num_tokens)
        for k in range(TOP_K)
        if expert_TK[token, k] == expert
    ]
    counts = [sum(slot[0] == expert for slot in by_hand) for expert in range(NUM_EXPERTS)]
    assert slots.token_M.tolist() == [token for _, token, _ in by_hand]
    assert slots.choice_M.tolist() == [token * TOP_K + k for _, token, k in by_hand]
    assert slots.offset_E.dtype is torch.int32
    assert slots.offset_E.tolist() == [sum(counts[: expert + 1]) for expert in range(NUM_EXPERTS)]
    counted_T = torch.arange(num_tokens) % 3 != 1
    place_TK = slots.place_TK(expert_TK, counted_T)
    for slot, (expert, token, k) in enumerate(by_hand):
        assert slots.slot_TK[token, k] == slot
        before = by_hand[sum(counts[:expert]) : slot]
        assert place_TK[token, k] == sum(counted_T[other].item() for _, other, _ in before)


@pytest.mark.parametrize("num_tokens", [0, 1, 20])
def test_values_and_gradients(num_tokens):
    slots = Slots.sorted_by_expert(make_choices(num_tokens), NUM_EXPERTS)
    generator = torch.Generator().manual_seed(0)
    x_TD, x_MD, x_TK = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((num_tokens, DIM), (num_tokens * TOP_K, DIM), (num_tokens, TOP_K))
    )
    token_M, k_M = slots.choice_M // TOP_K, slots.choice_M % TOP_K
    summed = torch.zeros(num_tokens, DIM, dtype=torch.float64).index_add(0, token_M, x_MD)
    torch.testing.assert_close(gather_slots(x_TD, slots), x_TD[token_M], rtol=0, atol=0)
    torch.testing.assert_close(sum_slots(x_MD, slots), summed, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(reorder_choices(x_TK, slots), x_TK[token_M, k_M], rtol=0, atol=0)
    if num_tokens:
        for function, x in ((gather_slots, x_TD), (sum_slots, x_MD), (reorder_choices, x_TK)):
            torch.autograd.gradcheck(lambda x, f=function: f(x, slots), x)
            torch.autograd.gradgradcheck(lambda x, f=function: f(x, slots), x)


def test_low_precision_is_summed_in_float32():
    """1 + 2^-8 + 2^-8 is a bfloat16 number, but not if the first sum is rounded."""
    slots = Slots.sorted_by_expert(torch.tensor([[0, 1, 2]]), 3)
    x = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)
    assert sum_slots(x, slots).item() == 1 + 2.0**-7


@pytest.mark.parametrize("num_tokens", [0, 1, 20])
def test_padded_runs_change_nothing(num_tokens):
    """Runs of a multiple of 8 slots: the same sum over experts, and the same gradients, as without padding."""
    expert_TK = make_choices(num_tokens)
    generator = torch.Generator().manual_seed(0)
    results = []
    for alignment in (1, 8):
        x_TD, weight_TK, weight_EDD = (
            torch.randn(shape, dtype=torch.float64, generator=generator.manual_seed(0), requires_grad=True)
            for shape in ((num_tokens, DIM), (num_tokens, TOP_K), (NUM_EXPERTS, DIM, DIM))
        )
        slots = Slots.sorted_by_expert(expert_TK, NUM_EXPERTS, alignment)
        assert not (slots.offset_E % alignment).any()
        weighted = gather_slots(x_TD, slots) * reorder_choices(weight_TK, slots)[:, None]
        y = sum_slots(grouped_matmul(weighted, weight_EDD, slots.offset_E), slots)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x_TD, weight_TK, weight_EDD))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
