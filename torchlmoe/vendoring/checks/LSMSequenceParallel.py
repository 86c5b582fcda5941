"""LSMSequenceParallel: a recurrence on spans of a row equals that on one process, forward and backward."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from torchlmoe.styles.recurrence import LSMSequenceParallel
from torchlmoe.vendoring.checks.ranks import NUMBERS_OF_RANKS, assert_gradients_equal, on_ranks, span_of
from torchlmoe.vendoring.checks.token_by_token import token_by_token

SHAPE = (1, 12, 2)  # rows, tokens, heads
# Beside q, k and v: shapes after those of SHAPE; None for the whole shape, of a number a head.
LAWS: dict[str, dict[str, tuple[int, ...] | None]] = {
    "nothing": {},
    "constant decay": {"log_decay": None},
    "decay": {"log_decay": ()},
    "decay on both sides": {"log_decay": (3,), "value_log_decay": (4,)},
    "decay per channel and bonus": {"log_decay": (3,), "bonus": None},
    "decay and delta rule": {"log_decay": (), "erase": ()},
    "decay per channel and delta rule": {"log_decay": (3,), "erase": (3,), "erase_key": (3,)},
}
# Documents that begin and end at borders of spans and beside them, straddle all of them, or are empty.
DOCUMENTS_OF_ROW = (None, [0, 12], [0, 1, 5, 5, 12], [0, 4, 6, 7, 8, 12])


class Recurrence(nn.Module):
    def forward(self, q, k, v, **terms):
        return token_by_token(q, k, v, **terms)


def terms_of(law: str) -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, width in ({"q": (3,), "k": (3,), "v": (4,)} | LAWS[law]).items():
        whole = (2, 3) if name == "bonus" else (2,)
        x = torch.randn(*(whole if width is None else (*SHAPE, *width)), dtype=torch.float64, generator=generator)
        tensors[name] = -x.abs() / 4 if "decay" in name else x.sigmoid() if width == () else x / 2
    return tensors


def check_recurrence(mesh: DeviceMesh) -> None:
    for law in LAWS:
        for bounds in DOCUMENTS_OF_ROW:
            cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
            whole: dict[str, Any] = {name: x.requires_grad_() for name, x in terms_of(law).items()}
            expected = token_by_token(**whole, scale=0.5, cu_seqlens=cu_seqlens)[0]
            weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
            (expected * weight).sum().backward()
            for communication in ("all_gather", "ring"):
                module = parallelize_module(Recurrence(), mesh, LSMSequenceParallel(communication))
                of_tokens = {name: x.dim() > 2 for name, x in whole.items()}
                parts = {
                    name: (span_of(x, mesh) if of_tokens[name] else x).detach().clone().requires_grad_()
                    for name, x in whole.items()
                }
                o = module(**parts, scale=0.5, cu_seqlens=cu_seqlens)[0]
                (o * span_of(weight, mesh)).sum().backward()
                torch.testing.assert_close(o, span_of(expected, mesh), rtol=1e-9, atol=1e-11)
                assert_gradients_equal(mesh, ((parts[name].grad, x.grad, of_tokens[name]) for name, x in whole.items()))


@pytest.mark.parametrize("world_size", NUMBERS_OF_RANKS)
def test_recurrence_on_ranks(world_size):
    on_ranks(world_size, check_recurrence)
