"""The optimizer, its parameter groups and gradient clipping."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchlmoe.config import Optimizer
from torchlmoe.model.decoder import Decoder
from torchlmoe.moe.experts import Experts
from torchlmoe.training.muon import Muon


def build_optimizer(model: Decoder, settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW, or Muon for the blocks' matrices; weight decay on matrices and stacks of them, none on vectors."""
    matrices, fused = _matrices(model) if settings.name == "muon" else ([], [])
    matrix_lr = settings.matrix_lr or settings.lr
    taken = {id(parameter) for parameter in (*matrices, *fused)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken and parameter.requires_grad]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        {"params": matrices, "weight_decay": settings.weight_decay, "lr": matrix_lr, "fused_rows": 1},
        {"params": fused, "weight_decay": settings.weight_decay, "lr": matrix_lr, "fused_rows": 2},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = dict(lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True)
    if settings.name == "muon":
        return Muon(groups, momentum=settings.momentum, **options)
    return torch.optim.AdamW(groups, **options)


def _matrices(model: Decoder) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights of the blocks' linear layers and experts: single matrices, and those that are two one below the other."""
    parameters = dict(model.named_parameters())  # an attribute may be a cast of its parameter
    single: list[torch.Tensor] = []
    fused: list[torch.Tensor] = []
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear):
            single.append(parameters[f"{name}.weight"])
        elif isinstance(module, Experts):
            single.append(parameters[f"{name}.down_proj"])
            fused.append(parameters[f"{name}.gate_up_proj"])
    return single, fused


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
