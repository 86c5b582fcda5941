"""TokenShiftHalo: what looks at the token before, on spans of a row, equals that on one process."""

import pytest
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchlmoe.styles.halo import TokenShiftHalo
from torchlmoe.vendoring.checks.halos import Places, check_halo
from torchlmoe.vendoring.checks.ranks import NUMBERS_OF_RANKS, on_ranks


class Shift(nn.Module):
    def forward(self, x: Tensor, *, sequence: Places, cache: None = None) -> Tensor:
        shifted = nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return shifted.masked_fill(sequence.positions[..., None] == 0, 0)


def check_shift(mesh: DeviceMesh) -> None:
    check_halo(mesh, Shift(), TokenShiftHalo())


@pytest.mark.parametrize("world_size", NUMBERS_OF_RANKS)
def test_shift_on_ranks(world_size):
    on_ranks(world_size, check_shift)
