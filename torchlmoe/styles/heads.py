"""Tensor parallelism over heads or hidden channels, as styles for `parallelize_module`.

Each of the P ranks of a mesh has 1 / P of the heads and, between blocks, a contiguous 1 / P of the tokens (arXiv
2205.05198). A layer gathers the tokens at its input, computes its heads' part of the output for all of them, and
reduce-scatters the output, so that each rank keeps the sums for its tokens. The backward reverses both:

    forward     all-gather of x       ...   reduce-scatter of the output
    backward    reduce-scatter of dx  ...   all-gather of the output's gradient

Between the two, every rank computes the tensors that all heads share, and a rank's gradient of them is that of its
heads. Ranks sum it together with dx or, for a parameter, once per step. If the layer sums over heads, `total` sums over
ranks, in both directions. The file needs only torch.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

TOKENS = 1  # the dimension of tokens in x [B, L, ...]


def gather_tokens(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x [B, L / P, ...] of each rank -> [B, L, ...]; gradients of the ranks are summed."""
    sharded = DTensor.from_local(x, mesh, [Shard(TOKENS)], run_check=False)
    return sharded.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def scatter_sums(y: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sums y [B, L, ...] over ranks, and returns each rank's own tokens [B, L / P, ...]."""
    return DTensor.from_local(y, mesh, [Partial()], run_check=False).redistribute(placements=[Shard(TOKENS)]).to_local()


def total(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of x over ranks, on every rank. Gradients are summed over ranks too."""
    summed = DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
    return summed.to_local(grad_placements=[Partial()])


def total_of_group(x: Tensor, mesh: DeviceMesh, num_groups: int, num_copies: int = 1) -> Tensor:
    """`total` within this rank's group, if the ranks form `num_groups` consecutive groups. One collective for all.

    num_copies: number of ranks of a group that have the same term.
    """
    x = x if num_copies == 1 else x / num_copies
    group = mesh.get_local_rank() * num_groups // mesh.size()
    places = [x if index == group else torch.zeros_like(x) for index in range(num_groups)]
    return total(torch.stack(places), mesh)[group]


class HeadParameters(ParallelStyle):
    """Turns a module's parameters into DTensors split by heads. `read_local_parts` makes the module compute with parts.

    head_dims: parameter -> its dimension of heads. Parameters that are not named are whole on every rank.
    units: number of heads, or of groups of heads, in these parameters. If there are fewer units than ranks, ranks share
        a unit: the parameters are whole, and each rank computes with its unit's part.
    """

    def __init__(self, head_dims: dict[str, int], units: int | None = None):
        self.head_dims, self.units = head_dims, units

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        parts: list[tuple[str, int, int, int] | tuple[str]] = []
        degree, rank = device_mesh.size(), device_mesh.get_local_rank()
        for name, parameter in module.named_parameters(recurse=False):
            dim = self.head_dims.get(name)
            shares = dim is not None and self.units is not None and self.units < degree
            placement: Placement = Replicate() if dim is None or shares else Shard(dim)
            whole = distribute_tensor(parameter.detach(), device_mesh, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
            if shares:
                assert dim is not None
                assert self.units is not None
                parts.append((name, dim, rank * self.units // degree, self.units))
            else:
                parts.append((name,))
        module.parts_of_heads = tuple(parts)  # type: ignore[assignment]
        return module


class EnterHeads(ParallelStyle):
    """For a layer with forward(x, ...): the caller passes x [B, L / P, ...], the rank's own tokens."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(_gather_first, device_mesh))
        return module


class LeaveHeads(ParallelStyle):
    """For a projection out of heads: the output is the sum over all heads, for the rank's own tokens."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.terms_of_sum = device_mesh.size()  # type: ignore[assignment]
        module.register_forward_hook(partial(_scatter_output, device_mesh))
        return module


class SumHeads(ParallelStyle):
    """For a projection out of heads whose output the heads read: it is the sum over all heads, on every rank."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.terms_of_sum = device_mesh.size()  # type: ignore[assignment]
        module.register_forward_hook(partial(_total_output, device_mesh))
        return module


class NormOverHeads(ParallelStyle):
    """For a norm with an attribute `total`, which sums over the ranks that have the other channels.

    num_groups: number of groups of channels that are normalized separately, if a group spans ranks. num_copies: number
    of ranks that have each channel, if ranks share a head.
    """

    def __init__(self, num_groups: int = 1, num_copies: int = 1):
        self.num_groups, self.num_copies = num_groups, num_copies

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        options = dict(num_groups=self.num_groups, num_copies=self.num_copies)
        module.total = partial(total_of_group, mesh=device_mesh, **options)  # type: ignore[assignment,arg-type]
        return module


def _gather_first(mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return gather_tokens(inputs[0], mesh), *inputs[1:]


def _scatter_output(mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
    return scatter_sums(y, mesh)


def _total_output(mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
    return total(y, mesh)


def read_local_parts(model: nn.Module) -> None:
    """Makes parameters of `HeadParameters` read as the rank's part, a plain tensor, while the layer runs.

    Gradients reach the parameter as parts, or as terms of the sum over ranks. While FSDP has the parameter sharded, it
    reads as it is. Call this after FSDP.
    """
    for module in model.modules():
        parts = getattr(module, "parts_of_heads", ())
        if parts:
            terms = getattr(module, "terms_of_sum", 1)
            module.__class__ = _reading_parts(type(module), parts, terms)  # type: ignore[arg-type]  # classes are hashable


@cache
def _reading_parts(kind: type, parts: Sequence[tuple], terms: int) -> type:
    """A subclass whose parameters read as parts; one per kind of module, so that `torch.compile` reuses code.

    terms: number of ranks whose outputs are summed. Each adds 1 / terms of a bias, so that the sum has it once.
    """

    def reading(name: str, dim: int = 0, index: int = 0, number: int = 1) -> property:
        def read(self: nn.Module) -> Tensor:
            parameter = self._parameters[name]
            if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:
                return parameter  # type: ignore[return-value]
            gradients = [Partial() if place.is_replicate() else place for place in parameter.placements]
            part = parameter.to_local(grad_placements=gradients)
            if terms > 1 and name == "bias":
                return part / terms
            if number == 1:
                return part
            width = part.shape[dim] // number
            return part.narrow(dim, index * width, width)

        return property(read)

    return type(kind.__name__, (kind,), {part[0]: reading(*part) for part in parts})
