"""Writes and checks the manifest of a checkpoint: size and sha256 of each file, and a checksum of the manifest.

`manifest.json` is written when every other file is on disk. It is JSON in a canonical form with a checksum of its
content, so a change of any byte is detected, in a file, in the manifest, or in its white space.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from torchlmoe.files import MAX_JSON_BYTES, open_regular, read_json, read_small, sync_folder

NAME = "manifest.json"
FORMAT = 1


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    bytes: int
    sha256: str


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    format: int
    files: dict[str, _File]
    sha256: str


def describe(path: Path) -> dict[str, Any]:
    """Returns the size in bytes and the sha256 of a file. Raises ValueError if it is missing or not a regular file."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file, and returns when its content is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Writes the manifest, which completes the folder. files: name -> result of `describe`."""
    write_durably(folder / NAME, _sealed({"format": FORMAT, "files": files}))
    sync_folder(folder)


def verify(folder: Path, part: int = 0, num_parts: int = 1, *, only: str = "") -> None:
    """Checks that a folder has exactly the files of its manifest, with their sizes and checksums.

    part, num_parts: compute checksums only of every num_parts-th file, beginning with number `part`, so that several
        ranks share the work.
    only: files that the manifest does not list are accepted unless their names end with this text.
    Raises ValueError, without a full stop, naming the first file that is wrong.
    """
    files = _read_manifest(folder)
    present = {path.name for path in folder.iterdir()} - {NAME}
    for name in sorted(present - files.keys()):
        if name.endswith(only):
            raise ValueError(f"{folder / name} does not belong there: {NAME} does not list it")
    for index, (name, expected) in enumerate(sorted(files.items())):
        if name not in present:
            raise ValueError(f"{folder / name} is missing")
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{folder / name} has {size} bytes in place of {expected['bytes']}")
        if index % num_parts == part and describe(folder / name) != expected:
            raise ValueError(f"{folder / name} is damaged: its content does not have the checksum that was written")


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / NAME
    manifest = read_json(path, TypeAdapter(_Manifest)).model_dump()
    del manifest["sha256"]
    if read_small(path, MAX_JSON_BYTES) != _sealed(manifest):
        raise ValueError(f"{path} is damaged: its content does not have the checksum that was written")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} has format {manifest['format']}; this version of torchlmoe reads format {FORMAT}")
    return manifest["files"]


def _sealed(content: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()
