"""Our programs in separate processes, forked from a server that has imported them.

They run as from a shell: arguments, environment, signals, standard output and error, exit code.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tests.conftest import PRELOADED
from torchlmoe.command import run

Main = Callable[[list[str]], None]


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Program:
    """A program that has been started; what it prints goes to two files in `folder`, named after `name`."""

    def __init__(
        self, main: Main, arguments: Sequence[str], folder: Path, *, name: str = "program", **environment: str
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        folder.mkdir(parents=True, exist_ok=True)
        self.printed = [folder / f"{name}.{stream}" for stream in ("stdout", "stderr")]
        for path in self.printed:  # there at once, without what a program of this name has left
            path.write_text("")
        self.process = context.Process(
            target=_run, args=(main, list(arguments), self.printed, {**os.environ, **environment})
        )
        self.process.start()

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def result(self, timeout: float = 120) -> Result:
        """Waits for its end."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, self.printed[1].read_text()
        return Result(self.process.exitcode, *(path.read_text() for path in self.printed))

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.join()


def run_program(main: Main, arguments: Sequence[str], folder: Path, **environment: str) -> Result:
    with Program(main, arguments, folder, **environment) as program:
        return program.result()


def _run(main: Main, arguments: list[str], printed: list[Path], environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate([Path(os.devnull), *printed]):
        opened = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(opened, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv = ["program", *arguments]
    torch.set_num_threads(1)
    run(main)
