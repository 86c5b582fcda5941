"""Training throughput of A0.3B-2B with every instance: python -m benchmarks.throughput [--output FILE]

The table is that of training efficiency in the Linear-MoE paper (arXiv 2503.05447): peak memory and tokens/s of
forward, backward and AdamW on random tokens, 16K per GPU in rows of 2K, 4K, 8K and 16K. On several GPUs,
`torchrun --nproc-per-node N -m benchmarks.throughput` shards the model over all of them. "of matmul rate" is the rate
of the model's FLOPs, recurrences included, divided by the measured rate of matrix products.
"""

import gc
import os
import statistics
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.report import arguments, attempt, matmul_rate, seconds_of, show
from benchmarks.training import steps_of
from torchlmoe.config.load import load_config
from torchlmoe.mixers import MIXERS
from torchlmoe.model.decoder import build_on_meta
from torchlmoe.parallel.mesh import choose_device, world_size_of_launch
from torchlmoe.training.metrics import memory_gib

INSTANCES = "attention bla retention gla hgrn2 mamba2 rwkv6 deltanet gated_deltanet kda rwkv7 mamba".split()
LENGTHS = (2048, 4096, 8192, 16384)


def rows_of(
    instance: str, settings: list[str], lengths: list[int], tokens: int, repeats: int, failures: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each of `lengths`, as soon as it is measured. tokens: tokens per step and GPU."""
    config = load_config([*settings, "--model.mixer", instance])
    vocab_size, device = config.model.vocab_size or 4096, choose_device("auto")
    whole = build_on_meta(config, vocab_size)
    rate = matmul_rate(getattr(torch, config.training.dtype), device.type, 8192 if device.type == "cuda" else 512)
    step_of = steps_of(config, vocab_size)
    warmups = 3 if device.type == "cuda" else 1
    for length in lengths:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        notes: list[str] = []
        step = step_of(tokens // length, length)
        times = attempt(notes, lambda step=step: [seconds_of(step, device.type) for _ in range(repeats + warmups)])
        speed = times and tokens / statistics.median(times[warmups:])
        failures += [f"{instance}, {length} x {tokens // length}: {note}" for note in notes]
        yield {
            "instance": instance,
            "pattern": config.model.layer_pattern,
            "rows": f"{length} x {tokens // length}",
            "peak GiB": times and memory_gib(device),
            "tokens/s": speed and round(speed * world_size_of_launch()),
            "FLOP/s": speed and 3 * speed * whole.flops_per_token(length),
            "of matmul rate": speed and 3 * speed * whole.flops_per_token(length) / rate,
        }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--instances", nargs="+", choices=MIXERS, default=INSTANCES)
    parser.add_argument("--flavor", default="a0.3b_2b", help="sizes of the model")
    parser.add_argument("--pattern", default="L", help="layer pattern; LLLN is the paper's hybrid")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="selective")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens per step and GPU")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps for each length")
    options = parser.parse_args()
    torch.manual_seed(0)
    settings = ["--model.flavor", options.flavor, "--model.layer_pattern", options.pattern]
    settings += ["--training.dtype", "bfloat16", "--activation_checkpoint.mode", options.recompute]
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for instance in options.instances:
        rows += rows_of(instance, settings, options.lengths, options.tokens, options.repeats, failures)
        gc.collect()  # free the model before the next one is built
    if os.environ.get("RANK", "0") == "0":
        devices = f"{world_size_of_launch()} x {choose_device('auto').type}"
        title = f"Training of {options.flavor}, bfloat16, recompute {options.recompute}, on {devices}"
        show(title, rows, options.output, failures=failures)
        print("\n".join(["", *failures]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
