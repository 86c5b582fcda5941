"""Opens one split of a dataset as documents: the embedded text, local files, a reader, or a dataset on the hub."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from torchlmoe.data.hub import HubSplit
from torchlmoe.data.local_files import (
    COMPRESSIONS,
    TABLES,
    TEXTS,
    TOKENS,
    find_files,
    pieces_of_files,
)
from torchlmoe.data.readers import READERS


class Piece(Protocol):
    """Consecutive documents of a corpus, which one process reads. It can be sent to another process."""

    @property
    def num_bytes(self) -> int:
        """Approximate number of bytes to read; 0 if unknown."""

    def documents(self) -> Iterator[str]:
        """Yield the texts of the documents, including empty ones."""


@dataclass(frozen=True)
class Reading:
    """How a corpus is read.

    pieces: in the order of their documents. split: "train" or "validation".
    held_out: the fraction of documents that belong to validation, chosen by a hash of their number in the corpus; None
        if the split has all documents. revision: commit of a hub dataset.
    """

    pieces: list[Piece]
    split: str
    held_out: float | None = None
    revision: str | None = None

    def takes(self, number: int) -> bool:
        """Whether document `number` of the corpus belongs to the split."""
        if self.held_out is None:
            return True
        digest = hashlib.sha256(str(number).encode()).digest()
        is_held_out = int.from_bytes(digest[:8], "little") < self.held_out * 2**64
        return is_held_out == (self.split == "validation")

    def documents(self) -> Iterator[str]:
        number = 0
        for piece in self.pieces:
            for text in piece.documents():
                if self.takes(number):
                    yield text
                number += 1


@dataclass(frozen=True)
class Corpus:
    """One split of a dataset.

    name: for messages.
    identity: JSON that changes whenever the documents may have changed.
    read: returns how to read it. The argument is the commit of a hub dataset that other processes already read, or
    None.
    token_files: files of a dataset that is tokenized already; it has no documents to read. token_dtype: their dtype, if
        the settings name it.
    """

    name: str
    identity: dict
    read: Callable[[str | None], Reading]
    token_files: list[Path] | None = None
    token_dtype: str | None = None

    def documents(self) -> Iterator[str]:
        """Yield the texts of the documents, in a fixed order."""
        yield from self.read(None).documents()


def open_corpus(
    dataset: str,
    split: str,
    *,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    text_column: str = "text",
    train_split: str = "train",
    validation_split: str = "validation",
    validation_dataset: str | None = None,
    validation_fraction: float = 0.01,
    reader_options: dict[str, Any] | None = None,
    token_dtype: str | None = None,
) -> Corpus:
    """Opens the "train" or "validation" split of a dataset.

    dataset: "embedded", a reader (see readers.READERS), a local file or folder (see local_files.find_files), or the id
        of a hub dataset.
    dataset_config, dataset_revision: configuration of a hub dataset, and its commit, branch or tag.
    text_column: the column of a table that holds the text.
    train_split, validation_split: the names of the splits in the dataset.
    validation_dataset: validate on this dataset instead: its validation split, or all of it if it has none.
    validation_fraction: fraction of documents to validate on and not to train on, chosen by a hash of their number. It
        applies if the dataset has no validation split and there is no validation_dataset.
    reader_options: keyword arguments of the reader that `dataset` names.
    token_dtype: "uint16" or "uint32", of files of tokens without a header; None chooses by the size of the vocabulary.
    Raises ValueError if the dataset, split or file does not exist. For a hub dataset this happens in `Corpus.read`.
    """
    assert split in ("train", "validation")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"data.validation_fraction = {validation_fraction} must be at least 0 and less than 1.")
    name, setting = dataset, "data.dataset"
    if split == "validation" and validation_dataset is not None:
        name, setting, dataset_revision = validation_dataset, "data.validation_dataset", None
    if not name:
        raise ValueError(
            f'{setting} is empty: give "embedded", a local file or folder, a reader, or the id of a hub dataset.'
        )
    held_out = validation_fraction if validation_dataset is None else None
    if name in READERS:
        return _reader_corpus(name, split, reader_options or {} if name == dataset else {}, held_out)
    embedded = Path(str(files("torchlmoe.assets") / "embedded"))
    path = embedded if name == "embedded" else Path(name).expanduser()
    if path.exists():
        files_of_split = find_files(path, train_split, validation_split)
        return _local_corpus(name, split, files_of_split, text_column, held_out, token_dtype)
    if _looks_like_a_path(name):
        raise ValueError(
            f'{setting} = "{name}" does not exist: give "embedded", a local file or folder, or the id '
            "of a dataset on the hub."
        )
    hub = HubSplit(
        name=name,
        split=split,
        split_names={"train": train_split, "validation": validation_split},
        config=dataset_config,
        revision=dataset_revision,
        text_column=text_column,
        setting=setting,
    )

    def read(revision: str | None) -> Reading:
        pieces, has_validation, commit = hub.look_up(revision)
        return Reading(list(pieces), split, None if has_validation else held_out, commit)

    return Corpus(name, {**hub.identity(), "held_out": held_out}, read)


def _local_corpus(
    name: str,
    split: str,
    splits: dict[str, list[Path]],
    text_column: str,
    held_out: float | None,
    token_dtype: str | None,
) -> Corpus:
    chosen = splits["validation"] if split == "validation" and splits["validation"] else splits["train"]
    held_out = None if splits["validation"] else held_out
    if not chosen:
        raise ValueError(f"{name} holds only validation or test files: data.dataset needs files to train on.")
    if any(path.suffix.lower() in TOKENS for path in chosen):
        if split == "validation" and held_out is not None:
            raise ValueError(
                f"{name} holds tokens and no validation files: give a data.validation_dataset, name a file for "
                "validation (val.bin), or set validation.enable = false."
            )
        indices = [path.with_suffix(suffix) for path in chosen for suffix in (".idx", ".csv.gz")]
        stamps = [_stamp(path) for path in [*chosen, *(index for index in indices if index.is_file())]]
        dtype = {"uint16": "<u2", "uint32": "<u4", None: None}[token_dtype]
        return Corpus(name, {"tokens": stamps, "dtype": dtype}, lambda revision: Reading([], split), chosen, dtype)
    identity = {
        "files": [_stamp(path) for path in chosen],
        "text_column": text_column,
        "part": None if held_out is None else (split, held_out),
    }
    return Corpus(name, identity, lambda revision: Reading([*pieces_of_files(chosen, text_column)], split, held_out))


@dataclass(frozen=True)
class _ReaderPiece:
    """All documents of a reader."""

    reader: str
    options: dict[str, Any]
    num_bytes: int = 0

    def documents(self) -> Iterator[str]:
        yield from READERS[self.reader](**self.options)


def _reader_corpus(name: str, split: str, options: dict[str, Any], held_out: float | None) -> Corpus:
    reader = READERS[name]
    paths = [Path(value).expanduser() for value in options.values() if isinstance(value, str)]
    identity = {
        "reader": [name, reader.__module__, getattr(reader, "__qualname__", "")],
        "options": options,
        "files": [_stamp(path) for path in paths if path.is_file()],
        "part": None if held_out is None else (split, held_out),
    }
    return Corpus(name, identity, lambda revision: Reading([_ReaderPiece(name, options)], split, held_out))


def _stamp(path: Path) -> tuple[str, int, int, int]:
    """Path, size and times of a file, which change with its content. Programs cannot set the change time."""
    state = path.stat()
    return str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _looks_like_a_path(name: str) -> bool:
    # A hub id is "name" or "owner/name".
    suffixes = TABLES | TEXTS | COMPRESSIONS | TOKENS
    return name.count("/") > 1 or name[:1] in ("/", ".", "~") or Path(name).suffix in suffixes
