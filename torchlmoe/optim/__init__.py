"""Optimizers, by their names in the settings.

An optimizer is a function of `Parameters` whose keyword arguments are settings: those of [optimizer] with the same
name, and its own annotated ones (`optimizer.options`). It returns a `torch.optim.Optimizer`, whose groups have the peak
learning rates of the schedule.
"""

from collections.abc import Callable

import torch

from torchlmoe.optim.muon import Muon
from torchlmoe.optim.parameters import Parameters
from torchlmoe.registry import Registry


def adamw(
    parameters: Parameters, *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101)."""
    return torch.optim.AdamW(parameters.groups(weight_decay), lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


def muon(
    parameters: Parameters,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    matrix_lr: float | None,
    momentum: float,
) -> torch.optim.Optimizer:
    """Muon (arXiv 2502.16982) for the matrices of the blocks, AdamW for all other parameters. matrix_lr: lr if None."""
    groups = parameters.groups(weight_decay, without=[*parameters.matrices, *parameters.fused])
    of_matrices = {"weight_decay": weight_decay, "lr": matrix_lr or lr}
    groups += [
        {"params": list(matrices), **of_matrices, "fused_rows": fused_rows}
        for fused_rows, matrices in ((1, parameters.matrices), (2, parameters.fused))
        if matrices
    ]
    return Muon(groups, momentum=momentum, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


OPTIMIZERS: Registry[Callable[..., torch.optim.Optimizer]] = Registry("Optimizer", {"adamw": adamw, "muon": muon})

__all__ = ["OPTIMIZERS", "Parameters"]
