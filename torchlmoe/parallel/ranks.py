"""Knows the rows of each rank, and sums figures over ranks without counting any twice."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchlmoe.config.settings import Parallelism
from torchlmoe.parallel.mesh import build_mesh, expert_mesh, parameter_mesh, pieces_mesh, set_timeouts

# Axes whose ranks have the same rows of data.
_SAME_ROWS = ("pp", "cp", "tp")


class Ranks:
    """The meshes of a run, seen from one rank.

    mesh: axes pp, dp_replicate, dp_shard, cp, tp. parameters: the mesh of FSDP. pieces: the ranks of one microbatch, in
    the order of its tokens. experts: axes pp, dp_replicate, efsdp, ep, over which experts are spread.
    num_row_places: number of groups of ranks with the same rows. row_index: index of this rank's group.
    """

    def __init__(self, degrees: Parallelism, device_type: str):
        self.mesh = mesh = build_mesh(degrees, device_type)
        self.parameters, self.pieces = parameter_mesh(mesh), pieces_mesh(mesh)
        self.experts = expert_mesh(mesh, degrees.expert_parallel_degree)
        set_timeouts((mesh, self.parameters, self.pieces, self.experts), degrees.timeout_seconds)
        replicate, shard = mesh["dp_replicate"], mesh["dp_shard"]
        self.row_index = replicate.get_local_rank() * shard.size() + shard.get_local_rank()
        self.num_row_places = replicate.size() * shard.size()

    @property
    def spreads_experts(self) -> bool:
        """Whether experts are sharded over other ranks than the parameters around them."""
        return self.experts["ep"].size() > 1 or self.mesh["tp"].size() > 1

    @property
    def expert_parameters(self) -> DeviceMesh:
        """The mesh over which FSDP shards experts."""
        has_replicas = self.experts["dp_replicate"].size() > 1
        return self.experts["dp_replicate", "efsdp"] if has_replicas else self.experts["efsdp"]

    def __getitem__(self, axis: str) -> DeviceMesh:
        return self.mesh[axis]

    @property
    def world_size(self) -> int:
        return self.mesh.size()

    def total(self, figure: Tensor) -> Tensor:
        """Sum over all ranks, in place, a figure of which each rank has its own part: losses, counters, signals."""
        dist.all_reduce(figure)
        return figure

    def total_of_rows(self, figure: Tensor) -> Tensor:
        """Sum over all rows a figure that is equal on ranks with the same rows, such as the number of labels."""
        return self.total(self._once(figure, _SAME_ROWS))

    def own_loss(self, loss: Tensor) -> Tensor:
        """Return the loss on the first rank of `tp`, and zero on its other ranks, which have the same loss."""
        return self._once(loss, ("tp",))

    def _once(self, figure: Tensor, axes: tuple[str, ...]) -> Tensor:
        """Return the figure on the first rank of some axes, and zero on the others. Dividing a sum would round."""
        is_first = all(self.mesh[axis].get_local_rank() == 0 for axis in axes)
        return figure if is_first else torch.zeros_like(figure)
