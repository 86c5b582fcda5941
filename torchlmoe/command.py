"""Runs a program: an error that the user can correct is one sentence and a non-zero exit code."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from torchlmoe.files import expanded, read_toml

# What torch says where sizes are more than there is room for, in plain RuntimeErrors and TypeErrors.
_TOO_LARGE = ("can't allocate memory", "not enough memory", "size calculation overflowed", "Overflow when unpacking")


class FlagParser(argparse.ArgumentParser):
    """Flags of a program that takes no settings; a bad one ends it like all bad input."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.add_argument("--job.debug", metavar="true", nargs="?", help="show the whole traceback of an error")

    def add_path(self, flag: str, **options) -> None:
        """A flag whose value is a path, in which ~ is the home folder."""
        self.add_argument(flag, type=_path, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help).")


def run(main: Callable[[list[str]], None]) -> None:
    """Runs main(arguments) and exits: 0, or 2 after bad input, whose whole traceback job.debug = true shows too."""
    arguments = sys.argv[1:]
    try:
        main(arguments)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    except BrokenPipeError:  # who read our output has seen enough, as `| head` does
        os._exit(128 + signal.SIGPIPE)
    except Exception as error:
        text = _sentence(error)
        if text is None:
            raise
        if _shows_traceback(arguments):
            traceback.print_exception(error)
        rank = os.environ.get("RANK")
        where = "" if rank is None else f" (rank {rank})"
        print(f"error{where}: {text}", file=sys.stderr, flush=True)
        # This rank cannot rejoin the others: exit at once, so that the launcher stops them.
        sys.stdout.flush()
        os._exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def _sentence(error: Exception) -> str | None:
    """What to tell the user, or None where the program itself is wrong."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, (RuntimeError, TypeError)) and any(part in text for part in _TOO_LARGE)
    ):
        reason = text.partition("\n")[0].rstrip(".")
        return f"There is not enough memory ({reason}); choose smaller sizes, or fewer rows or tokens at once."
    if isinstance(error, OSError) and error.filename is not None:
        return " ".join(f"{error.filename}: {error.strerror}.".split())
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return " ".join(text.split())
    return None


def _path(text: str) -> Path:
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


def _shows_traceback(arguments: list[str]) -> bool:
    """job.debug, as far as it can be told: what is wrong may be the settings themselves."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--job.debug", dest="debug", nargs="?", const="true")
    parser.add_argument("--job.config_file", dest="file", nargs="?")
    given, _ = parser.parse_known_args(arguments)
    if given.debug is not None or given.file is None:
        return given.debug == "true"
    try:
        return read_toml(_path(given.file))["job"]["debug"] is True
    except (OSError, ValueError, KeyError, TypeError, argparse.ArgumentTypeError):
        return False
