"""ConvHalo: a causal convolution on spans of a row equals that on one process, forward and backward."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchlmoe.styles.halo import ConvHalo
from torchlmoe.vendoring.checks.halos import Places, check_halo
from torchlmoe.vendoring.checks.ranks import NUMBERS_OF_RANKS, on_ranks


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64, generator=generator))  # [channels, width]

    def forward(self, x: Tensor, *, sequence: Places, cache: None = None) -> Tensor:
        bounds = [0, x.shape[1]] if sequence.cu_seqlens is None else sequence.cu_seqlens.tolist()
        outputs = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            padded = nn.functional.pad(x[:, start:end], (0, 0, 3, 0))
            if start < end:
                outputs.append((padded.unfold(1, 4, 1) * self.weight).sum(-1))
        return torch.cat(outputs, 1)


def check_convolution(mesh: DeviceMesh) -> None:
    check_halo(mesh, Convolution(), ConvHalo())


@pytest.mark.parametrize("world_size", NUMBERS_OF_RANKS)
def test_convolution_on_ranks(world_size):
    on_ranks(world_size, check_convolution)
