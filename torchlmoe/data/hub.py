"""Streams a split of a dataset on the hub, at one commit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchlmoe.data.local_files import MOST_PIECES, text_of


@dataclass(frozen=True)
class HubPiece:
    """Part `index` of `number` equal parts of the files of a split."""

    name: str
    config: str | None
    split: str
    revision: str | None
    text_column: str
    index: int = 0
    number: int = 1
    num_bytes: int = 0

    def documents(self) -> Iterator[str]:
        records = _stream(self.name, self.config, self.split, self.revision)
        if self.number > 1:
            records = records.shard(num_shards=self.number, index=self.index)
        for record in records:
            yield text_of(record, self.text_column, self.name)


@dataclass(frozen=True)
class HubSplit:
    """A split, as the settings describe it.

    split: "train" or "validation". split_names: the dataset's names of both. revision: commit, branch or tag.
    setting: name of the setting, for messages.
    """

    name: str
    split: str
    split_names: dict[str, str]
    config: str | None
    revision: str | None
    text_column: str
    setting: str

    def identity(self) -> dict[str, Any]:
        """JSON of the settings only, so that a run without a connection finds the tokens of an earlier run."""
        identity = {
            "hub": self.name,
            "config": self.config,
            "split": self.split,
            "split_names": self.split_names,
            "text_column": self.text_column,
        }
        return identity if self.revision is None else {**identity, "revision": self.revision}

    def look_up(self, commit: str | None) -> tuple[list[HubPiece], bool, str]:
        """Return the pieces, whether the dataset has a validation split, and the commit that the pieces are read from.

        commit: the commit to read; None for the current one of `revision` (or of the main branch).
        Raises ValueError if the hub does not answer, or has no such dataset or split.
        """
        # Imported here, since it takes seconds and only hub datasets need it.
        import datasets
        import huggingface_hub

        try:
            if commit is None:
                commit = huggingface_hub.HfApi().dataset_info(self.name, revision=self.revision).sha
            available = datasets.get_dataset_split_names(self.name, self.config, revision=commit)
        # The library and its HTTP client raise many unrelated types of errors.
        except Exception as error:
            raise ValueError(
                f'{self.setting} = "{self.name}" is not a local path, and the request to the hub failed: {error} '
                "Check the name, data.dataset_config, data.dataset_revision and the connection."
            ) from error
        assert commit is not None
        has_validation = self.split_names["validation"] in available
        chosen = self.split_names[self.split if has_validation else "train"]
        if chosen not in available:
            raise ValueError(
                f"{self.name} has no split {chosen!r}: set data.{self.split}_split to one of {', '.join(available)}."
            )
        number = min(getattr(_stream(self.name, self.config, chosen, commit), "num_shards", 1), MOST_PIECES)
        pieces = [
            HubPiece(self.name, self.config, chosen, commit, self.text_column, index, number) for index in range(number)
        ]
        return pieces, has_validation, commit


def _stream(name: str, config: str | None, split: str, revision: str | None) -> Any:
    import datasets

    return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
