"""The documents of one split of a dataset: the embedded one, local files, or one streamed from the hub."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from torchlmoe.data.local_files import COMPRESSIONS, TABLES, TEXTS, find_files, read_files, text_of


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
) -> Corpus:
    """The "train" or "validation" split of a dataset.

    dataset: "embedded", a local file or folder (see local_files.find_files), or the id of a hub dataset.
    dataset_config: which configuration of a hub dataset.
    text_column: the column of a table that holds the text.
    train_split, validation_split: what the dataset calls its splits.
    validation_dataset: validate on this dataset instead: its validation split, or all of it if it has none.
    validation_fraction: of the documents, chosen by a hash of their number, that are kept from training to
        validate on, where the dataset has no validation split and there is no validation_dataset.
    Raises ValueError where there is no such dataset, split or file.
    """
    assert split in ("train", "validation")
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"data.validation_fraction = {validation_fraction} must be at least 0 and less than 1."
        )
    name, setting = dataset, "data.dataset"
    if split == "validation" and validation_dataset is not None:
        name, setting = validation_dataset, "data.validation_dataset"
    path = (
        Path(str(files("torchlmoe.assets") / "embedded")) if name == "embedded" else Path(name).expanduser()
    )

    if path.exists():
        splits = find_files(path, train_split, validation_split)
        has_validation = bool(splits["validation"])
        chosen = splits["validation"] if split == "validation" and has_validation else splits["train"]
        corpus = _local_corpus(name, chosen, text_column)
    elif _looks_like_a_path(name):
        raise ValueError(
            f'{setting} = "{name}" is not there: give "embedded", a local file or folder, or the id '
            "of a dataset on the hub."
        )
    else:
        names = _hub_splits(name, dataset_config, setting)
        has_validation = validation_split in names
        chosen_name = validation_split if split == "validation" and has_validation else train_split
        if chosen_name not in names:
            raise ValueError(
                f"{name} has no split {chosen_name!r}: set data.{split}_split to one of {', '.join(names)}."
            )
        corpus = _hub_corpus(name, dataset_config, chosen_name, text_column)

    if has_validation or validation_dataset is not None:
        return corpus
    return _part_of(corpus, split, validation_fraction)


def _local_corpus(name: str, paths: list[Path], text_column: str) -> Corpus:
    if not paths:
        raise ValueError(f"{name} holds validation or test files only: data.dataset needs files to train on.")
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    identity = {"files": facts, "text_column": text_column}
    return Corpus(name, identity, lambda: read_files(paths, text_column))


def _hub_splits(name: str, config: str | None, setting: str) -> list[str]:
    # Imported here because it takes seconds, and only hub datasets need it.
    import datasets

    try:
        return datasets.get_dataset_split_names(name, config)
    # The library, and the HTTP client below it, raise many unrelated types for what is one thing to the user.
    except Exception as error:
        raise ValueError(
            f'{setting} = "{name}" is no local path, and asking the hub for it failed: {error} '
            "Check the name, data.dataset_config and the connection."
        ) from error


def _hub_corpus(name: str, config: str | None, split: str, text_column: str) -> Corpus:
    def documents() -> Iterator[str]:
        import datasets

        for record in datasets.load_dataset(name, config, split=split, streaming=True):
            yield text_of(record, text_column, name)

    identity = {"hub": name, "config": config, "split": split, "text_column": text_column}
    return Corpus(name, identity, documents)


def _part_of(corpus: Corpus, split: str, fraction: float) -> Corpus:
    """The held-out documents of `corpus`, or the others."""

    def is_held_out(number: int) -> bool:
        digest = hashlib.sha256(str(number).encode()).digest()
        return int.from_bytes(digest[:8], "little") < fraction * 2**64

    def documents() -> Iterator[str]:
        for number, text in enumerate(corpus.documents()):
            if is_held_out(number) == (split == "validation"):
                yield text

    return replace(corpus, identity={**corpus.identity, "split_off": [split, fraction]}, documents=documents)


def _looks_like_a_path(name: str) -> bool:
    # A hub id is "name" or "owner/name".
    return (
        name.count("/") > 1
        or name[:1] in ("/", ".", "~")
        or Path(name).suffix in TABLES | TEXTS | COMPRESSIONS
    )
