"""Styles of heads: a layer whose heads are spread over ranks equals that on one process, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from torchlmoe.styles.heads import EnterHeads, HeadParameters, LeaveHeads, NormOverHeads, SumHeads, read_local_parts
from torchlmoe.vendoring.checks.ranks import NUMBERS_OF_RANKS, on_ranks, span_of


class Projection(nn.Module):
    def __init__(self, out_features: int, in_features: int, seed: int, bias: bool = False):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(out_features, in_features, dtype=torch.float64, generator=generator))
        self.bias = nn.Parameter(torch.linspace(-1, 2, out_features, dtype=torch.float64)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class NormOfAll(nn.Module):
    """RMS norm of 6 channels, of which a rank may have a part."""

    total = None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1, 2, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        squares = x.square().sum(-1, keepdim=True)
        squares = squares if self.total is None else self.total(squares)
        return x * (squares / 6 + 1e-6).rsqrt() * self.weight


class Layer(nn.Module):
    """Into 6 channels, a norm of all of them, out and in again, and out, with a bias on each sum over heads."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.between = Projection(6, 4, 1), NormOfAll(), Projection(4, 6, 2, bias=True)
        self.again, self.out = Projection(6, 4, 3), Projection(4, 6, 4, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.again(self.between(self.norm(self.into(x))).sin()).tanh())


def check_heads(mesh: DeviceMesh) -> None:
    x = torch.randn(2, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    whole, layer = Layer(), Layer()
    given = x.clone().requires_grad_()
    expected = whole(given)
    (expected * weight).sum().backward()
    dims = {"into": 0, "norm": 0, "between": 1, "again": 0, "out": 1}
    parallelize_module(layer, mesh, {name: HeadParameters({"weight": dim}) for name, dim in dims.items()})
    parallelize_module(layer, mesh, {"norm": NormOverHeads(), "between": SumHeads(), "out": LeaveHeads()})
    parallelize_module(layer, mesh, EnterHeads())
    read_local_parts(layer)
    part = span_of(x, mesh).clone().requires_grad_()
    found = layer(part)
    (found * span_of(weight, mesh)).sum().backward()
    torch.testing.assert_close(found, span_of(expected, mesh), rtol=1e-9, atol=1e-11)
    assert given.grad is not None
    torch.testing.assert_close(part.grad, span_of(given.grad, mesh), rtol=1e-9, atol=1e-11)
    for name, parameter in whole.named_parameters():
        module, _, key = name.rpartition(".")
        gradient = layer.get_submodule(module)._parameters[key].grad.full_tensor()  # type: ignore[union-attr]
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("world_size", NUMBERS_OF_RANKS)
def test_heads_on_ranks(world_size):
    on_ranks(world_size, check_heads)
