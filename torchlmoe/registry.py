"""Registries: the parts that settings can name, by name."""

from collections.abc import Callable
from typing import Any, TypeVar

Entry = TypeVar("Entry")


class Registry(dict[str, Entry]):
    """Parts that settings can name. kind: a noun for an entry, for messages."""

    def __init__(self, kind: str, entries: dict[str, Entry]):
        super().__init__(entries)
        self.kind = kind

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that adds an entry, also for code outside of torchlmoe (`job.custom_modules`).

        Raises ValueError if the name belongs to another entry.
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
    # If a module is imported again, under another name or after an error, its entry is another object.
    return f"{entry.__module__}.{entry.__qualname__}"
