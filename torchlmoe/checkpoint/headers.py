"""Reads the headers of safetensors files: the tensors, or parts of tensors, in a file."""

from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from torchlmoe.files import complaint, open_regular

_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Piece(NamedTuple):
    """A tensor in a file, or the part of it that starts at `offsets`."""

    file: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def ends(self) -> tuple[int, ...]:
        """The end of the part in each dimension."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.shape, strict=True))


class _Place(BaseModel):
    """The offsets of a part of a tensor, as torch.distributed.checkpoint writes them."""

    model_config = ConfigDict(strict=True)
    saved_offsets: list[Annotated[int, Field(ge=0, lt=2**61)]]


_PLACES = TypeAdapter(dict[str, _Place])


def read_header(path: Path) -> dict[str, Piece]:
    """Returns the tensors of a file by name. Raises ValueError for a missing file, or a header that is not valid."""
    open_regular(path).close()
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is not a dict
            tensors = {name: (piece.get_dtype(), piece.get_shape()) for name, piece in slices.items()}
            info = (file.metadata() or {}).get("DCP_SHARDING_INFO")
            places = _PLACES.validate_json(info) if info else None
    except (SafetensorError, RuntimeError) as error:
        raise unreadable(path, error) from error
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: in its DCP_SHARDING_INFO {complaint(error)}.") from None
    pieces = {}
    for name, (dtype, shape) in tensors.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{path} holds {name!r} of dtype {dtype}; supported are {', '.join(_DTYPES)}.")
        is_placed = places is None or (name in places and len(places[name].saved_offsets) == len(shape))
        if not is_placed or max(shape, default=0) >= 2**61:
            raise ValueError(f"{path} is damaged: it does not say which part of {name!r} it holds.")
        offsets = [0] * len(shape) if places is None else places[name].saved_offsets
        pieces[name] = Piece(path, tuple(offsets), tuple(shape), _DTYPES[dtype])
    return pieces


def unreadable(path: Path, error: Exception) -> Exception:
    """Returns a ValueError in place of safetensors' errors, and of torch's for a missing file; other errors as is."""
    if isinstance(error, SafetensorError) or (isinstance(error, RuntimeError) and "unable to" in str(error)):
        return ValueError(f"{path} is damaged or gone: {str(error).partition(chr(10))[0]}.")
    return error
