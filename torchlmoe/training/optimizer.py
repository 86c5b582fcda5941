"""The optimizer that the settings name, the learning rate of a step, and the clipping of its gradients."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchlmoe.config.settings import Optimizer
from torchlmoe.model.decoder import Decoder
from torchlmoe.optim import OPTIMIZERS, Parameters
from torchlmoe.options import keyword_settings


def build_optimizer(model: Decoder, settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that the settings name, with those of them that it takes."""
    builder = OPTIMIZERS[settings.name]
    taken = {name: getattr(settings, name) for name in keyword_settings(builder) if hasattr(settings, name)}
    return builder(Parameters.of(model), **taken, **settings.options)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate becomes `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("peak_lr", group["lr"])


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scales all gradients so that their 2-norm over all ranks is at most `max_norm`; returns the norm before that.

    max_norm: 0 for no limit.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        # No look at the norm's value, for which the CPU would have to wait.
        factor = (max_norm / norm).clamp(max=1.0)
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
    return norm
