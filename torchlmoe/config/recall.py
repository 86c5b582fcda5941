"""Which recall tasks a run's data settings name, and with which options."""

from collections.abc import Sequence
from typing import Any

from torchlmoe.config.settings import Data, MixtureSource
from torchlmoe.data.recall.store import recall_task


def recall_data(data: Data, *, with_validation: bool = True) -> list[tuple[str | None, dict[str, Any], str]]:
    """Of each dataset that is read: its task (None if it is none), the task's options, and its name."""
    sources: Sequence[Data | MixtureSource] = data.mixture or [data]
    given = [(recall_task(source.dataset), source.reader_options, source.dataset) for source in sources]
    if with_validation and data.validation_dataset is not None:
        name = data.validation_dataset
        given.append((recall_task(name), recall_options(data, name), name))
    return given


def recall_options(data: Data, dataset: str) -> dict[str, Any]:
    """The options of a dataset to validate on: those that it is trained on with, if it is."""
    sources: Sequence[Data | MixtureSource] = data.mixture or [data]
    return next((source.reader_options for source in sources if source.dataset == dataset), {})
