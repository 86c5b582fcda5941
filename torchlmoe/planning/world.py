"""Runs one process as any rank of a larger run: collectives return at once, and tensors have no storage."""

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
    """Within the context, tensors on the CPU get the layouts and the products that they would get on a GPU."""
    host_dtype.stands_for_gpu = True
    try:
        yield
    finally:
        host_dtype.stands_for_gpu = False


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[FakeTensorMode]:
    """Within the context, this process is rank `rank` of `world_size`. Yields a mode whose tensors have no values.

    Raises AssertionError if the process has joined a process group.
    """
    assert not dist.is_initialized(), "a process that belongs to a process group cannot stand for another rank"
    vote = _PipelineSchedule._warmup_p2p
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Set timeout is now only supported")  # a fake group has none
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        _PipelineSchedule._warmup_p2p = _agree  # type: ignore[method-assign,assignment]
        _clear_sharding_prop_cache()
        try:
            # A model that was shaped before has meta tensors. No operation uses their values.
            yield FakeTensorMode(allow_non_fake_inputs=True)
        finally:
            _PipelineSchedule._warmup_p2p = vote  # type: ignore[method-assign]
            # Equal meshes share cache entries: a later run would get process groups that no longer exist.
            _clear_sharding_prop_cache()
            dist.destroy_process_group()


def _agree(schedule: Any, stages: list[Any], *_: Any) -> None:
    """Replaces the vote of a pipeline's ranks on whether all know the shapes they exchange. All do: `PipelineStep`."""
    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC
