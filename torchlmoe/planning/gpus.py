"""Memory and rates of GPUs, from their makers' data sheets, and of this machine's CPU, measured."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from torchlmoe.training.peak import peak_flops

GB, TB = 1e9, 1e12
GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """Memory and rates of one device.

    memory_bytes: memory that a program can use.
    bfloat16, float8, float32: rates of dense matrix products, in FLOP/s.
    memory_rate: in bytes/s. link, network: in bytes/s in one direction, to devices of the same node and of other nodes.
    reduced_rate: the rate of an all-reduce's bytes, relative to that of other messages.
    seconds_to_start: time to start an operation from Python. seconds_of_message: latency of a message.
    overlaps: whether messages travel while the device computes. On a CPU they need its cores, so they do not.
    device_type: "cuda" or "cpu".
    """

    memory_bytes: int
    bfloat16: float
    float8: float
    float32: float
    memory_rate: float
    link: float
    network: float
    reduced_rate: float = 1.0
    seconds_to_start: float = 5e-6
    seconds_of_message: float = 20e-6
    overlaps: bool = True
    device_type: str = "cuda"

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of matrix products in `dtype`."""
        if dtype.itemsize == 1:
            return self.float8
        return self.bfloat16 if dtype.itemsize == 2 else self.float32


# float32 is full precision, torch's default, not TF32. Network: one 400 Gbit/s port for each GPU (ConnectX-7, 50 GB/s;
# 200 Gbit/s for A100), as in the makers' reference systems of eight.
GPUS = {
    # NVIDIA A100 80GB SXM data sheet: 80 GB, 312 TFLOP/s, 19.5 in float32, 2,039 GB/s; NVLink 600 GB/s both ways.
    # It has no float8, which is counted as bfloat16.
    "a100": GPU(80 * GIB, 312e12, 312e12, 19.5e12, 2039 * GB, 300 * GB, 25 * GB),
    # NVIDIA H100 SXM data sheet: 80 GB, 989 TFLOP/s, 1,979 in float8, 67 in float32, 3.35 TB/s; NVLink 900 GB/s.
    "h100": GPU(80 * GIB, 989e12, 1979e12, 67e12, 3.35 * TB, 450 * GB, 50 * GB),
    # NVIDIA H200 SXM data sheet: 141 GB, the rates of the H100, 4.8 TB/s; NVLink 900 GB/s.
    "h200": GPU(int(141 * GB), 989e12, 1979e12, 67e12, 4.8 * TB, 450 * GB, 50 * GB),
    # NVIDIA DGX B200 data sheet, an eighth of it: 180 GB, 2.25 PFLOP/s, 4.5 in float8, 8 TB/s; NVLink 1.8 TB/s.
    # NVIDIA Blackwell data sheet, float32: 80 TFLOP/s.
    "b200": GPU(int(180 * GB), 2250e12, 4500e12, 80e12, 8 * TB, 900 * GB, 50 * GB),
    # AMD Instinct MI300X data sheet: 192 GB, 1,307 TFLOP/s, 2,615 in float8, 163.4 in float32, 5.3 TB/s; seven
    # Infinity Fabric links of 128 GB/s both ways.
    "mi300x": GPU(int(192 * GB), 1307.4e12, 2614.9e12, 163.4e12, 5.3 * TB, 448 * GB, 50 * GB),
}


def gpu_named(name: str, ranks_per_node: int) -> GPU:
    """Returns one of `GPUS`, or for "cpu" one rank's part of this machine, measured. Raises ValueError for other names.

    ranks_per_node: number of ranks that share this machine; ignored for GPUs.
    """
    if name == "cpu":
        return _this_cpu(ranks_per_node)
    if name not in GPUS:
        raise ValueError(f"--gpu {name} is not known; choose from {', '.join([*GPUS, 'cpu'])}.")
    return GPUS[name]


def _this_cpu(ranks: int) -> GPU:
    """Memory and rates of each of `ranks` processes that share this machine."""
    cpu = torch.device("cpu")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = os.cpu_count() or 1
    part = max(1.0, cores / torch.get_num_threads()) / ranks  # relative to this process with its number of threads
    float32, bfloat16 = ((peak_flops(cpu, dtype) or 0.0) * part for dtype in (torch.float32, torch.bfloat16))
    seconds, rate, reduced_rate = _gloo()
    wait = max(1.0, ranks / cores)  # ranks that take turns on a core
    return GPU(
        memory_bytes=memory // ranks,
        bfloat16=bfloat16,
        float8=bfloat16,
        float32=float32,
        memory_rate=_copy_rate() / ranks,
        link=rate / ranks,
        network=rate / ranks,
        reduced_rate=reduced_rate,
        seconds_to_start=wait * _seconds_of_operation(),
        seconds_of_message=wait * seconds,
        overlaps=False,
        device_type=cpu.type,
    )


def _copy_rate() -> float:
    """Bytes/s read and written by a copy of a large tensor."""
    source = torch.ones(2**24)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), 5)


def _seconds_of_operation() -> float:
    """Seconds of an operation on a few numbers, with its share of autograd's work."""
    x = torch.ones(16, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(50):
            y = y * x
        y.sum().backward()

    return _least_seconds(chain, 10) / 200  # 50 products; the backward of each is two products and a sum


def _gloo() -> tuple[float, float, float]:
    """Seconds of a small message between two ranks; bytes/s of large ones, of both ranks together; `GPU.reduced_rate`.

    The ranks are threads, but gloo sends their messages through sockets as it does between processes. It adds while it
    reduces and copies while it gathers, so the two rates differ.
    """
    store, large = dist.HashStore(), 2**19

    def join(rank: int) -> dist.ProcessGroup:
        return dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))  # type: ignore[return-value]

    with ThreadPoolExecutor(2) as threads:
        groups = list(threads.map(join, range(2)))

        def least(send: Callable[[dist.ProcessGroup, Tensor, Tensor], dist.Work], numbers: int, repeats: int) -> float:
            def of_rank(rank: int) -> float:
                part, whole = torch.ones(numbers), torch.zeros(2 * numbers)
                return _least_seconds(lambda: send(groups[rank], part, whole).wait(), repeats)

            return max(threads.map(of_rank, range(2)))

        small = least(lambda group, part, whole: group.allreduce([part]), 16, 50)
        gathering = least(lambda group, part, whole: group._allgather_base(whole, part), large, 30)
        reducing = least(lambda group, part, whole: group.allreduce([whole]), large, 30)
    # Of two ranks, each sends half of the result of an all-gather, and as many bytes as the result of an all-reduce.
    return small, 2 * 4 * large / gathering, 2 * gathering / reducing


def _least_seconds(run: Callable[[], object], repeats: int) -> float:
    least = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - begin)
    return least
