"""pair_products: inner products are squares, and gradients are those of finite differences."""

import torch

from torchlmoe.ops.pair_products import pair_products


def test_inner_products_are_squares():
    torch.manual_seed(0)
    x, y = (torch.randn(3, 5, 6, dtype=torch.float64) for _ in range(2))
    products = [pair_products(z) for z in (x, y)]
    assert products[0].shape == (3, 5, 21)
    torch.testing.assert_close((products[0] * products[1]).sum(-1), (x * y).sum(-1).square())


def test_gradients_of_products():
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(pair_products, torch.randn(4, 5, dtype=torch.float64, requires_grad=True))
