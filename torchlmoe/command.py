"""How a program of ours ends: an error the user can mend is one sentence and a non-zero exit."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist


class FlagParser(argparse.ArgumentParser):
    """Flags of a program that takes no settings; a bad one ends it like all bad input."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.add_argument("--job.debug", metavar="true", nargs="?", help="show the whole traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help).")


def run(main: Callable[[list[str]], None]) -> None:
    """Runs main(arguments) and exits: 0, or 2 after bad input. `--job.debug true` shows the whole traceback instead."""
    arguments = sys.argv[1:]
    try:
        main(arguments)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    except BrokenPipeError:  # who read our output has seen enough, as `| head` does
        os._exit(128 + signal.SIGPIPE)
    except (ValueError, OSError, FloatingPointError) as error:
        if any(argument.startswith("--job.debug") for argument in arguments):
            raise
        rank = os.environ.get("RANK")
        where = "" if rank is None else f" (rank {rank})"
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}."
        print(f"error{where}: {' '.join(text.split())}", file=sys.stderr, flush=True)
        # No way back from here to the other ranks: leave at once, so that the launcher stops them.
        sys.stdout.flush()
        os._exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()
