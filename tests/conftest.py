"""A small corpus, a disk that is full, and functions on real gloo processes, for every test that needs them."""

import faulthandler
import json
import logging
import os
import resource
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if find_spec("triton") and not torch.cuda.is_available():
    # For tests/kernels: whether Triton's own functions are interpreted is settled when it is first imported, by anyone.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton  # noqa: F401


# What the server of processes has imported before any is forked from it.
PRELOADED = [
    "tests.conftest",
    "train",
    "torchlmoe.training.trainer",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
]
SECONDS_OF_A_HANG = 1200  # after which a rank prints where it is and ends


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups of processes first: a long test that starts last would leave the other cores without work."""
    items.sort(key=lambda item: "parallel" not in item.path.parts and "checkpoint" not in item.path.parts)


@pytest.fixture(autouse=True)
def level_of_our_logger():
    """A program sets it for its process, which other tests share."""
    logger = logging.getLogger("torchlmoe")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """See `write_corpus`."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def write_corpus(folder: Path) -> Path:
    """A folder with train.jsonl and validation.jsonl: documents of very different lengths, down to one letter."""
    folder.mkdir(exist_ok=True)
    sentence = "It is a truth universally acknowledged, that a single man must be in want of a whale. "
    documents = [f"{number}: {sentence * (number % 7)}"[: max(1, number * 37 % 900)] for number in range(120)]
    for split, part in (("train", documents), ("validation", documents[:5])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


@contextmanager
def files_at_most(num_bytes):
    """As if the disk were full beyond: writing fails with an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def launcher(world_size: int) -> tuple[dist.TCPStore, dict[str, str]]:
    """The store by which ranks find each other, and what their environments have in common, as of torchrun.

    The store lives here, as it does under torchrun, so that nobody else can take its port before the ranks do, and
    that no rank takes it along when it ends.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = dict(WORLD_SIZE=str(world_size), MASTER_ADDR="localhost", MASTER_PORT=str(store.port))
    return store, place | dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")


def run_on_ranks(world_size: int, function, *args) -> None:
    """function(*args) on each of `world_size` gloo processes; an error in any of them is raised here.

    They are forked from a server that has imported everything, since an import of torch takes seconds of each.
    """
    _store, place = launcher(world_size)  # the store lives as long as it is held
    mp.set_forkserver_preload(PRELOADED)
    mp.start_processes(_run_rank, ({**os.environ, **place}, function, args), world_size, start_method="forkserver")


def _run_rank(rank: int, environment: dict[str, str], function, args) -> None:
    faulthandler.dump_traceback_later(SECONDS_OF_A_HANG, exit=True)
    os.environ.clear()  # the server's, which may have been started by another test
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    function(*args)
    if dist.is_initialized():
        with suppress(RuntimeError):  # of a rank that has gone, as a test may want it
            dist.barrier()  # a rank that ends while others still talk may be aborted by gloo's threads
        dist.destroy_process_group()
