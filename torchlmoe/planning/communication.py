"""Counts the bytes of collectives and sends by mesh axis: FSDP's, functional collectives and torchlmoe's own."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchlmoe.parallel.ranks import Ranks
from torchlmoe.styles import recurrence

# Operation -> the collective's name, and the position of the argument whose bytes count ("out": the result's).
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
    """One collective or send, seen from one rank.

    axis: the mesh axis. collective: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast" or "send".
    num_ranks: size of the process group.
    num_bytes: the rank's input of an all-to-all, a reduction or a send; the whole output of an all-gather.
    """

    axis: str
    collective: str
    num_ranks: int
    num_bytes: int


class Communication:
    """Counts messages. messages: by phase of the step, how often each was sent."""

    def __init__(self, ranks: Ranks):
        self.messages: dict[Hashable, Counter[Message]] = {}
        self._axes = _axes(ranks)

    def see(self, phase: Hashable, operation: torch._ops.OpOverload, arguments: Sequence[Any], result: Any) -> None:
        """Count an operation, if it is a collective or a send between two or more ranks."""
        entry = _COLLECTIVES.get(operation._schema.name)
        if entry is None:
            return
        collective, position = entry
        tensors = result if position == "out" else arguments[position]  # type: ignore[index]
        num_bytes = sum(x.numel() * x.element_size() for x in ([tensors] if isinstance(tensors, Tensor) else tensors))
        axis, num_ranks = self._axes.get(_group_name(arguments), ("pp", 2))
        if num_ranks > 1:
            self.messages.setdefault(phase, Counter())[Message(axis, collective, num_ranks, num_bytes)] += 1


def _axes(ranks: Ranks) -> dict[str, tuple[str, int]]:
    """Process group's name -> name and size of its mesh axis. Only groups of stages with shared weights are missing."""
    axes: dict[str, tuple[str, int]] = {}
    for mesh in (ranks.mesh, ranks.parameters, ranks.pieces, ranks.experts):
        for dim, name in enumerate(mesh.mesh_dim_names or ()):
            axes.setdefault(mesh.get_group(dim).group_name, (name, mesh.size(dim)))
    assert dist.group.WORLD is not None
    axes.setdefault(dist.group.WORLD.group_name, ("world", ranks.world_size))
    return axes


def _group_name(arguments: Sequence[Any]) -> str:
    """Name of an operation's process group. The argument is the group itself or its name."""
    for argument in reversed(arguments):
        if isinstance(argument, str):
            return argument
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            return dist.ProcessGroup.unbox(argument).group_name
    raise AssertionError("a collective without a group")
