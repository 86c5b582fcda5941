"""Paths and files from outside, which may be anything.

Reading one ends soon and takes bounded memory. What it cannot read it refuses with one sentence that names the path.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import tomli
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

T = TypeVar("T")

# Far more than any honest file has: the list of 100,000 shards takes 15 MB, the largest tokenizer 40 MB.
MAX_JSON_BYTES = 2**28
MAX_TOML_BYTES = 2**20


def expanded(path: str) -> str:
    """`path` with a leading ~ replaced by the home folder.

    Raises ValueError, whose text is a predicate as "should not be empty", for what cannot be a path.
    """
    if not path:
        raise ValueError("should not be empty (an unset shell variable is); write . for the current folder")
    if "\0" in path:
        raise ValueError("should not hold a NUL character")
    if not is_unicode(path):
        raise ValueError("should be UTF-8")
    path = os.path.expanduser(path)
    if path.startswith("~"):
        raise ValueError(f"should begin with the name of a user who has a home folder; ./{path} is a path without one")
    return path


def is_unicode(text: str) -> bool:
    """False for half of a surrogate pair: Python reads bytes of the command line that are not UTF-8 as such."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_regular(path: Path) -> BinaryIO:
    """A file opened for reading. Raises ValueError where it is missing, or is a pipe, a device or a folder."""
    try:
        # Without waiting, as a pipe without a writer otherwise does.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_small(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file. Raises ValueError as `open_regular`, and where it is larger."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path} has more than {max_bytes:,} bytes")
    return content


def read_json(path: Path, shape: TypeAdapter[T]) -> T:
    """A JSON file as `shape`. Raises ValueError, without a full stop, where it is missing or not of that shape."""
    try:
        # Never by way of Python's own reader, which fails by other errors on deep nesting and long numbers.
        return shape.validate_json(read_small(path, MAX_JSON_BYTES))
    except ValidationError as error:
        raise ValueError(f"{path} cannot be used: {complaint(error)}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ValueError, without a full stop, where it is missing or not TOML."""
    try:
        return tomli.loads(read_small(path, MAX_TOML_BYTES).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except tomli.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:
        if "digits" not in str(error):  # Python's limit for a number
            raise
        raise ValueError(f"{path} holds a number of more than 4,300 digits") from None


def complaint(error: ValidationError, prefix: str = "") -> str:
    """pydantic's first complaint in our words, without a full stop. prefix: of the value's dotted name."""
    first = error.errors(include_url=False)[0]
    name = ".".join([*([prefix] if prefix else []), *map(str, first["loc"])])
    if first["type"] == "json_invalid":
        return f"it is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
    if first["type"] == "missing":
        return f"{name} is missing"
    message = first["msg"].removeprefix("Input ").removeprefix("Value error, ").replace("String should", "should")
    limit = first.get("ctx", {}).get("ge")
    if isinstance(limit, float) and 0 < limit < 1e-3:  # which pydantic writes with all its zeros
        message = f"{message.rpartition(' ')[0]} {limit}"
    return f"{name or 'its content'} = {toml_value(first['input'])} is not valid: it {message}"


@contextmanager
def failures_to_write(what: str, place: Path, remedy: str) -> Iterator[None]:
    """Turns an OSError or safetensors' own error into an OSError of one sentence that names the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{what} could not be written to {place}: {reason}; {remedy}.") from error


def toml_value(value: Any) -> str:
    """As TOML writes it, cut to a length that a sentence bears."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text):,} characters)"
