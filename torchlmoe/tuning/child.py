"""A training run of a search, in a separate process: it does what train.py does, and ends with the search.

Processes are forked from a server that has imported what they need, since a short run would take less time than its
imports.
"""

import multiprocessing
import os
import sys
import threading

import torch

from torchlmoe.command import run
from torchlmoe.config.load import load_config
from torchlmoe.training.trainer import Trainer


def start(arguments: list[str], printed: str, num_threads: int, gpu: int | None) -> None:
    """Trains and exits as train.py does. printed: a file that takes standard output and error, behind what it has.

    If the search is killed, this process ends at once; the next search resumes the run from its last checkpoint.
    """
    file = os.open(printed, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    threading.Thread(target=_end_with_the_search, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    sys.argv[1:] = arguments
    run(_train)


def _train(arguments: list[str]) -> None:
    Trainer(load_config(arguments)).train()


def _end_with_the_search() -> None:
    search = multiprocessing.parent_process()
    assert search is not None
    search.join()
    os._exit(1)
