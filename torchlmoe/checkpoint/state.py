"""Model and optimizer as one flat dict of tensors by name, which loads into any other way of sharding them.

    model.<parameter or persistent buffer>
    optimizer.<state>.<parameter>             e.g. optimizer.exp_avg.blocks.0.mixer.q.weight

Sharded tensors are DTensors, which know their place in the whole.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from torchlmoe.parallel.failures import cause_of


def model_state(model: nn.Module, prefix: str = "model.") -> dict[str, Tensor]:
    """Views of the parameters and persistent buffers."""
    return {prefix + name: tensor.detach() for name, tensor in model.state_dict().items()}


class OptimizerState:
    """The state of any torch optimizer whose state is tensors per parameter. Make it before the first forward."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        # Taken while FSDP has its parameters sharded: those are what the optimizer holds.
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """Views of what there is by now. Raises ValueError for a state that is not a tensor."""
        state: dict[str, Tensor] = {}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                name = f"optimizer.{key}.{self.names[parameter]}"
                if not isinstance(value, Tensor):
                    raise ValueError(f"{name} = {value!r} cannot be saved: the state of an optimizer must be tensors.")
                state[name] = value.view(1) if value.dim() == 0 else value  # safetensors cannot slice a scalar
        return state

    def create(self) -> None:
        """Has the optimizer make its state, by a step of length zero along gradients of zero."""
        groups = self.optimizer.param_groups
        lrs = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for group, lr in zip(groups, lrs, strict=True):
            group["lr"] = lr

    def forget_all_but(self, saved: set[str]) -> None:
        """Drops the state of parameters that have none among the saved names, as after an import."""
        for parameter, values in list(self.optimizer.state.items()):
            if not any(f"optimizer.{key}.{self.names[parameter]}" in saved for key in values):
                del self.optimizer.state[parameter]


def saved_tensors(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor in a folder of safetensors files. Raises ValueError where one cannot be read."""
    try:
        metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise ValueError(f"A safetensors file in {folder} is damaged: {error}.") from error
    return {name: (tensor.size, tensor.properties.dtype) for name, tensor in metadata.items()}  # type: ignore[union-attr]


def load_tensors(state: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Fills the tensors in place from a folder of safetensors files, converting their dtype.

    group: all of whose ranks load together; None for this process alone.
    Raises ValueError where a tensor is not there or has another shape.
    """
    saved = saved_tensors(folder)
    for name, tensor in state.items():
        if name not in saved:
            raise ValueError(f"{folder} has no tensor {name!r}: it is of another architecture.")
        if saved[name][0] != tensor.shape:
            raise ValueError(
                f"{name} is of shape {list(saved[name][0])} in {folder}, but the settings give "
                f"{list(tensor.shape)}: it is of another architecture."
            )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed.checkpoint")
            reader = dcp.HuggingFaceStorageReader(str(folder))
            dcp.load(state, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise cause_of(error) from error
