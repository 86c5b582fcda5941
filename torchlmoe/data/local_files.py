"""Finds and reads the documents of local files: .json, .jsonl, .parquet, .txt, .md; or their .gz, .zst."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TABLES = {".json", ".jsonl", ".parquet"}
TEXTS = {".txt", ".md"}
COMPRESSIONS = {".gz", ".zst"}
VALIDATION_NAMES = ("validation", "valid", "val", "dev")


def find_files(path: Path, train_split: str, validation_split: str) -> dict[str, list[Path]]:
    """The files of "train" and of "validation" (perhaps none) under `path`, a file or a folder, sorted.

    A file or sub-folder belongs to a split when its name begins with the split's: train-00000.parquet,
    train/a.jsonl. Without any that is named for training, all files are, save those named validation, valid,
    val, dev or test. Text files count only where a folder holds no table: a README is not taken for data.
    Raises ValueError where there is no file to read.
    """
    if path.is_file():
        if _kind(path) not in TABLES | TEXTS:
            raise ValueError(f"{path} is not a file that is read: give {_readable()}.")
        return {"train": [path], "validation": []}
    inside = {file: file.relative_to(path).parts for file in sorted(path.rglob("*")) if file.is_file()}
    found = {file: parts for file, parts in inside.items() if not any(part.startswith(".") for part in parts)}
    tables = {file: parts for file, parts in found.items() if _kind(file) in TABLES}
    files = tables or {file: parts for file, parts in found.items() if _kind(file) in TEXTS}
    if not files:
        raise ValueError(f"The folder {path} holds no file that is read: give {_readable()}.")

    names = {"train": (train_split,), "validation": (validation_split, *VALIDATION_NAMES), "test": ("test",)}
    splits: dict[str, list[Path]] = {"train": [], "validation": [], "test": [], "unnamed": []}
    for file, parts in files.items():
        splits[_split_of(parts, names)].append(file)
    return {"train": splits["train"] or splits["unnamed"], "validation": splits["validation"]}


def read_files(files: list[Path], text_column: str) -> Iterator[str]:
    """The documents of `files`: one a row of a table, one a text file; a null counts as an empty document.

    Raises ValueError for a column that is not there or holds no text, and for a file that cannot be read.
    """
    for path in files:
        try:
            if _kind(path) == ".parquet":
                yield from _read_parquet(path, text_column)
            elif _kind(path) in TEXTS:
                yield _open(path).read().decode()
            else:
                for record in _read_json(path):
                    yield text_of(record, text_column, str(path))
        except (UnicodeDecodeError, json.JSONDecodeError, OSError, pa.ArrowException) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error


def text_of(record: object, text_column: str, source: str) -> str:
    """The text of one row of a table, which `source` names in the error."""
    columns = list(record) if isinstance(record, dict) else []
    if not isinstance(record, dict) or text_column not in record:
        raise _no_column(source, text_column, columns)
    text = record[text_column]
    if not isinstance(text, str | None):
        raise ValueError(
            f"Column {text_column!r} of {source} holds {type(text).__name__}, not text: "
            f"set data.text_column to one of {', '.join(columns)}."
        )
    # JSON can spell half of a surrogate pair, which is no character and has no UTF-8.
    return (text or "").encode(errors="replace").decode()


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    file = pq.ParquetFile(path)
    if text_column not in file.schema_arrow.names:
        raise _no_column(str(path), text_column, file.schema_arrow.names)
    for batch in file.iter_batches(batch_size=256, columns=[text_column]):
        for record in batch.to_pylist():
            yield text_of(record, text_column, str(path))


def _read_json(path: Path) -> Iterator[object]:
    """The records of a file that is either one list of them or one on each line."""
    with io.TextIOWrapper(_open(path), encoding="utf-8") as lines:
        for line in lines:
            if line.lstrip().startswith("["):
                yield from json.loads(line + lines.read())
            elif line.strip():
                yield json.loads(line)


def _open(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression="detect")


def _kind(path: Path) -> str:
    kind, compressed = path.suffix, path.suffix in COMPRESSIONS
    kind = Path(path.stem).suffix if compressed else kind
    # Parquet is compressed inside.
    return "" if compressed and kind == ".parquet" else kind


def _split_of(parts: tuple[str, ...], names: dict[str, tuple[str, ...]]) -> str:
    for part in parts:
        for split, prefixes in names.items():
            if any(re.match(rf"{re.escape(prefix)}([^a-z]|$)", part, re.IGNORECASE) for prefix in prefixes):
                return split
    return "unnamed"


def _no_column(source: str, text_column: str, columns: list[str]) -> ValueError:
    return ValueError(
        f"{source} has no column {text_column!r}: set data.text_column to one it has, {' or '.join(columns)}."
    )


def _readable() -> str:
    return "files that end in " + ", ".join(sorted(TABLES | TEXTS)) + " (all but .parquet also with .gz or .zst)"
