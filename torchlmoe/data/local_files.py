"""Finds and reads the documents of local files: .json, .jsonl, .parquet, .txt, .md; or their .gz, .zst."""

import io
import json
import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TABLES = {".json", ".jsonl", ".parquet"}
TEXTS = {".txt", ".md"}
COMPRESSIONS = {".gz", ".zst"}
VALIDATION_NAMES = ("validation", "valid", "val", "dev")

logger = logging.getLogger(__name__)


def find_files(path: Path, train_split: str, validation_split: str) -> dict[str, list[Path]]:
    """The files of "train" and of "validation" (perhaps none) under `path`, a file or a folder, sorted.

    A file or sub-folder belongs to a split when its name is the split's, alone or before a digit, a dot, a hyphen or an
    underscore: train-00000.parquet, train/a.jsonl; not "Train to Pakistan.txt". Without any that is named for training,
    all files are, save those named validation, valid, val, dev or test. Text files count only where a folder holds no
    table: a README is not taken for data. Links are followed; hidden files are left out.
    Logs once how many files each split has and how many are left out.
    Raises ValueError where there is no file to read, and for a link whose target is missing.
    """
    if path.is_file():
        if _kind(path) not in TABLES | TEXTS:
            raise ValueError(f"{path} is not a file that is read: give {_readable()}.")
        return {"train": [path], "validation": []}
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder: give one of them.")
    found = {file: file.relative_to(path).parts for file in _walk(path, ())}
    tables = {file: parts for file, parts in found.items() if _kind(file) in TABLES}
    files = tables or {file: parts for file, parts in found.items() if _kind(file) in TEXTS}
    if not files:
        raise ValueError(f"The folder {path} holds no file that is read: give {_readable()}.")

    names = {"train": (train_split,), "validation": (validation_split, *VALIDATION_NAMES), "test": ("test",)}
    splits: dict[str, list[Path]] = {"train": [], "validation": [], "test": [], "unnamed": []}
    for file, parts in files.items():
        splits[_split_of(parts, names)].append(file)
    chosen = {"train": splits["train"] or splits["unnamed"], "validation": splits["validation"]}
    left_out = sorted(found.keys() - {*chosen["train"], *chosen["validation"]})
    if found.keys() != {*chosen["train"]}:
        examples = f" ({', '.join(file.name for file in left_out[:3])}{', ...' * (len(left_out) > 3)})" * bool(left_out)
        _log_once(
            f"{path}: {len(chosen['train'])} files to train on, {len(chosen['validation'])} to validate on, "
            f"{len(left_out)} left out{examples}."
        )
    return chosen


@cache
def _log_once(message: str) -> None:
    logger.info(message)


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """The files under a folder, sorted, through links; above: the real paths of the folders that it is in."""
    above = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if path.resolve() not in above:  # a link to a folder that it is in
                yield from _walk(path, above)
        elif path.is_file():
            yield path
        elif path.is_symlink():
            raise ValueError(f"{path} is a link to {os.readlink(path)}, which is not there: mend it or remove it.")


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
                for place, record in _read_json(path):
                    yield text_of(record, text_column, f"{path}, {place}")
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise ValueError(f"{path} cannot be read: {place}: {error.msg}.") from error
        except (UnicodeDecodeError, OSError, RecursionError, pa.ArrowException) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error


def text_of(record: object, text_column: str, source: str) -> str:
    """The text of one row of a table, which `source` names in the error."""
    if not isinstance(record, dict):
        raise ValueError(f"{source} holds {type(record).__name__}, not an object with a key {text_column!r}.")
    if text_column not in record:
        raise _no_column(source, text_column, list(record))
    text = record[text_column]
    if not isinstance(text, str | None):
        raise _no_text(source, text_column, type(text).__name__, [k for k, v in record.items() if isinstance(v, str)])
    # JSON can spell half of a surrogate pair, which is no character and has no UTF-8.
    return (text or "").encode(errors="replace").decode()


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    file = pq.ParquetFile(path)
    if text_column not in file.schema_arrow.names:
        raise _no_column(str(path), text_column, file.schema_arrow.names)
    kinds = {column.name: column.type for column in file.schema_arrow}
    if not _is_text(kinds[text_column]):
        texts = [name for name, kind in kinds.items() if _is_text(kind)]
        raise _no_text(str(path), text_column, str(kinds[text_column]), texts)
    for batch in file.iter_batches(batch_size=256, columns=[text_column]):
        for record in batch.to_pylist():
            yield text_of(record, text_column, str(path))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null))


def _read_json(path: Path) -> Iterator[tuple[str, object]]:
    """The records of a file that is either one list of them or one on each line, and where each is."""
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            is_list = line.lstrip().startswith("[")
            if not line.strip():
                continue
            try:
                record = json.loads(line + lines.read() if is_list else line)
            except json.JSONDecodeError as error:
                error.lineno += number - 1
                raise
            if is_list:
                yield from ((f"record {index}", each) for index, each in enumerate(record, start=1))
            else:
                yield f"line {number}", record


def _open(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression="detect")


def _kind(path: Path) -> str:
    kind = path.suffix.lower()
    compressed = kind in COMPRESSIONS
    kind = Path(path.stem).suffix.lower() if compressed else kind
    # Parquet is compressed inside.
    return "" if compressed and kind == ".parquet" else kind


def _split_of(parts: tuple[str, ...], names: dict[str, tuple[str, ...]]) -> str:
    for part in parts:
        for split, prefixes in names.items():
            if any(re.match(rf"{re.escape(prefix)}([\d._-]|$)", part, re.IGNORECASE) for prefix in prefixes):
                return split
    return "unnamed"


def _no_column(source: str, text_column: str, columns: list[str]) -> ValueError:
    return ValueError(
        f"{source} has no column {text_column!r}: set data.text_column to one it has, {' or '.join(columns)}."
    )


def _no_text(source: str, text_column: str, kind: str, columns: list[str]) -> ValueError:
    remedy = f"set data.text_column to one that does, {' or '.join(columns)}" if columns else "no column does"
    return ValueError(f"Column {text_column!r} of {source} holds {kind}, not text: {remedy}.")


def _readable() -> str:
    return "files that end in " + ", ".join(sorted(TABLES | TEXTS)) + " (all but .parquet also with .gz or .zst)"
