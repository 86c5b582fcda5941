"""GPUs by name: memory and rates, from their makers' data sheets; and this CPU, measured."""

import time
from dataclasses import dataclass

import torch

from torchlmoe.training.peak import peak_flops

GB, TB = 1e9, 1e12
GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """memory_bytes: that a program can use. Rates of dense matrix products in FLOP/s, of its memory and of its links in
    bytes/s, one way: `link` to the others of a node, `network` its part of a node's connection to other nodes.
    """

    memory_bytes: int
    bfloat16: float
    float8: float
    float32: float
    memory_rate: float
    link: float
    network: float

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of matrix products in `dtype`."""
        if dtype.itemsize == 1:
            return self.float8
        return self.bfloat16 if dtype.itemsize == 2 else self.float32


# float32 is full precision, torch's default, not TF32. Network: one 400 Gbit/s port for each GPU (ConnectX-7, 50 GB/s;
# 200 Gbit/s for A100), as in the makers' reference systems of eight.
GPUS = {
    # NVIDIA A100 80GB SXM data sheet: 80 GB, 312 TFLOP/s, 19.5 in float32, 2,039 GB/s; NVLink 600 GB/s both ways.
    # No float8: as bfloat16.
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
    """One of `GPUS`, or for "cpu" a rank's part of this machine, measured. Raises ValueError for another name."""
    if name == "cpu":
        return _this_cpu(ranks_per_node)
    if name not in GPUS:
        raise ValueError(f"--gpu {name} is not known; choose from {', '.join([*GPUS, 'cpu'])}.")
    return GPUS[name]


def _this_cpu(ranks: int) -> GPU:
    """What each of `ranks` processes has that share this machine. Messages are copied, in and out of a socket."""
    cpu, pages = torch.device("cpu"), 0
    with open("/proc/meminfo") as file:
        pages = next(int(line.split()[1]) for line in file if line.startswith("MemTotal")) * 1024
    float32, bfloat16 = (peak_flops(cpu, dtype) or 0.0 for dtype in (torch.float32, torch.bfloat16))
    memory_rate = _copy_rate()
    return GPU(
        pages // ranks,
        bfloat16 / ranks,
        bfloat16 / ranks,
        float32 / ranks,
        memory_rate / ranks,
        memory_rate / 4 / ranks,
        memory_rate / 4 / ranks,
    )


def _copy_rate() -> float:
    """Bytes/s that are read and written where a large tensor is copied."""
    source = torch.ones(2**24)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best
