"""Context parallelism for modules that look a few tokens back: each rank gets its left neighbor's last tokens.

    parallelize_module(mixer, mesh["cp"], {"q_conv": ConvHalo(), "token_shift": TokenShiftHalo()})

A module of width w runs on w - 1 tokens of the neighbor and on its span; the outputs for the former are dropped.
Rank r of the mesh holds tokens [r * L, (r + 1) * L) of each row. The forward and the backward each have one all-to-all,
in which a rank sends only to its neighbor: traffic does not grow with ranks or tokens.

The file needs only torch. It supports any module with `forward(x, *, sequence, cache=None)`, where `sequence` is a
dataclass with the fields `positions` and `cu_seqlens`.
"""

import dataclasses
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle


def left_halo(x: Tensor, width: int, mesh: DeviceMesh) -> Tensor:
    """x [B, L, ...] -> the left neighbor's last `width` tokens [B, width, ...]; zeros on the first rank."""
    rank, num_ranks, batch_size = mesh.get_local_rank(), mesh.size(), x.shape[0]
    to_right = [batch_size if other == rank + 1 else 0 for other in range(num_ranks)]
    from_left = [batch_size if other == rank - 1 else 0 for other in range(num_ranks)]
    last = x[: sum(to_right), x.shape[1] - width :].contiguous()
    received = all_to_all_single_autograd(last, from_left, to_right, mesh)
    # Every rank pads. So the empty tensor that the first rank received stays part of the graph, and that rank takes
    # part in the collective of the backward.
    return F.pad(received, (0, 0) * (x.dim() - 1) + (0, batch_size - sum(from_left)))


def extended_bounds(cu_seqlens: Tensor, start: int, length: int, width: int) -> Tensor:
    """Bounds, int32 [N + 2], of the documents in tokens [start - width, start + length), counted from start - width.

    The first document is extra: it has the places before the row's first token, and is empty on other ranks.
    """
    return F.pad((cu_seqlens - (start - width)).clamp(0, width + length), (1, 0))


class Halo(ParallelStyle):
    """Runs a module on the span extended to the left. Raises ValueError if a span is shorter than the halo."""

    @abstractmethod
    def width(self, module: nn.Module) -> int:
        """Number of tokens before the current one that the module reads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        width = self.width(module)
        if width == 0 or device_mesh.size() == 1:
            return module

        def extend(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            (x,), sequence = args, kwargs["sequence"]
            length = x.shape[1]
            if length < width:
                raise ValueError(
                    f"A span of {length} tokens is shorter than the {width} that {type(module).__name__} looks back: "
                    "use fewer ranks or longer rows."
                )
            if kwargs.get("cache") is not None:
                raise ValueError("A cache holds whole rows; decode with a model that is not split over the sequence.")
            bounds = sequence.cu_seqlens
            if bounds is not None:
                bounds = extended_bounds(bounds, device_mesh.get_local_rank() * length, length, width)
            positions = F.pad(sequence.positions, (width, 0))
            extended = dataclasses.replace(sequence, positions=positions, cu_seqlens=bounds)
            return (torch.cat([left_halo(x, width, device_mesh), x], 1),), {**kwargs, "sequence": extended}

        module.register_forward_pre_hook(extend, with_kwargs=True)
        module.register_forward_hook(lambda module, args, y: y[:, width:])
        return module


class ConvHalo(Halo):
    """For a depthwise causal convolution with `weight` [channels, width]."""

    def width(self, module: nn.Module) -> int:
        assert isinstance(module.weight, Tensor)
        return module.weight.shape[1] - 1


class TokenShiftHalo(Halo):
    """For modules that look at the preceding token, and detect the first token of a document by position 0."""

    def width(self, module: nn.Module) -> int:
        return 1
