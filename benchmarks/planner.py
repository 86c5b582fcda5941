"""Predicted and measured times of six layouts of the debug model on 8 gloo processes: python -m benchmarks.planner

The planner first measures the rates of this CPU. The processes share its cores, so a measured time is the lowest of
several steps. Times are written to benchmarks/results/planner.json.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from torchlmoe.config.load import load_config
from torchlmoe.parallel.mesh import start_process_group
from torchlmoe.parallel.parallelize import build_model
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.planning.gpus import gpu_named
from torchlmoe.planning.layout import make_plan
from torchlmoe.planning.rank import CPU, example_batch
from torchlmoe.training.optimizer import build_optimizer, clip_gradients
from torchlmoe.training.step import build_step

WORLD_SIZE, VOCAB_SIZE = 8, 4096
# Six heads, so that two ranks can share them.
MODEL = """--model.flavor debug --model.num_heads 6 --training.seq_len 256 --training.local_batch_size 2
--training.global_batch_size 16 --validation.enable false""".split()
LAYOUTS: dict[str, dict[str, int]] = {
    "FSDP": {},
    "replicas": {"data_parallel_replicate": 8},
    "experts": {"expert_parallel": 8},
    "pipeline": {"pipeline_parallel": 4},
    "spans": {"context_parallel": 4, "expert_parallel": 4},
    "heads, spans, stages": {
        "tensor_parallel": 2,
        "context_parallel": 2,
        "pipeline_parallel": 2,
        "expert_parallel": 4,
    },
}


def flags_of(name: str) -> list[str]:
    degrees = LAYOUTS[name].items()
    return [*MODEL, *(text for axis, degree in degrees for text in (f"--parallelism.{axis}_degree", str(degree)))]


def measure(rank: int, port: int, name: str, steps: int, file: str) -> None:
    """Measure the lowest time of a step on a rank, after a step that is not timed."""
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=WORLD_SIZE, MASTER_ADDR="localhost", MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in place.items()}, TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    config = load_config(flags_of(name))
    start_process_group(CPU)
    ranks = Ranks(config.parallelism, CPU.type)
    model = build_model(config, VOCAB_SIZE, ranks, CPU)
    step, optimizer = build_step(model, config, ranks, CPU), build_optimizer(model, config.optimizer)
    rows, length = config.training.local_batch_size, config.training.seq_len
    assert rows is not None
    assert config.training.global_batch_size is not None
    generator = torch.Generator().manual_seed(ranks.row_index)
    batches = [
        example_batch(rows, length)
        | {key: torch.randint(VOCAB_SIZE, (rows, length), generator=generator) for key in ("tokens", "labels")}
        for _ in range(config.training.global_batch_size // (rows * ranks.num_row_places))
    ]
    seconds = []
    for _ in range(1 + steps):
        dist.barrier()
        begin = time.perf_counter()
        step.forward_backward(batches, torch.tensor(float(rows * length)))
        clip_gradients(model, 1.0, step.counted_elsewhere)
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    if rank == 0:
        Path(file).write_text(json.dumps(min(seconds[1:])))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--steps", type=int, default=4, help="timed steps; default %(default)s")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "planner.json")
    flags = parser.parse_args()
    mp.set_forkserver_preload(["benchmarks.planner"])  # otherwise each process would import torch
    gpu = gpu_named("cpu", WORLD_SIZE)
    rows = []
    for name in LAYOUTS:
        plan = make_plan(load_config(flags_of(name)), VOCAB_SIZE, WORLD_SIZE, gpu, "cpu", WORLD_SIZE)
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/seconds"
            mp.start_processes(measure, (store.port, name, flags.steps, file), WORLD_SIZE, start_method="forkserver")
            measured = json.loads(Path(file).read_text())
        rows.append({"layout": str(plan.layout), "predicted": plan.seconds_per_step, "measured": measured})
        print(
            f"{name:<22}{plan.seconds_per_step:>9.3f} s predicted{measured:>9.3f} s measured  {plan.layout}", flush=True
        )
    by = {key: [row["layout"] for row in sorted(rows, key=lambda row: row[key])] for key in ("predicted", "measured")}
    agree = {"fastest": 0, "slowest": -1}
    result = {
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__, **vars(gpu)},
        "layouts": rows,
        "agree": {end: by["predicted"][index] == by["measured"][index] for end, index in agree.items()},
    }
    print(result["agree"])
    flags.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
