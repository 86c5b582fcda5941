"""The kernels permute and unpermute: equal indexing, with its gradients."""

import pytest
import torch

from torchlmoe.vendoring.checks.by_formula import DEVICE, assert_equals_formula, random_tensors

CHOICE = torch.randperm(21, generator=torch.Generator().manual_seed(0))  # that each slot serves: 7 tokens, 3 each
TOKEN, SLOT = CHOICE // 3, CHOICE.argsort().view(7, 3)


def test_permute_kernel():
    from torchlmoe.kernels.moe_permute import permute

    places = TOKEN.to(DEVICE), SLOT.to(DEVICE)
    assert_equals_formula(lambda x: [permute(x, *places)], lambda x: [x[TOKEN]], random_tensors((7, 20)))


@pytest.mark.parametrize("weighted", [False, True])
def test_unpermute_kernel(weighted):
    from torchlmoe.kernels.moe_permute import unpermute

    places = TOKEN.to(DEVICE), SLOT.to(DEVICE)
    assert_equals_formula(
        lambda x, weight=None: [unpermute(x, *places, weight)],
        lambda x, weight=1.0: [(x[SLOT] * (weight[..., None] if weighted else 1.0)).sum(1)],
        random_tensors((21, 20), *([(7, 3)] if weighted else [])),
    )
