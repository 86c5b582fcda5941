"""The documents of one split of a dataset: the embedded one, local files, or one streamed from the hub."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torchlmoe.data.local_files import COMPRESSIONS, TABLES, TEXTS, find_files, read_files, text_of
from torchlmoe.data.readers import READERS


@dataclass(frozen=True)
class Corpus:
    """One split of a dataset.

    name: for messages.
    identity: JSON that changes whenever the documents may have changed.
    documents: starts reading them, in a fixed order.
    """

    name: str
    identity: dict
    documents: Callable[[], Iterator[str]]


def open_corpus(
    dataset: str,
    split: str,
    *,
    dataset_config: str | None = None,
    text_column: str = "text",
    train_split: str = "train",
    validation_split: str = "validation",
    validation_dataset: str | None = None,
    validation_fraction: float = 0.01,
    reader_options: dict[str, Any] | None = None,
) -> Corpus:
    """The "train" or "validation" split of a dataset.

    dataset: "embedded", a reader (see readers.READERS), a local file or folder (see local_files.find_files), or the id
        of a hub dataset.
    dataset_config: which configuration of a hub dataset.
    text_column: the column of a table that holds the text.
    train_split, validation_split: what the dataset calls its splits.
    validation_dataset: validate on this dataset instead: its validation split, or all of it if it has none.
    validation_fraction: of the documents, chosen by a hash of their number, that are kept from training to
        validate on, where the dataset has no validation split and there is no validation_dataset.
    reader_options: keyword arguments of the reader that `dataset` names.
    Raises ValueError where there is no such dataset, split or file; for the hub, once documents are read.
    """
    assert split in ("train", "validation")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"data.validation_fraction = {validation_fraction} must be at least 0 and less than 1.")
    name, setting = dataset, "data.dataset"
    if split == "validation" and validation_dataset is not None:
        name, setting = validation_dataset, "data.validation_dataset"
    if not name:
        raise ValueError(
            f'{setting} is empty: give "embedded", a local file or folder, a reader, or the id of a hub dataset.'
        )
    if name in READERS:
        held_out = validation_fraction if validation_dataset is None else None
        return _reader_corpus(name, split, reader_options or {} if name == dataset else {}, held_out)
    embedded = Path(str(files("torchlmoe.assets") / "embedded"))
    path = embedded if name == "embedded" else Path(name).expanduser()
    held_out = validation_fraction if validation_dataset is None else None
    if path.exists():
        return _local_corpus(name, split, find_files(path, train_split, validation_split), text_column, held_out)
    if _looks_like_a_path(name):
        raise ValueError(
            f'{setting} = "{name}" is not there: give "embedded", a local file or folder, or the id '
            "of a dataset on the hub."
        )
    split_names = {"train": train_split, "validation": validation_split}
    return _hub_corpus(name, split, split_names, dataset_config, text_column, held_out, setting)


def _local_corpus(
    name: str, split: str, splits: dict[str, list[Path]], text_column: str, held_out: float | None
) -> Corpus:
    chosen = splits["validation"] if split == "validation" and splits["validation"] else splits["train"]
    held_out = None if splits["validation"] else held_out
    if not chosen:
        raise ValueError(f"{name} holds validation or test files only: data.dataset needs files to train on.")
    identity = {
        "files": [_stamp(path) for path in chosen],
        "text_column": text_column,
        "part": None if held_out is None else (split, held_out),
    }
    return Corpus(name, identity, lambda: _part(read_files(chosen, text_column), split, held_out))


def _reader_corpus(name: str, split: str, options: dict[str, Any], held_out: float | None) -> Corpus:
    reader = READERS[name]
    paths = [Path(value).expanduser() for value in options.values() if isinstance(value, str)]
    identity = {
        "reader": [name, reader.__module__, getattr(reader, "__qualname__", "")],
        "options": options,
        "files": [_stamp(path) for path in paths if path.is_file()],
        "part": None if held_out is None else (split, held_out),
    }
    return Corpus(name, identity, lambda: _part(reader(**options), split, held_out))


def _stamp(path: Path) -> tuple[str, int, int, int]:
    """What changes with a file's content. The time of modification can be set to any; that of change cannot."""
    state = path.stat()
    return str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _hub_corpus(
    name: str,
    split: str,
    split_names: dict[str, str],
    config: str | None,
    text_column: str,
    held_out: float | None,
    setting: str,
) -> Corpus:
    def documents() -> Iterator[str]:
        # Imported here because it takes seconds, and only hub datasets need it.
        import datasets

        try:
            available = datasets.get_dataset_split_names(name, config)
        # The library and the HTTP client below it raise many unrelated types for one thing to the user.
        except Exception as error:
            raise ValueError(
                f'{setting} = "{name}" is no local path, and asking the hub for it failed: {error} '
                "Check the name, data.dataset_config and the connection."
            ) from error
        has_validation = split_names["validation"] in available
        chosen = split_names[split if has_validation else "train"]
        if chosen not in available:
            raise ValueError(
                f"{name} has no split {chosen!r}: set data.{split}_split to one of {', '.join(available)}."
            )
        records = datasets.load_dataset(name, config, split=chosen, streaming=True)
        texts = (text_of(record, text_column, name) for record in records)
        yield from _part(texts, split, None if has_validation else held_out)

    # Of the settings alone, so that a run without a connection finds the tokens of an earlier one.
    identity = {
        "hub": name,
        "config": config,
        "split": split,
        "split_names": split_names,
        "text_column": text_column,
        "held_out": held_out,
    }
    return Corpus(name, identity, documents)


def _part(texts: Iterable[str], split: str, held_out: float | None) -> Iterator[str]:
    """The held-out documents for "validation", the others for "train"; all where `held_out` is None."""
    for number, text in enumerate(texts):
        digest = hashlib.sha256(str(number).encode()).digest()
        is_held_out = int.from_bytes(digest[:8], "little") < (held_out or 0) * 2**64
        if held_out is None or is_held_out == (split == "validation"):
            yield text


def _looks_like_a_path(name: str) -> bool:
    # A hub id is "name" or "owner/name".
    return name.count("/") > 1 or name[:1] in ("/", ".", "~") or Path(name).suffix in TABLES | TEXTS | COMPRESSIONS
