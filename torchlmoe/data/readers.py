"""The registry of readers of documents. `data.dataset` names one, and `job.custom_modules` imports its module.

    @READERS.register("my_logs")
    def read(*, path: Annotated[str, Field(description="The log file.")]) -> Iterator[str]:
        ...

A reader yields the texts of all documents in a fixed order. A part of them is held out for validation
(`data.validation_fraction`). Its annotated keyword arguments are the settings in `data.reader_options`.
"""

from collections.abc import Callable, Iterable

from torchlmoe.registry import Registry

READERS: Registry[Callable[..., Iterable[str]]] = Registry("Reader", {})
