"""The error of a setting that cannot be used, and its sentence: it names the value and the remedy."""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from torchlmoe.config.settings import fields
from torchlmoe.files import complaint


class ConfigError(ValueError):
    """A setting that cannot be used."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the known name nearest to it, or all known names."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; the nearest is {close[0]}" if close else f"; choose one of {', '.join(known)}"


def _known_settings(root: Any, path: list[str]) -> dict[str, Any]:
    """Return the settings of the table that has the last name of a path. Numbers in a path are places in a list."""
    for part in path[:-1]:
        root = fields(root)[part] if not part.isdigit() else root
        root = getattr(root, "__origin__", root)  # out of Annotated
        root = root.__args__[0] if getattr(root, "__origin__", None) is list else root
    return fields(root)


def sentence(error: ValidationError, root: type | None, prefix: str = "", known: Any = ()) -> str:
    """Return a sentence about the first problem that pydantic found.

    root: class of the tables of settings; if None, `known` has the names that the unknown one may have meant.
    prefix: dotted name of the table.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    name = ".".join([*([prefix] if prefix else []), *path])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if root is not None:
            known = _known_settings(root, path)
        return f"{name} is not a setting{nearest(path[-1], known)}."
    return f"{complaint(error, prefix)}{'; give it a value' * (first['type'] == 'missing')}."
