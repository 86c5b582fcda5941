"""What the checks of styles share: a function on one gloo process, on two and on three, each with a span of a row."""

import os
import tempfile
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

NUMBERS_OF_RANKS = (1, 2, 3)  # of three, the last one folds what two others send


def on_ranks(world_size: int, function: Callable[[DeviceMesh], None]) -> None:
    """function(mesh) on each of `world_size` processes; an error in any of them is raised here."""
    mp.set_forkserver_preload(["torch.distributed.tensor.parallel"])  # or each process would import torch anew
    with tempfile.TemporaryDirectory() as folder:
        meeting = "file://" + os.path.join(folder, "store")
        mp.start_processes(_run_rank, (world_size, meeting, function), world_size, start_method="forkserver")


def _run_rank(rank: int, world_size: int, meeting: str, function: Callable[[DeviceMesh], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    function(init_device_mesh("cpu", (world_size,)))
    dist.barrier()
    dist.destroy_process_group()


def span_of(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rank's tokens of x [B, T, ...]."""
    return x.chunk(mesh.size(), 1)[mesh.get_local_rank()]


def assert_gradients_equal(mesh: DeviceMesh, pairs: Iterable[tuple[Tensor | None, Tensor | None, bool]]) -> None:
    """(found, expected, whether of tokens): those of tokens are the rank's span, others are summed over ranks."""
    for found, expected, of_tokens in pairs:
        assert found is not None
        assert expected is not None
        if not of_tokens:
            dist.all_reduce(found)
        expected = span_of(expected, mesh) if of_tokens else expected
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
