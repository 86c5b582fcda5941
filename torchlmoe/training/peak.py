"""The peak rate of a device's matrix products, against which model FLOPs utilisation (MFU) is counted."""

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
    """FLOP/s of matrix products in `dtype`: a data sheet's for a known GPU, measured on a CPU, None if not known."""
    if device.type == "cpu":
        return _measured_on_cpu(dtype)
    if dtype is not torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * tflops for known, tflops in _BFLOAT16_TFLOPS.items() if known in name), None)


@cache
def _measured_on_cpu(dtype: torch.dtype) -> float:
    """The best of ten or more products of 1024 x 1024 matrices, as the model computes them; a fifth of a second or so.

    The first product is not timed: it also pays for threads, kernels and pages that later ones find. Were it the only
    one in its time, as on a busy machine, the peak would be many times too low.
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
