"""The tutorial: its commands and files are read from the page; all parse, and a long test runs them in a row."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from tests.pages import ROOT, commands, fenced
from tests.programs import run_program
from torchlmoe.command import FlagParser
from torchlmoe.config.load import load_config

PAGE = (ROOT / "docs" / "tutorial.md").read_text()
INSTALLING = ("python3", "source", "pip")
LAUNCHER = ["torchrun", "--nproc-per-node", "2"]
# A few steps on little text.
SMALLER = "--training.steps {steps} --data.max_tokens 60000 --data.validation_max_tokens 4000 --checkpoint.interval 2"


def files() -> dict[str, str]:
    return dict(re.findall(r"^Write `([\w./]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def programs() -> list[list[str]]:
    """All commands but those that install, without `python` or the launcher: a file or -m module, and arguments."""
    found = []
    for command in (command for code in fenced(PAGE, "sh") for command in commands(code)):
        if command[0] in INSTALLING:
            continue
        words = command[3:] if command[:3] == LAUNCHER else command[1:]
        assert command[0] == "python" or command[:3] == LAUNCHER, command
        found.append(words)
    return found


class _ParsedError(Exception):
    pass


def _parse_all(folder: str, missing: str) -> None:
    """Every command's arguments, as its own program reads them. missing: a file that only a run before would leave."""
    os.chdir(folder)
    parse = argparse.ArgumentParser.parse_known_args

    def only_parse(self, *arguments, **options):
        flags, unknown = parse(self, *arguments, **options)
        if isinstance(self, FlagParser):
            if unknown:  # of programs that take settings, too
                load_config(unknown)
            raise _ParsedError
        return flags, unknown

    argparse.ArgumentParser.parse_known_args = only_parse  # type: ignore[method-assign, assignment]
    count = 0
    for words in programs():
        main: Callable[[list[str]], None]
        if words[0] == "train.py":
            main, arguments = import_module("train").main, [*words[1:], "--job.print_config", "true"]
            arguments = ["my_model.toml" if word == missing else word for word in arguments]
        else:
            main, arguments = import_module(words[1]).main, words[2:]
        try:
            main(arguments)
        except _ParsedError:
            pass
        else:
            assert words[0] == "train.py", f"{words} was run"
        count += 1
    print(f"{count} parsed")


def _main(arguments: list[str]) -> None:
    _parse_all(*arguments)


@pytest.fixture
def folder(tmp_path):
    """The repository, by links, with the files that the page has its reader write."""
    for name in ("train.py", "torchlmoe", "kernels", "assets", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, content in files().items():
        (tmp_path / name).write_text(content)
    return tmp_path


def test_every_command_parses(folder):
    assert set(files()) == {"my_model.toml", "my_mixers.py"}
    result = run_program(_main, [str(folder), "outputs/tutorial_again/import/config.toml"], folder / "printed")
    assert result.returncode == 0, result.stderr
    assert f"{len(programs())} parsed" in result.stdout
    assert len(programs()) >= 10


@pytest.mark.long
def test_every_command_runs(folder):
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    steps = 0
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        if language == "python" and code not in files().values():
            calls = [[sys.executable, "-c", code]]
        elif language == "sh":
            calls = [command for command in commands(code) if command[0] not in INSTALLING]
        else:
            continue
        for words in calls:
            if "train.py" in words:
                steps += 4  # a run that is named twice trains on
                words = [*words, *SMALLER.format(steps=steps).split()]
            if words[0] == "python":
                words = [sys.executable, *words[1:]]
            elif words[0] == "torchrun":
                words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
            result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}\n{result.stderr}"
    assert (folder / "outputs/tutorial/loss_curve.png").exists()
    assert (folder / "outputs/fading/finished").exists()
