"""Reads files of unknown origin in bounded time and memory, and replaces files by complete ones.

If a file cannot be read or written, the error is one sentence that names the path.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import tomli
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

T = TypeVar("T")

# Far more than real files need: a list of 100,000 shards takes 15 MB, and the largest tokenizer 40 MB.
MAX_JSON_BYTES = 2**28
MAX_TOML_BYTES = 2**20


def expanded(path: str) -> str:
    """Returns `path` with a leading ~ replaced by the home folder.

    Raises ValueError for text that cannot be a path. Its message is a predicate such as "should not be empty".
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
    """Whether text is UTF-8. Python reads other bytes of the command line as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading. Raises ValueError, without a full stop, if it is missing or not a regular file."""
    try:
        # Non-blocking, since opening a pipe without a writer would wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_small(path: Path, max_bytes: int) -> bytes:
    """Returns the content of a regular file. Raises ValueError like `open_regular`, and for more than max_bytes."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path} has more than {max_bytes:,} bytes")
    return content


def read_json(path: Path, shape: TypeAdapter[T]) -> T:
    """Returns a JSON file as `shape`. Raises ValueError, without a full stop, if it is missing or has another shape."""
    try:
        # Not by Python's json module, which raises other errors for deep nesting and long numbers.
        return shape.validate_json(read_small(path, MAX_JSON_BYTES))
    except ValidationError as error:
        raise ValueError(f"{path} cannot be used: {complaint(error)}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the tables of a TOML file. Raises ValueError, without a full stop, if it is missing or not TOML."""
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
    """Returns a clause about the first problem that pydantic found, without a full stop. prefix: added to its name."""
    first = error.errors(include_url=False)[0]
    name = ".".join([*([prefix] if prefix else []), *map(str, first["loc"])])
    if first["type"] == "json_invalid":
        return f"it is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
    if first["type"] == "missing":
        return f"{name} is missing"
    message = first["msg"].removeprefix("Input ").removeprefix("Value error, ").replace("String should", "should")
    limit = first.get("ctx", {}).get("ge")
    if isinstance(limit, float) and 0 < limit < 1e-3:  # pydantic writes it with all its zeros
        message = f"{message.rpartition(' ')[0]} {limit}"
    return f"{name or 'its content'} = {toml_value(first['input'])} is not valid: it {message}"


@contextmanager
def failures_to_write(name: str, place: Path, remedy: str) -> Iterator[None]:
    """Within the context, converts an OSError or an error of safetensors to an OSError of one sentence.

    name: of what is written, at the beginning of the sentence. place: its path. remedy: an imperative clause.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{name} could not be written to {place}: {reason}; {remedy}.") from error


@contextmanager
def replacing(path: Path, name: str, remedy: str) -> Iterator[Path]:
    """Yields a path beside `path` for a new file or folder, which is renamed to `path` when the context ends.

    So `path` is never incomplete. After an error, `path` is unchanged and nothing else remains. name, remedy, and the
    OSError: as in `failures_to_write`.
    """
    partial = path.with_name(f"{path.name}.partial")
    _remove(partial)
    try:
        with failures_to_write(name, path, remedy):
            yield partial
            partial.replace(path)
            sync_folder(path.parent)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def toml_value(value: Any) -> str:
    """Returns a value in the notation of TOML, cut to about 100 characters."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text):,} characters)"
