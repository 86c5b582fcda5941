"""One process as any rank of a run that does not exist: collectives return at once, and tensors have no storage."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchlmoe.ops import host_dtype


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within it, a CPU's tensors are laid out, and their products done, as a GPU's would be."""
    host_dtype.stands_for_gpu = True
    try:
        yield
    finally:
        host_dtype.stands_for_gpu = False


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[FakeTensorMode]:
    """This process is rank `rank` of `world_size`. Yields the mode in which tensors have shapes and no values.

    The process must not have joined a process group.
    """
    assert not dist.is_initialized(), "a process that has joined other ranks cannot play another one"
    vote = _PipelineSchedule._warmup_p2p
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Set timeout is now only supported")  # a fake group has none
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        _PipelineSchedule._warmup_p2p = _agree  # type: ignore[method-assign,assignment]
        _clear_sharding_prop_cache()
        try:
            # What was shaped before has meta tensors, of which none is computed with.
            yield FakeTensorMode(allow_non_fake_inputs=True)
        finally:
            _PipelineSchedule._warmup_p2p = vote  # type: ignore[method-assign]
            # Equal meshes share its entries, and would get the groups of ranks that are gone.
            _clear_sharding_prop_cache()
            dist.destroy_process_group()


def _agree(schedule: Any, stages: list[Any], *_: Any) -> None:
    """Ranks of a pipeline vote on whether all of them know the shapes that travel. Ours do; see `PipelineStep`."""
    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC
