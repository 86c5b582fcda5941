"""What the checks of halos share: a module that looks back, on spans of rows and of packed documents."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from torchlmoe.vendoring.checks.ranks import assert_gradients_equal, span_of


@dataclass(frozen=True)
class Places:
    """positions: [B, T], each token's place in its document. cu_seqlens: bounds of packed documents, or None."""

    positions: Tensor
    cu_seqlens: Tensor | None


def check_halo(mesh: DeviceMesh, module: nn.Module, style: ParallelStyle) -> None:
    """The module, called before and after it is split, gives the same outputs and gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 3, dtype=torch.float64, generator=generator)
    rows = Places(torch.arange(12).expand(2, -1), None)
    cases = [(x, rows)]
    for bounds in ([0, 12], [0, 1, 5, 5, 12], [0, 4, 6, 7, 8, 12]):
        lengths = zip(bounds, bounds[1:], strict=False)
        positions = torch.cat([torch.arange(end - start) for start, end in lengths])[None]
        cases.append((x[:1], Places(positions, torch.tensor(bounds, dtype=torch.int32))))
    parameters = list(module.parameters())
    results = []
    for split in (False, True):
        if split:
            module = parallelize_module(module, mesh, style)
        for x, places in cases:
            given = (span_of(x, mesh) if split else x).detach().clone().requires_grad_()
            layout = Places(span_of(places.positions, mesh), places.cu_seqlens) if split else places
            y = module(given, sequence=layout)
            weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
            loss = (y * (span_of(weight, mesh) if split else weight)).sum()
            results.append((y, *torch.autograd.grad(loss, [given, *parameters])))
    for expected, found in zip(results[: len(cases)], results[len(cases) :], strict=True):
        torch.testing.assert_close(found[0], span_of(expected[0], mesh), rtol=1e-9, atol=1e-11)
        gradients = zip(found[1:], expected[1:], [True, *[False] * len(parameters)], strict=True)
        assert_gradients_equal(mesh, gradients)
