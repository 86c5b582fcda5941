"""Who has what: the rows of a rank, and over which ranks a figure is summed without counting anything twice."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchlmoe.config.settings import Parallelism
from torchlmoe.parallel.mesh import build_mesh, parameter_mesh

# Axes whose ranks have the same rows of data.
_SAME_ROWS = ("cp",)


class Ranks:
    """The mesh, by what its axes share. Every rank of the run has one.

    mesh: axes dp_replicate, dp_shard, cp. parameters: what FSDP works on. row_index, num_row_places: the place of this
    rank's rows among those of all ranks, and how many places there are; ranks with the same rows share one.
    """

    def __init__(self, mesh: DeviceMesh):
        self.mesh = mesh
        self.parameters = parameter_mesh(mesh)
        replicate, shard = mesh["dp_replicate"], mesh["dp_shard"]
        self.row_index = replicate.get_local_rank() * shard.size() + shard.get_local_rank()
        self.num_row_places = replicate.size() * shard.size()
        self._is_first_with_rows = all(mesh[axis].get_local_rank() == 0 for axis in _SAME_ROWS)

    @classmethod
    def of(cls, degrees: Parallelism, device_type: str) -> "Ranks":
        """All ranks of the process group, with the given degrees."""
        return cls(build_mesh(degrees, device_type))

    def __getitem__(self, axis: str) -> DeviceMesh:
        return self.mesh[axis]

    @property
    def world_size(self) -> int:
        return self.mesh.size()

    def total(self, figure: Tensor) -> Tensor:
        """The sum over all ranks, in place, of what each of them has its own part of: losses, counters, signals."""
        dist.all_reduce(figure)
        return figure

    def total_of_rows(self, figure: Tensor) -> Tensor:
        """The sum over all rows of what ranks with the same rows know alike, such as the number of labels."""
        # From the first of them alone, rather than divided afterwards, which would round.
        return self.total(figure if self._is_first_with_rows else torch.zeros_like(figure))
