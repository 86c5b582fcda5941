"""Keeps modules with few parameters outside of FSDP2. Their parameters are whole on every data rank.

An FSDP group computes in one dtype, and the hooks of a group inside a block would break the graph of a compiled block.
So in a lower precision, modules marked `float32_island` (decay gates, routers) stay outside FSDP. Modules shared by
several layers stay outside too: a group has one root, and each pipeline stage is a separate root. Each rank computes
with the whole parameter in its dtype, and one collective at the end of a step sums the gradients over ranks.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from torchlmoe.parallel.ranks import Ranks


def float32_islands(module: nn.Module) -> list[nn.Module]:
    """Returns the modules that compute in at least float32 in every model dtype."""
    return [inner for inner in module.modules() if getattr(inner, "float32_island", False)]


def replicate(islands: Iterable[nn.Module], ranks: Ranks) -> set[nn.Parameter]:
    """Turns the modules' own parameters into DTensors, replicated over the ranks of FSDP.

    Returns them, so that FSDP can ignore them. Parameters that tensor parallelism has split stay split.
    """
    replicated = set()
    for island in islands:
        own = dict(island.named_parameters(recurse=False))
        island.replicated = tuple(own)  # type: ignore[assignment]
        for name, parameter in own.items():
            local: Tensor = parameter.detach()
            mesh, placements = ranks.parameters, [Replicate()] * ranks.parameters.ndim
            if isinstance(local, DTensor):
                mesh = DeviceMesh._concatenate([ranks.parameters, local.device_mesh])
                placements = [*placements, *local.placements]  # type: ignore[list-item]
            whole = DTensor.from_local(
                local.to_local() if isinstance(local, DTensor) else local,
                mesh,
                placements,
                run_check=False,
                shape=local.shape,
                stride=local.stride(),
            )
            island.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
            replicated.add(island.get_parameter(name))
    return replicated


def read_islands(model: nn.Module) -> None:
    """Makes parameters of replicated modules read as this rank's plain tensor. Initialize parameters before this."""
    for module in model.modules():
        if names := getattr(module, "replicated", ()):
            module.__class__ = _reading_local(type(module), names)  # type: ignore[arg-type]  # classes are hashable


@torch.no_grad()
def sum_island_gradients(model: nn.Module) -> None:
    """Sums the gradients of replicated modules over ranks. Until then each rank has only its own part."""
    of_group: dict[Any, list[Tensor]] = {}  # by mesh and axes
    for parameter in model.parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and any(place.is_partial() for place in gradient.placements):
            axes = tuple(axis for axis, place in enumerate(gradient.placements) if place.is_partial())
            local = gradient.to_local()
            of_group.setdefault((gradient.device_mesh, axes), []).append(local)
            parameter.grad = DTensor.from_local(
                local,
                gradient.device_mesh,
                parameter.placements,  # type: ignore[attr-defined]
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
    for (mesh, axes), gradients in of_group.items():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        for axis in axes:
            dist.all_reduce(flat, group=mesh.get_group(axis))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@cache
def _reading_local(kind: type, names: tuple[str, ...]) -> type:
    """A subclass whose parameters read as local parts; one per kind of module, so that `torch.compile` reuses code."""

    def reading(name: str) -> property:
        def read(self: nn.Module) -> Tensor:
            parameter = self._parameters[name]
            assert isinstance(parameter, DTensor)
            gradients: list[Placement] = [Partial() if p.is_replicate() else p for p in parameter.placements]
            return parameter.to_local(grad_placements=gradients)

        return property(read)

    return type(kind.__name__, (kind,), {name: reading(name) for name in names})
