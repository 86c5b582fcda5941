"""Runs one training run of a search in a separate process, like train.py. The process ends with the search.

Processes are forked from a server that has already imported their modules, since a short run takes less time than the
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


def start(arguments: list[str], printed: str, num_threads: int, gpu: str | None) -> None:
    """Trains and exits as train.py does.

    arguments: of train.py. printed: a file to which standard output and error are appended. num_threads: CPU threads,
    unless OMP_NUM_THREADS is set. gpu: the only visible GPU, as in CUDA_VISIBLE_DEVICES; None for all.
    If the search is killed, this process ends too, and the next search resumes the run from its last checkpoint.
    """
    file = os.open(printed, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    threading.Thread(target=_end_with_the_search, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    sys.argv[1:] = arguments
    run(_train)


def _train(arguments: list[str]) -> None:
    Trainer(load_config(arguments)).train()


def _end_with_the_search() -> None:
    search = multiprocessing.parent_process()
    assert search is not None
    search.join()
    os._exit(1)
