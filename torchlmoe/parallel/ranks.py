"""The rows of each rank, and sums over ranks that count nothing twice."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchlmoe.config.settings import Parallelism
from torchlmoe.parallel.mesh import build_mesh, expert_mesh, parameter_mesh, pieces_mesh, set_timeouts

# Axes whose ranks have the same rows of data.
_SAME_ROWS = ("pp", "cp", "tp")


class Ranks:
    """The mesh, and the groups of ranks with the same rows, tokens or experts. Every rank of a run has one.

    mesh: axes pp, dp_replicate, dp_shard, cp, tp. parameters: what FSDP works on. pieces: the ranks of one microbatch,
    with its tokens in order. experts: axes pp, dp_replicate, efsdp, ep, on which experts live. row_index,
    num_row_places: the place of this rank's rows among those of all ranks, and how many places there are; ranks with
    the same rows share one.
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
        """Whether experts live on other ranks than the parameters around them."""
        return self.experts["ep"].size() > 1 or self.mesh["tp"].size() > 1

    @property
    def expert_parameters(self) -> DeviceMesh:
        """Return the mesh over which FSDP shards experts."""
        has_replicas = self.experts["dp_replicate"].size() > 1
        return self.experts["dp_replicate", "efsdp"] if has_replicas else self.experts["efsdp"]

    def __getitem__(self, axis: str) -> DeviceMesh:
        return self.mesh[axis]

    @property
    def world_size(self) -> int:
        return self.mesh.size()

    def total(self, figure: Tensor) -> Tensor:
        """Sum over all ranks, in place, a figure of which each rank has a separate part: losses, counters, signals."""
        dist.all_reduce(figure)
        return figure

    def total_of_rows(self, figure: Tensor) -> Tensor:
        """Sum over all rows a figure that is equal on ranks with the same rows, such as the number of labels."""
        return self.total(self._once(figure, _SAME_ROWS))

    def own_loss(self, loss: Tensor) -> Tensor:
        """Return the loss on the first rank of `tp`, and zero on its other ranks, which have the same loss."""
        return self._once(loss, ("tp",))

    def _once(self, figure: Tensor, axes: tuple[str, ...]) -> Tensor:
        """Return the figure on the first rank of some axes and zero on the others. Dividing a sum would round."""
        is_first = all(self.mesh[axis].get_local_rank() == 0 for axis in axes)
        return figure if is_first else torch.zeros_like(figure)
