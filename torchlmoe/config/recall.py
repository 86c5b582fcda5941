"""The recall tasks in the data settings of a run, and their options."""

from collections.abc import Sequence
from typing import Any

from torchlmoe.config.settings import Data, MixtureSource
from torchlmoe.data.recall.store import recall_task


def recall_data(data: Data, *, with_validation: bool = True) -> list[tuple[str | None, dict[str, Any], str]]:
    """Return for each dataset of a run: its task, or None if it is no recall task, its options, and its name."""
    sources: Sequence[Data | MixtureSource] = data.mixture or [data]
    given = [(recall_task(source.dataset), source.reader_options, source.dataset) for source in sources]
    if with_validation and data.validation_dataset is not None:
        name = data.validation_dataset
        given.append((recall_task(name), recall_options(data, name), name))
    return given


def recall_options(data: Data, dataset: str) -> dict[str, Any]:
    """Return the options of a validation dataset: those of the same dataset in training, if any."""
    sources: Sequence[Data | MixtureSource] = data.mixture or [data]
    return next((source.reader_options for source in sources if source.dataset == dataset), {})
