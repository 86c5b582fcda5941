"""Readers of documents that are registered by name, and that `data.dataset` can name (`job.custom_modules`).

    @READERS.register("my_logs")
    def read(*, path: Annotated[str, Field(description="The log file.")]) -> Iterator[str]:
        ...

A reader yields the texts of all documents, in a fixed order; validation holds some out (`data.validation_fraction`).
Its annotated keyword arguments are its settings, `data.reader_options`.
"""

from collections.abc import Callable, Iterable

from torchlmoe.registry import Registry

READERS: Registry[Callable[..., Iterable[str]]] = Registry("Reader", {})
