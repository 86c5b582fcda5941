"""ElementwiseSequenceParallel: a recurrence of elements on spans of a row equals that on one process."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from torchlmoe.styles.recurrence import ElementwiseSequenceParallel
from torchlmoe.vendoring.checks.element_by_element import element_by_element
from torchlmoe.vendoring.checks.ranks import NUMBERS_OF_RANKS, assert_gradients_equal, on_ranks, span_of

BOUNDS_OF_ROW = (None, [0, 12], [0, 1, 5, 5, 12], [0, 4, 6, 7, 8, 12])


class ElementwiseLoop(nn.Module):
    def forward(self, q, k, v, **terms):
        return element_by_element(q, k, v, **terms)


def map_of_span(k: Tensor, v: Tensor, *, log_decay: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The affine map of a row or of each packed document: what becomes of ones, nothing being added, and of zero."""
    ones = v.new_ones(1 if cu_seqlens is None else len(cu_seqlens) - 1, v.shape[2], k.shape[-1], v.shape[3])
    terms: dict[str, Any] = dict(log_decay=log_decay, cu_seqlens=cu_seqlens)
    kept = element_by_element(k, k, torch.zeros_like(v), initial_state=ones, **terms)[1]
    return kept, element_by_element(k, k, v, **terms)[1]


def check_elements(mesh: DeviceMesh) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (3,), "k": (3,), "v": (4,), "log_decay": (3, 4)}
    tensors = {name: torch.randn(1, 12, 2, *w, dtype=torch.float64, generator=generator) for name, w in shapes.items()}
    tensors["log_decay"] = -tensors["log_decay"].abs() / 4
    for bounds in BOUNDS_OF_ROW:
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        whole: dict[str, Any] = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        expected = element_by_element(**whole, cu_seqlens=cu_seqlens)[0]
        weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
        (expected * weight).sum().backward()
        for communication in ("all_gather", "ring"):
            style = ElementwiseSequenceParallel(communication, span_summary=map_of_span)
            module = parallelize_module(ElementwiseLoop(), mesh, style)
            parts = {name: span_of(x, mesh).detach().clone().requires_grad_() for name, x in whole.items()}
            o = module(**parts, cu_seqlens=cu_seqlens)[0]
            (o * span_of(weight, mesh)).sum().backward()
            torch.testing.assert_close(o, span_of(expected, mesh), rtol=1e-9, atol=1e-11)
            assert_gradients_equal(mesh, ((parts[name].grad, x.grad, True) for name, x in whole.items()))


@pytest.mark.parametrize("world_size", NUMBERS_OF_RANKS)
def test_elements_on_ranks(world_size):
    on_ranks(world_size, check_elements)
