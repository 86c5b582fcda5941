"""Represents model and optimizer as one flat dict of tensors by name, which can be loaded into any sharding.

    model.<parameter or persistent buffer>
    optimizer.<state>.<parameter>             e.g. optimizer.exp_avg.blocks.0.mixer.q.weight

Sharded tensors are DTensors, which know their place in the whole tensor.
"""

import warnings
from collections.abc import Callable, Collection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

from torchlmoe.checkpoint.headers import read_header, unreadable
from torchlmoe.parallel.failures import cause_of

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def model_state(model: nn.Module, prefix: str = "model.") -> dict[str, Tensor]:
    """Returns views of the parameters and persistent buffers: prefixed name -> tensor."""
    return {prefix + name: tensor.detach() for name, tensor in model.state_dict().items()}


class OptimizerState:
    """The state of any torch optimizer that has tensors per parameter. Create it before the first forward."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        # Before the first forward FSDP has its parameters sharded, as the optimizer has them.
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """Views of the existing state: name -> tensor. Raises ValueError for a state that is not a tensor."""
        state: dict[str, Tensor] = {}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                name = f"optimizer.{key}.{self.names[parameter]}"
                if not isinstance(value, Tensor):
                    raise ValueError(f"{name} = {value!r} cannot be saved: the state of an optimizer must be tensors.")
                state[name] = value.view(1) if value.dim() == 0 else value  # safetensors cannot slice a scalar
        return state

    def create(self) -> None:
        """Make the optimizer create its state, by a step with learning rate zero and zero gradients."""
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

    def forget_all_but(self, saved: Collection[str]) -> None:
        """Remove the state of parameters that have no saved state, as after an import."""
        for parameter, values in list(self.optimizer.state.items()):
            if not any(f"optimizer.{key}.{self.names[parameter]}" in saved for key in values):
                del self.optimizer.state[parameter]


class _Reader(dcp.HuggingFaceStorageReader):
    """Reads the headers of a folder once, so that the checked headers are those that are loaded.

    Raises ValueError if a header cannot be read or its pieces contradict each other.
    """

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        kinds: dict[str, tuple[torch.dtype, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            for name, piece in read_header(path).items():
                kind = (piece.dtype, len(piece.shape))
                if kinds.setdefault(name, kind) != kind:
                    raise ValueError(f"{path} is damaged: its piece of {name!r} does not fit those of other files.")
        try:
            self._metadata = super().read_metadata()
        except (SafetensorError, RuntimeError) as error:
            raise unreadable(folder, error) from error
        self.tensors: dict[str, TensorStorageMetadata] = self._metadata.state_dict_metadata  # type: ignore[assignment]

    def read_metadata(self) -> Metadata:
        return self._metadata


def name_in_model(name: str) -> str:
    """Returns the name of the parameter or buffer that an entry of the dict belongs to."""
    kind, _, rest = name.partition(".")
    return rest.partition(".")[2] if kind == "optimizer" else rest


def saved_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Returns the tensors in a folder of safetensors files, from the headers. Raises ValueError if they are damaged."""
    return _Reader(folder).tensors


def check_tensors(
    expected: dict[str, Tensor],
    saved: dict[str, TensorStorageMetadata],
    folder: Path,
    *,
    is_other: Callable[[str], bool] = lambda name: False,
) -> None:
    """Checks that each expected tensor is saved, every element exactly once, and that no other tensor is.

    expected: name -> tensor with the expected shape and dtype; it may be on the meta device.
    is_other: whether a saved tensor of this name is accepted although it is not expected.
    Raises ValueError naming the first tensor that does not fit.
    """
    for name, tensor in expected.items():
        if name not in saved:
            raise ValueError(f"{folder} has no tensor {name!r}: it belongs to another architecture.")
        size, dtype = saved[name].size, saved[name].properties.dtype
        if size != tensor.shape:
            raise ValueError(
                f"{name} has shape {list(size)} in {folder}, but the settings give "
                f"{list(tensor.shape)}: it belongs to another architecture."
            )
        if dtype != tensor.dtype and not {dtype, tensor.dtype} <= _FLOATS:
            raise ValueError(f"{name} has dtype {dtype} in {folder}, which cannot be read as {tensor.dtype}.")
        if not _tiles(saved[name]):
            raise ValueError(f"{name} in {folder} is damaged: the saved pieces leave out elements or overlap.")
    for name in saved:
        if name not in expected and not is_other(name):
            raise ValueError(
                f"{folder} holds {name!r}, which the settings' model does not have: it belongs to another architecture."
            )


def load_tensors(
    state: dict[str, Tensor],
    folder: Path,
    group: dist.ProcessGroup | None = None,
    *,
    is_other: Callable[[str], bool] = lambda name: False,
) -> None:
    """Loads tensors in place from a folder of safetensors files, and converts floating-point dtypes.

    group: the ranks that load together; None for this process alone.
    is_other: see `check_tensors`, whose errors this function raises too.
    """
    reader = _Reader(folder)
    check_tensors(state, reader.tensors, folder, is_other=is_other)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed.checkpoint")
            dcp.load(state, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise unreadable(folder, cause_of(error)) from error


def _tiles(tensor: TensorStorageMetadata) -> bool:
    """Whether the saved pieces cover every element of the tensor exactly once."""
    if sum(piece.sizes.numel() for piece in tensor.chunks) != tensor.size.numel():
        return False
    open_pieces: list[ChunkStorageMetadata] = []  # pieces that reach the current position of the first dimension
    for piece in sorted((piece for piece in tensor.chunks if piece.sizes.numel()), key=lambda piece: piece.offsets):
        open_pieces = [other for other in open_pieces if _overlap(other, piece, slice(0, 1))]
        if any(_overlap(other, piece, slice(1, None)) for other in open_pieces):
            return False
        open_pieces.append(piece)
    return True


def _overlap(first: ChunkStorageMetadata, second: ChunkStorageMetadata, dimensions: slice) -> bool:
    """Whether two pieces overlap in each of the dimensions."""
    return all(
        start < other + size_of_other and other < start + size
        for start, size, other, size_of_other in zip(
            first.offsets[dimensions],
            first.sizes[dimensions],
            second.offsets[dimensions],
            second.sizes[dimensions],
            strict=True,
        )
    )
