"""The optimizer, its parameter groups and gradient clipping."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchlmoe.config import Optimizer


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices and stacks of them, none on vectors (norms, gates, biases)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float | None) -> torch.Tensor:
    """Scales all gradients so that their 2-norm over all ranks is at most `max_norm`; returns the norm before that."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        # No look at the norm's value, for which the CPU would have to wait.
        factor = (max_norm / norm).clamp(max=1.0)
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
    return norm
