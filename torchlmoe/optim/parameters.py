"""A model's parameters by what an update rule has to know of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchlmoe.feed_forwards.experts import Experts


@dataclass(frozen=True)
class Parameters:
    """every: all trained parameters, in the model's order.

    matrices: of these, the weights of the blocks' linear layers, and stacks of experts' ones. fused: weights of the
        blocks whose rows are two matrices, one below the other.
    """

    every: Sequence[Tensor]
    matrices: Sequence[Tensor]
    fused: Sequence[Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> "Parameters":
        """model: a decoder."""
        parameters = dict(model.named_parameters())  # an attribute may be a cast of its parameter
        matrices: list[Tensor] = []
        fused: list[Tensor] = []
        for name, module in model.get_submodule("blocks").named_modules(prefix="blocks"):
            if isinstance(module, nn.Linear):
                matrices.append(parameters[f"{name}.weight"])
            elif isinstance(module, Experts):
                for stack, _ in module.named_parameters():
                    (fused if stack == "gate_up_proj" else matrices).append(parameters[f"{name}.{stack}"])
        return cls([parameter for parameter in parameters.values() if parameter.requires_grad], matrices, fused)

    def groups(self, weight_decay: float, without: Sequence[Tensor] = ()) -> list[dict[str, Any]]:
        """Two groups: tensors of two and more dims, which decay, and vectors, which do not; either may be left out."""
        left_out = {id(parameter) for parameter in without}
        rest = [parameter for parameter in self.every if id(parameter) not in left_out]
        groups = [
            {"params": [parameter for parameter in rest if parameter.dim() >= 2], "weight_decay": weight_decay},
            {"params": [parameter for parameter in rest if parameter.dim() < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]
