"""Ranks that torchrun starts again, on the store that it keeps."""

import os
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.conftest import PRELOADED, _run_rank, launcher
from torchlmoe.parallel.mesh import start_process_group


def meet():
    time.sleep(2 * int(os.environ["RANK"]))  # so that the first rank finds what the attempt before has left
    start_process_group(torch.device("cpu"), 15)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2


def test_each_attempt_meets_anew():
    _store, place = launcher(2)
    mp.set_forkserver_preload(PRELOADED)
    for attempt in ("0", "1"):
        environment = {**os.environ, **place, "TORCHELASTIC_RESTART_COUNT": attempt}
        mp.start_processes(_run_rank, (environment, meet, ()), 2, start_method="forkserver")
