"""A training run of a search, in a process of its own: what train.py does, for as long as the search lives.

Standard input is a pipe that the search holds open. Its end means that the search was killed, and this process ends at
once; the next one resumes the run from its last checkpoint.
"""

import os
import sys
import threading

from torchlmoe.command import run
from torchlmoe.config.load import load_config


def main(arguments: list[str]) -> None:
    threading.Thread(target=_end_with_the_search, daemon=True).start()
    config = load_config(arguments)
    from torchlmoe.training.trainer import Trainer

    Trainer(config).train()


def _end_with_the_search() -> None:
    os.read(sys.stdin.fileno(), 1)  # not by sys.stdin, whose lock a thread may not hold when Python ends
    os._exit(1)


if __name__ == "__main__":
    run(main)
