"""The tables of what settings can name."""

from collections.abc import Callable
from typing import Any, TypeVar

Entry = TypeVar("Entry")


class Registry(dict[str, Entry]):
    """What settings can name. kind: what an entry is, in words, for messages."""

    def __init__(self, kind: str, entries: dict[str, Entry]):
        super().__init__(entries)
        self.kind = kind

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """A decorator that adds an entry, from the outside too (`job.custom_modules`).

        Raises ValueError for a name that is taken by another entry.
        """

        def add(entry: Entry) -> Entry:
            if name in self and _source(self[name]) != _source(entry):
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by {_source(self[name])}; choose another name."
                )
            self[name] = entry
            return entry

        return add


def _source(entry: Any) -> str:
    # A module that is imported again, by another name or after an error, brings the same entry as another object.
    return f"{entry.__module__}.{entry.__qualname__}"
