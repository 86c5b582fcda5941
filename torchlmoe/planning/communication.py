"""Counts the bytes of collectives and sends by mesh axis: those of FSDP, functional ones and ours."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchlmoe.parallel.ranks import Ranks
from torchlmoe.styles import recurrence

# By operation: the collective's name, and which argument holds its bytes, "out" for its result.
_COLLECTIVES: dict[str, tuple[str, int | str]] = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_reduce_": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", "out"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0),
    "_c10d_functional::broadcast": ("broadcast", 0),
    "torchlmoe::exchange_counts": ("all_to_all", 0),
    f"{recurrence._NAMESPACE}::send_state": ("send", 1),
    f"{recurrence._NAMESPACE}::send_gradient": ("send", 0),
}


@dataclass(frozen=True)
class Message:
    """One collective as a rank takes part in it.

    axis: of the mesh. num_ranks: that take part. num_bytes: of what the rank sends: its part of an all-to-all, a tensor
        to another rank, the whole of what is reduced, or, of an all-gather, the whole of what is gathered.
    """

    axis: str
    collective: str
    num_ranks: int
    num_bytes: int


class Communication:
    """messages: by phase of the step, how often each was sent."""

    def __init__(self, ranks: Ranks):
        self.messages: dict[Hashable, Counter[Message]] = {}
        self._axes = _axes(ranks)

    def see(self, phase: Hashable, operation: torch._ops.OpOverload, arguments: Sequence[Any], result: Any) -> None:
        """Count an operation, if it is a collective or a send between two or more ranks."""
        known = _COLLECTIVES.get(operation._schema.name)
        if known is None:
            return
        collective, place = known
        tensors = result if place == "out" else arguments[place]  # type: ignore[index]
        num_bytes = sum(x.numel() * x.element_size() for x in ([tensors] if isinstance(tensors, Tensor) else tensors))
        axis, num_ranks = self._axes.get(_group_name(arguments), ("pp", 2))
        if num_ranks > 1:
            self.messages.setdefault(phase, Counter())[Message(axis, collective, num_ranks, num_bytes)] += 1


def _axes(ranks: Ranks) -> dict[str, tuple[str, int]]:
    """Name and size of the axis by name of its process group. What is not among them are stages that share weights."""
    axes: dict[str, tuple[str, int]] = {}
    for mesh in (ranks.mesh, ranks.parameters, ranks.pieces, ranks.experts):
        for dim, name in enumerate(mesh.mesh_dim_names or ()):
            axes.setdefault(mesh.get_group(dim).group_name, (name, mesh.size(dim)))
    assert dist.group.WORLD is not None
    axes.setdefault(dist.group.WORLD.group_name, ("world", ranks.world_size))
    return axes


def _group_name(arguments: Sequence[Any]) -> str:
    """Of an operation's process group, which it is given as an object or by name."""
    for argument in reversed(arguments):
        if isinstance(argument, str):
            return argument
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            return dist.ProcessGroup.unbox(argument).group_name
    raise AssertionError("a collective without a group")
