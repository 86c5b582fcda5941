"""Runs a program: an error that the user can correct is one sentence and a non-zero exit code."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist

from torchlmoe.files import expanded, read_toml

if TYPE_CHECKING:
    from torchlmoe.config import Config
    from torchlmoe.data.tokenizer import Tokenizer
    from torchlmoe.model.decoder import Decoder

# Parts of torch's messages, in plain RuntimeErrors and TypeErrors, for tensors that do not fit in memory.
_TOO_LARGE = ("can't allocate memory", "not enough memory", "size calculation overflowed", "Overflow when unpacking")


class FlagParser(argparse.ArgumentParser):
    """Parser of a program's flags. A flag that is unknown or not valid raises ValueError."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.add_argument("--job.debug", metavar="true", nargs="?", help="show the whole traceback of an error")

    def add_path(self, flag: str, **options) -> None:
        """Add a flag whose value is a path. A leading ~ is the home folder."""
        self.add_argument(flag, type=_path, **options)

    def add_model(self) -> None:
        """Add --checkpoint, --dtype and --device, which `open_flagged_model` reads."""
        self.add_path(
            "--checkpoint",
            metavar="DIR",
            required=True,
            help="a run's folder, one of its checkpoints, an exported model, or a folder of transformers",
        )
        self.add_argument(
            "--dtype", choices=["float32", "bfloat16", "float64"], help="dtype of the weights; as saved if unset"
        )
        self.add_argument(
            "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run; default auto"
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help).")


def run(main: Callable[[list[str]], None]) -> None:
    """Runs main(arguments). Exits with 2 and one sentence after bad input; job.debug = true adds the traceback."""
    arguments = sys.argv[1:]
    try:
        main(arguments)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of the output has ended, such as `| head`
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
        # This rank cannot rejoin the others. It exits immediately, so that the launcher stops them.
        sys.stdout.flush()
        os._exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def open_flagged_model(flags: argparse.Namespace) -> "tuple[Decoder, Config, Tokenizer]":
    """Opens the model that the flags of `FlagParser.add_model` name. Errors: see `checkpoint.open_model`."""
    # Imported here, so that --help and mistyped flags get a fast answer.
    from torchlmoe.checkpoint import open_model
    from torchlmoe.parallel.mesh import choose_device

    dtype = None if flags.dtype is None else getattr(torch, flags.dtype)
    return open_model(flags.checkpoint, dtype=dtype, device=choose_device(flags.device))


def _sentence(error: Exception) -> str | None:
    """The message for the user, or None if the error is a fault of the program."""
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
    """The value of job.debug. Other settings may be invalid, so this reads only the flag or the line of the file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--job.debug", dest="debug", nargs="?", const="true")
    parser.add_argument("--job.config_file", dest="file", nargs="?")
    flags, _ = parser.parse_known_args(arguments)
    if flags.debug is not None or flags.file is None:
        return flags.debug == "true"
    try:
        return read_toml(_path(flags.file))["job"]["debug"] is True
    except (OSError, ValueError, KeyError, TypeError, argparse.ArgumentTypeError):
        return False
