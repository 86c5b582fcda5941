"""Starts the process group, and builds the device mesh from whose axes all parallel layouts take their groups."""

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from torchlmoe.config.settings import Parallelism


def choose_device(name: str) -> torch.device:
    """Returns the device of this process. Under torchrun each local rank has its own GPU.

    name: "auto" (CUDA if available), "cpu" or "cuda". Raises ValueError if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"training.device = 'cuda' needs a GPU for local rank {index}, but {torch.cuda.device_count()} are "
            "visible; use training.device = 'cpu' or fewer ranks."
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def world_size_of_launch() -> int:
    """Number of ranks that torchrun started; 1 for a plain process."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Launch(NamedTuple):
    """This process among those of the run. store: shared by all ranks."""

    store: dist.Store
    rank: int
    world_size: int


def join_launch(timeout_seconds: float = 300.0) -> Launch:
    """Joins the store of all ranks, by the variables that torchrun sets. A plain process creates its own store.

    timeout_seconds: timeout of requests, and of waiting for the rank that serves the store.
    """
    if dist.is_initialized():
        assert dist.group.WORLD is not None
        return Launch(dist.group.WORLD.get_group_store(), dist.get_rank(), dist.get_world_size())
    if "WORLD_SIZE" not in os.environ:
        return Launch(dist.HashStore(), 0, 1)
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if is_store_of_launcher():
        # The launcher's store serves all attempts: a restarted rank would read addresses of the preceding attempt.
        # A store of rank 0 is new in each attempt. Launchers of several nodes may count attempts differently.
        store = dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return Launch(store, rank, world_size)


def is_store_of_launcher() -> bool:
    """Whether the launcher serves the store in which ranks meet; otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def start_process_group(device: torch.device, timeout_seconds: float = 300.0, launch: Launch | None = None) -> None:
    """Starts the process group: gloo on a CPU, NCCL on CUDA. A plain process is a group of one.

    timeout_seconds: timeout of collectives. launch: the result of `join_launch`, if it was called before.
    """
    if dist.is_initialized():
        return
    store, rank, world_size = launch or join_launch(timeout_seconds)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        store=dist.PrefixStore("default_pg", store),
        rank=rank,
        world_size=world_size,
    )


def build_mesh(degrees: Parallelism, device_type: str) -> DeviceMesh:
    """Returns a mesh with axes pp, dp_replicate, dp_shard, cp, tp over all ranks. dp_shard has the remaining ranks."""
    pipeline, replicate = degrees.pipeline_parallel_degree, degrees.data_parallel_replicate_degree
    context, tensor = degrees.context_parallel_degree, degrees.tensor_parallel_degree
    shard = dist.get_world_size() // (pipeline * replicate * context * tensor)
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    return init_device_mesh(device_type, (pipeline, replicate, shard, context, tensor), mesh_dim_names=names)


def parameter_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh of FSDP: dp_shard_cp, the flattened axes dp_shard and cp, after dp_replicate if there are replicas."""
    shard = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    replicate = mesh["dp_replicate"]
    return DeviceMesh._concatenate([replicate, shard]) if replicate.size() > 1 else shard


def expert_mesh(mesh: DeviceMesh, degree: int) -> DeviceMesh:
    """The mesh of experts, with axes pp, dp_replicate, efsdp, ep.

    efsdp and ep have the ranks of dp_shard, cp and tp in order; `degree` consecutive ranks split a layer's experts.
    """
    pipeline, replicate = mesh["pp"].size(), mesh["dp_replicate"].size()
    sizes = (pipeline, replicate, mesh.size() // (pipeline * replicate * degree), degree)
    return init_device_mesh(mesh.device_type, sizes, mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep"))


def pieces_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that have the pieces of a microbatch between blocks, in the order of tokens: cp and tp, flattened."""
    return mesh["cp", "tp"]._flatten("cp_tp")


def set_timeouts(meshes: Iterable[DeviceMesh], seconds: float) -> None:
    """Sets the timeout of all groups of the meshes. Subgroups otherwise keep the backend's long default timeout."""
    for group in {group for mesh in meshes for group in mesh.get_all_groups()}:
        _set_pg_timeout(timedelta(seconds=seconds), group)
