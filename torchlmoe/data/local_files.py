"""Finds local files and reads their documents: .json, .jsonl, .parquet, .txt and .md, also with .gz or .zst."""

import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

TABLES = {".json", ".jsonl", ".parquet"}
TEXTS = {".txt", ".md"}
TOKENS = {".bin", ".npy"}
COMPRESSIONS = {".gz", ".zst"}
VALIDATION_NAMES = ("validation", "valid", "val", "dev")

# Smallest size of a piece of the corpus in bytes, and approximate largest number of pieces.
PIECE_BYTES = 2**24
MOST_PIECES = 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """A file or a part of it.

    num_bytes: approximate number of bytes to read. start, stop: lines that begin in bytes [start, stop) of a .jsonl, or
    row groups [start, stop) of a .parquet; stop is None for the whole file.
    """

    path: Path
    num_bytes: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class FilePiece:
    """Consecutive parts of the files of a corpus, which one process reads."""

    spans: tuple[Span, ...]
    text_column: str

    @property
    def num_bytes(self) -> int:
        return sum(span.num_bytes for span in self.spans)

    def documents(self) -> Iterator[str]:
        return read_files(self.spans, self.text_column)


def pieces_of_files(files: list[Path], text_column: str) -> list[FilePiece]:
    """Cuts files, in their order, into pieces that depend only on the files' sizes. Raises ValueError like
    `read_files`.

    A .jsonl is cut between lines and a .parquet between row groups. Other files, and compressed ones, stay whole.
    """
    sizes = [file.stat().st_size for file in files]
    piece_bytes = max(PIECE_BYTES, sum(sizes) // MOST_PIECES)
    pieces: list[FilePiece] = []
    spans: list[Span] = []  # of the next piece
    for file, size in zip(files, sizes, strict=True):
        for span in _spans(file, size, piece_bytes):
            spans.append(span)
            if sum(each.num_bytes for each in spans) >= piece_bytes:
                pieces.append(FilePiece(tuple(spans), text_column))
                spans = []
    return pieces if not spans else [*pieces, FilePiece(tuple(spans), text_column)]


def _spans(path: Path, size: int, piece_bytes: int) -> list[Span]:
    if size > piece_bytes and path.suffix.lower() == ".jsonl" and not _begins_with_list(path):
        number = -(-size // piece_bytes)
        bounds = [size * index // number for index in range(number + 1)]
        return [Span(path, stop - start, start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
    if size > piece_bytes and _kind(path) == ".parquet":
        with _failures_to_read(path):
            metadata = pq.read_metadata(path)
        # The bytes to read are estimated by the size on disk, of which the text is most.
        share = size / max(metadata.num_row_groups, 1)
        step = max(1, round(piece_bytes / share))
        starts = range(0, metadata.num_row_groups, step)
        return [
            Span(path, int(share * (min(start + step, metadata.num_row_groups) - start)), start, start + step)
            for start in starts
        ]
    return [Span(path, size)]


def _begins_with_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def find_files(path: Path, train_split: str, validation_split: str) -> dict[str, list[Path]]:
    """Returns the files of "train" and of "validation" (possibly none) under `path`, a file or a folder, sorted.

    - A file or sub-folder belongs to a split if its name is the split's, alone or before a digit, dot, hyphen or
      underscore: train-00000.parquet, train/a.jsonl; but not "Train to Pakistan.txt".
    - If no name is that of the training split, all files are for training except those named validation, valid, val,
      dev or test.
    - A folder is read for one kind of files: tables if it has any, else tokens (.bin, .npy), else texts. So a README is
      not read as data.
    - Links are followed. Hidden files and torchlmoe's own token stores are left out.

    Logs once how many files each split has and how many are left out.
    Raises ValueError if there is no file to read, and for a link whose target is missing.
    """
    if path.is_file():
        if _kind(path) not in TABLES | TEXTS | TOKENS:
            raise ValueError(f"{path} is not a file of a supported kind: give {_readable()}.")
        return {"train": [path], "validation": []}
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder: give one of them.")
    all_files = {file: file.relative_to(path).parts for file in _walk(path, ())}
    kinds = ({kind for file in all_files if (kind := _kind(file)) in group} for group in (TABLES, TOKENS, TEXTS))
    chosen_kinds = next((group for group in kinds if group), set())
    files = {file: parts for file, parts in all_files.items() if _kind(file) in chosen_kinds}
    if not files:
        raise ValueError(f"The folder {path} holds no file of a supported kind: give {_readable()}.")

    names = {"train": (train_split,), "validation": (validation_split, *VALIDATION_NAMES), "test": ("test",)}
    splits: dict[str, list[Path]] = {"train": [], "validation": [], "test": [], "unnamed": []}
    for file, parts in files.items():
        splits[_split_of(parts, names)].append(file)
    chosen = {"train": splits["train"] or splits["unnamed"], "validation": splits["validation"]}
    left_out = sorted(all_files.keys() - {*chosen["train"], *chosen["validation"]})
    if all_files.keys() != {*chosen["train"]}:
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
    """Yields the files under a folder, sorted; follows links. above: real paths of the folders that contain it."""
    above = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            is_store = (path / "documents.bin").exists() or path.suffix in (".partial", ".parts")
            if not is_store and path.resolve() not in above:  # a link may lead to a folder that contains it
                yield from _walk(path, above)
        elif path.is_file():
            yield path
        elif path.is_symlink():
            raise ValueError(
                f"{path} is a link to {os.readlink(path)}, which does not exist: correct or remove the link."
            )


def read_files(spans: Iterable[Span], text_column: str) -> Iterator[str]:
    """Yields the documents of files or parts of them: one per row of a table, one per text file. Null is an empty text.

    Raises ValueError for a missing column or one without text, and for a file that cannot be read.
    """
    for span in spans:
        path = span.path
        with _failures_to_read(path):
            if _kind(path) == ".parquet":
                yield from _read_parquet(span, text_column)
            elif _kind(path) in TEXTS:
                yield _open(path).read().decode()
            else:
                for place, record in _read_json(span):
                    yield text_of(record, text_column, place)


@contextmanager
def _failures_to_read(path: Path) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path} cannot be read: {place}: {error.msg}.") from error
    except (UnicodeDecodeError, OSError, RecursionError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def text_of(record: object, text_column: str, source: object) -> str:
    """The text of one row of a table. Raises ValueError, which names `source`, if the row has no text in the column."""
    if not isinstance(record, dict):
        raise ValueError(f"{source} holds {type(record).__name__}, not an object with a key {text_column!r}.")
    if text_column not in record:
        raise _no_column(source, text_column, list(record))
    text = record[text_column]
    if not isinstance(text, str | None):
        raise _no_text(source, text_column, type(text).__name__, [k for k, v in record.items() if isinstance(v, str)])
    # JSON can have half of a surrogate pair, which is not a character and has no UTF-8.
    return (text or "").encode(errors="replace").decode()


def _read_parquet(span: Span, text_column: str) -> Iterator[str]:
    path = span.path
    file = pq.ParquetFile(path)
    if text_column not in file.schema_arrow.names:
        raise _no_column(str(path), text_column, file.schema_arrow.names)
    kinds = {column.name: column.type for column in file.schema_arrow}
    if not _is_text(kinds[text_column]):
        texts = [name for name, kind in kinds.items() if _is_text(kind)]
        raise _no_text(str(path), text_column, str(kinds[text_column]), texts)
    groups = range(file.num_row_groups)[span.start : span.stop]
    for batch in file.iter_batches(batch_size=256, columns=[text_column], row_groups=list(groups)):
        for record in batch.to_pylist():
            yield text_of(record, text_column, str(path))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null))


@dataclass(frozen=True)
class _Place:
    """The place of a record, for messages. The lines before its span are counted only if a message is made."""

    span: Span
    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.span.path}, {self.kind} {self.number + _lines_before(self.span)}"


def _read_json(span: Span) -> Iterator[tuple[_Place, object]]:
    """Yields the records of a file, with their places. The file is one list, or has one record per line."""
    with io.TextIOWrapper(_open(span.path) if span.stop is None else _lines(span), encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            is_list = line.lstrip().startswith("[")
            if not line.strip():
                continue
            try:
                record = json.loads(line + lines.read() if is_list else line)
            except json.JSONDecodeError as error:
                error.lineno += number - 1 + _lines_before(span)
                raise
            if is_list:
                yield from ((_Place(span, "record", index), each) for index, each in enumerate(record, start=1))
            else:
                yield _Place(span, "line", number), record


def _lines(span: Span) -> io.BytesIO:
    """The lines that begin within the span's bytes."""
    assert span.stop is not None
    with span.path.open("rb") as file:
        begin = _first_line(span, file)
        content = file.read(max(span.stop - begin, 0))
        return io.BytesIO(content + file.readline() if content and not content.endswith(b"\n") else content)


def _first_line(span: Span, file: BinaryIO) -> int:
    """The start of the span's first line, to which the file is moved."""
    if span.start:
        file.seek(span.start - 1)
        file.readline()
    return file.tell()


def _lines_before(span: Span) -> int:
    if not span.start:
        return 0
    with span.path.open("rb") as file:
        remaining, lines = _first_line(span, file), 0
        file.seek(0)
        while remaining and (chunk := file.read(min(remaining, 2**20))):
            remaining, lines = remaining - len(chunk), lines + chunk.count(b"\n")
        return lines


def _open(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression="detect")


def _kind(path: Path) -> str:
    kind = path.suffix.lower()
    compressed = kind in COMPRESSIONS
    kind = Path(path.stem).suffix.lower() if compressed else kind
    # Parquet compresses its content itself, so a compressed .parquet is not supported.
    return "" if compressed and kind == ".parquet" else kind


def _split_of(parts: tuple[str, ...], names: dict[str, tuple[str, ...]]) -> str:
    for part in parts:
        for split, prefixes in names.items():
            if any(re.match(rf"{re.escape(prefix)}([\d._-]|$)", part, re.IGNORECASE) for prefix in prefixes):
                return split
    return "unnamed"


def _no_column(source: object, text_column: str, columns: list[str]) -> ValueError:
    return ValueError(
        f"{source} has no column {text_column!r}: set data.text_column to one it has, {' or '.join(columns)}."
    )


def _no_text(source: object, text_column: str, kind: str, columns: list[str]) -> ValueError:
    remedy = f"set data.text_column to one that does, {' or '.join(columns)}" if columns else "no column does"
    return ValueError(f"Column {text_column!r} of {source} holds {kind}, not text: {remedy}.")


def _readable() -> str:
    names = ", ".join(sorted(TABLES | TEXTS))
    return f"files that end in {names} (all but .parquet also with .gz or .zst), or tokens in .bin or .npy"
