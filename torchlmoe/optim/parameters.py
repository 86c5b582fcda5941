"""Groups a model's parameters by the update rules that apply to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchlmoe.feed_forwards.experts import Experts


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model.

    every: all trained parameters, in the model's order. matrices: weights of the blocks' linear layers, [m, n], and
    stacks of experts' weights, [E, m, n]. fused: weights of the blocks with two matrices concatenated along their rows.
    """

    every: Sequence[Tensor]
    matrices: Sequence[Tensor]
    fused: Sequence[Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> "Parameters":
        """The parameters of a decoder."""
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
        """Groups for torch.optim: tensors of two and more dimensions, with weight decay, and vectors, without.

        without: parameters to leave out. Empty groups are omitted.
        """
        excluded = {id(parameter) for parameter in without}
        rest = [parameter for parameter in self.every if id(parameter) not in excluded]
        groups = [
            {"params": [parameter for parameter in rest if parameter.dim() >= 2], "weight_decay": weight_decay},
            {"params": [parameter for parameter in rest if parameter.dim() < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]
