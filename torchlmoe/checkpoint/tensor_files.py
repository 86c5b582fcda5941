"""Reads and writes tensors in safetensors files a few at a time, so that no whole model is in memory."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchlmoe.checkpoint.headers import Piece, read_header
from torchlmoe.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class _Index(BaseModel):
    model_config = ConfigDict(strict=True)
    weight_map: Annotated[dict[str, str], Field(min_length=1)]


class TensorFolder:
    """The tensors of a folder, by name. The constructor reads only headers.

    files: the files to read; all *.safetensors of the folder if None. pieces: name -> its parts in the files.
    Raises ValueError naming a file that is missing or damaged.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None):
        self.folder = folder
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        for path in sorted(folder.glob("*.safetensors")) if files is None else files:
            for name, piece in read_header(path).items():
                self.pieces[name].append(piece)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(map(max, zip(*(piece.ends for piece in self.pieces[name]), strict=True)))

    def meta(self, names: Iterable[str]) -> list[Tensor]:
        """Tensors of the same shapes and dtypes on the meta device."""
        return [torch.empty(self.shape(name), dtype=self.pieces[name][0].dtype, device="meta") for name in names]

    def read(self, names: Iterable[str]) -> list[Tensor]:
        """Read whole tensors by name. Opens each file once and closes it, since an open file counts as memory."""
        names = list(names)
        places: dict[Path, list[tuple[str, Piece]]] = defaultdict(list)
        for name in names:
            for piece in self.pieces[name]:
                places[piece.file].append((name, piece))
        tensors: dict[str, Tensor] = {}
        for path, parts in places.items():
            with safe_open(path, framework="pt") as file:
                for name, piece in parts:
                    tensor = file.get_tensor(name)
                    if len(self.pieces[name]) == 1:
                        tensors[name] = tensor.clone()  # a view would keep the file open
                        continue
                    whole = tensors.setdefault(name, tensor.new_empty(self.shape(name)))
                    whole[tuple(map(slice, piece.offsets, piece.ends))] = tensor
        return [tensors[name] for name in names]


def files_of_index(folder: Path) -> list[Path]:
    """Returns the files of a model in the layout of transformers: one file, or those that the index names.

    Raises ValueError if a file is missing, is in another folder, or lacks a tensor that the index lists for it.
    """
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).is_file():
            raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: download the safetensors files of the model.")
        return [folder / SINGLE]
    weight_map = read_json(folder / INDEX, TypeAdapter(_Index)).weight_map
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{folder / INDEX} names the file {name!r}, which is not in the same folder: correct it.")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing, but {INDEX} names it: download it.")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    pieces = TensorFolder(folder, files).pieces
    for name, file in weight_map.items():
        if name not in pieces or pieces[name][0].file.name != file:
            raise ValueError(f"{folder / file} lacks the tensor {name!r} that {INDEX} lists: download both again.")
    return files


def write_shards(
    folder: Path, sizes: Mapping[str, int], tensors: Iterator[dict[str, Tensor]], max_shard_bytes: int
) -> None:
    """Writes tensors to files of at most `max_shard_bytes`, or of one tensor, and an index if there are several files.

    sizes: name -> bytes of each tensor, in the order of `tensors`. At most one file's tensors are in memory.
    Raises OSError, before anything is written, if the disk has too little space.
    """
    free, needed = shutil.disk_usage(folder).free, sum(sizes.values())
    if needed > free:
        raise OSError(f"{needed / 2**30:.2f} GiB are needed, and {free / 2**30:.2f} GiB are free")
    shards = _planned(sizes, max_shard_bytes)
    names = [SINGLE] if len(shards) == 1 else _numbered(len(shards))
    waiting: dict[str, Tensor] = {}
    for name, shard in zip(names, shards, strict=True):
        while not shard <= waiting.keys():
            waiting.update({key: tensor.contiguous() for key, tensor in next(tensors).items()})
        content = {key: waiting.pop(key) for key in sorted(shard)}
        save_file(content, folder / name, metadata={"format": "pt"})
        del content
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": needed}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def with_progress(
    title: str, sizes: Mapping[str, int], tensors: Iterable[dict[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors, and shows a progress bar in bytes on standard error. sizes: name -> bytes."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=sum(sizes.values()))
        for each in tensors:
            progress.advance(task, sum(sizes[name] for name in each))
            yield each


def _planned(sizes: Mapping[str, int], max_shard_bytes: int) -> list[set[str]]:
    shards: list[set[str]] = [set()]
    room = max_shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append(set())
            room = max_shard_bytes
        shards[-1].add(name)
        room -= size
    return shards


def _numbered(number: int) -> list[str]:
    return [f"model-{index:05d}-of-{number:05d}.safetensors" for index in range(1, number + 1)]
