"""Muon (Jordan et al. 2024; scaled as in arXiv 2502.16982): a matrix moves along its orthogonalized momentum.

    M <- mu M + (1 - mu) grad             U = mu M + (1 - mu) grad             (Nesterov)
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(m, n)) orth(U)

orth(U) approximates the closest semi-orthogonal matrix by a few Newton-Schulz steps. The factor gives updates the size
of AdamW's, so both can share a learning rate. The rule is for single matrices: each expert of a stack has its own
update, and so has each layer of a fused weight. All other parameters (embeddings, router, vectors) use AdamW.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate

from torchlmoe.layers.initialization import own_part
from torchlmoe.ops.host_dtype import cpu_lacks_bfloat16

# Coefficients of a quintic whose iterates move singular values towards 1 (Jordan et al. 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.AdamW):
    """AdamW, and Muon for groups with the key `fused_rows`, whose parameters are matrices [..., m, n].

    fused_rows: number of matrices that are concatenated along the rows of a weight; 1 for an ordinary weight.
    momentum, num_iterations: of Muon. adamw: arguments of `torch.optim.AdamW`.

    A sharded weight (DTensor) is gathered for its step, and every rank keeps its own part, so the number of ranks does
    not change a run. A stack is gathered only along mesh axes that cut its matrices: if it is sharded between matrices,
    it needs no communication.
    """

    def __init__(self, groups: list[dict], *, momentum: float = 0.95, num_iterations: int = 5, **adamw):
        super().__init__([{"fused_rows": None, **group} for group in groups], **adamw)
        self.momentum, self.num_iterations = momentum, num_iterations

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["fused_rows"] is None]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["fused_rows"] is not None:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        stacks: dict[int, Tensor] = {}  # [matrices, m, n], m <= n
        shapes: dict[int, torch.Size] = {}
        for index, parameter in enumerate(parameters):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
            update = _whole_matrices(parameter.grad.lerp(state["momentum"], self.momentum))
            shapes[index] = update.shape
            matrices = update.unflatten(-2, (group["fused_rows"], -1)).flatten(0, -3)
            stacks[index] = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
        for shape in {stack.shape[1:] for stack in stacks.values()}:
            members = [index for index, stack in stacks.items() if stack.shape[1:] == shape]
            updates = orthogonalize(torch.cat([stacks[index] for index in members]), self.num_iterations)
            parts = (updates * (0.2 * max(shape) ** 0.5)).split([len(stacks[index]) for index in members])
            for index, part in zip(members, parts, strict=True):
                is_tall = shapes[index][-2] // group["fused_rows"] > shapes[index][-1]
                update = (part.mT if is_tall else part).reshape(shapes[index])
                parameters[index].mul_(1 - group["lr"] * group["weight_decay"])
                local = parameters[index].to_local() if isinstance(parameters[index], DTensor) else parameters[index]
                local.add_(_own_part(update, parameters[index]), alpha=-group["lr"])


def orthogonalize(x_NMK: Tensor, num_iterations: int = 5) -> Tensor:
    """Stacked matrices [N, m, n], m <= n -> like x, with singular values near 1 (between about 0.7 and 1.2).

    Products run in bfloat16 if the hardware multiplies it natively and x is not float64, otherwise in the dtype of x.
    """
    a, b, c = _QUINTIC
    native = not (x_NMK.device.type == "cpu" and cpu_lacks_bfloat16())
    dtype = torch.bfloat16 if native and x_NMK.dtype is not torch.float64 else x_NMK.dtype
    x = (x_NMK / (torch.linalg.matrix_norm(x_NMK, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(num_iterations):
        gram = x @ x.mT
        polynomial = (gram @ gram).mul_(c).add_(gram, alpha=b)
        x = (polynomial @ x).add_(x, alpha=a)
    return x.to(x_NMK.dtype)


def _whole_matrices(update: Tensor) -> Tensor:
    """The matrices of which this rank has a part, gathered along the mesh axes that cut them."""
    if not isinstance(update, DTensor):
        return update
    whole = [Replicate() if _cuts_matrices(place, update) else place for place in update.placements]
    return update.redistribute(placements=whole).to_local()


def _own_part(update: Tensor, parameter: Tensor) -> Tensor:
    """The rank's part of an update from `_whole_matrices`: a plain tensor like the rank's part of the parameter."""
    return own_part(update, parameter, first_dim=parameter.dim() - 2)


def _cuts_matrices(place: Placement, x: Tensor) -> bool:
    return not place.is_replicate() and place.dim >= x.dim() - 2  # type: ignore[attr-defined]
