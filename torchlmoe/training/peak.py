"""Knows the peak rate of a device's matrix products, the base of model FLOPs utilization (MFU)."""

import time
from functools import cache

import torch

from torchlmoe.layers.linear import linear

# Dense bfloat16 tensor-core peaks from the vendors' data sheets, TFLOP/s; float32 runs on the same units as TF32.
_BFLOAT16_TFLOPS = {
    "B300": 2250.0,
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "MI325X": 1307.4,
    "MI300X": 1307.4,
    "MI250X": 191.5,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of matrix products in `dtype`: from data sheets for known GPUs, measured on a CPU; None if unknown."""
    if device.type == "cpu":
        return _measured_on_cpu(dtype)
    if dtype is not torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * tflops for part, tflops in _BFLOAT16_TFLOPS.items() if part in name), None)


@cache
def _measured_on_cpu(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of at least ten products of 1024 x 1024 matrices. Takes about 0.2 s.

    The first product is not timed, since it starts threads and allocates pages. A single product on a busy machine
    could give a peak that is many times too low.
    """
    size = 1024
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    linear(a, b)
    seconds: list[float] = []
    while len(seconds) < 10 or sum(seconds) < 0.2:
        begin = time.perf_counter()
        linear(a, b)
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)
