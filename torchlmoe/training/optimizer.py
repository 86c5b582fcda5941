"""Builds the optimizer, sets the learning rate of a step, and clips gradients."""

from collections.abc import Set

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from torchlmoe.config.settings import Optimizer
from torchlmoe.model.decoder import Decoder
from torchlmoe.optim import OPTIMIZERS, Parameters
from torchlmoe.options import keyword_settings


def build_optimizer(model: Decoder, settings: Optimizer) -> torch.optim.Optimizer:
    """Builds the optimizer that the settings name, with the settings that it takes."""
    builder = OPTIMIZERS[settings.name]
    options = {name: getattr(settings, name) for name in keyword_settings(builder) if hasattr(settings, name)}
    return builder(Parameters.of(model), **options, **settings.options)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets the learning rate of every group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("peak_lr", group["lr"])


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float, counted_elsewhere: Set[str] = frozenset()) -> torch.Tensor:
    """Scales all gradients so that their 2-norm over all ranks is at most `max_norm`. Returns the norm before scaling.

    max_norm: 0 for no limit. counted_elsewhere: names of parameters that other ranks count in the norm.
    """
    by_name = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = list(by_name.values())
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        counted = [gradient for name, gradient in by_name.items() if name not in counted_elsewhere]
        norm = _norm_over_ranks(counted, gradients[0].device).to(gradients[0].dtype)
    else:
        norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        # Stays on the device: reading the norm would make the CPU wait for it.
        factor = (max_norm / norm).clamp(max=1.0)
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
    return norm


def _norm_over_ranks(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The norm of gradients over all ranks, float64. Replicas along an axis count on its first rank only."""
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    local = [gradient.to_local() for gradient in sharded if _is_counted(gradient)]
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in local:
        squares += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    dist.all_reduce(squares)
    return squares.sqrt()


def _is_counted(gradient: DTensor) -> bool:
    mesh = gradient.device_mesh
    return all(
        not placement.is_replicate() or mesh.get_local_rank(axis) == 0
        for axis, placement in enumerate(gradient.placements)
    )
