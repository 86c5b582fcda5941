"""What the planner says of a layout, against the same step on real gloo processes."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from tests.conftest import run_on_ranks
from torchlmoe.config.load import load_config
from torchlmoe.parallel.mesh import start_process_group
from torchlmoe.parallel.parallelize import build_model
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.planning.memory import local_parts
from torchlmoe.planning.rank import CPU, RankTrace, example_batch, trace_rank, trace_step
from torchlmoe.training.step import build_step

VOCAB_SIZE = 256
SMALL = """--model.layer_pattern LN --model.dim 64 --model.num_layers 2 --model.num_heads 4 --moe.num_experts 8
--moe.top_k 2 --moe.expert_dim 32 --training.seq_len 64 --training.local_batch_size 2 --training.global_batch_size 8
--validation.enable false""".split()
SHIFTED = "--model.embedding_norm true --model.layers.N.mlp_token_shift true".split()
DEBUG = """--model.layer_pattern LLLN --model.dim 192 --model.num_layers 4 --model.num_heads 6 --moe.num_experts 16
--moe.top_k 2 --moe.expert_dim 128 --training.seq_len 128 --training.local_batch_size 2 --training.global_batch_size 32
--validation.enable false""".split()


def degrees(**given: int) -> list[str]:
    return [text for axis, degree in given.items() for text in (f"--parallelism.{axis}_parallel_degree", str(degree))]


def figures(trace: RankTrace) -> dict:
    """Bytes of a rank, and of its messages the number and bytes by axis and collective."""
    messages: Counter[str] = Counter()
    for message, count in trace.total_messages().items():
        messages[f"count {message.axis} {message.collective}"] += count
        messages[f"bytes {message.axis} {message.collective}"] += count * message.num_bytes
    kept = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes", "peak_bytes")
    return {"messages": dict(messages), **{name: getattr(trace, name) for name in kept}}


def measure(layouts: list[list[str]], folder: Path) -> None:
    """On a rank: a step in each layout, whose figures go to a file."""
    measured = []
    for flags in layouts:
        config = load_config(flags)
        start_process_group(CPU)
        _clear_sharding_prop_cache()  # equal meshes share its entries, which name the groups of the layout before
        ranks = Ranks(config.parallelism, CPU.type)
        model = build_model(config, VOCAB_SIZE, ranks, CPU)
        rows, length = config.training.local_batch_size, config.training.seq_len
        number = config.training.global_batch_size // (rows * ranks.num_row_places)
        generator = torch.Generator().manual_seed(ranks.row_index)
        batches = [
            example_batch(rows, length)
            | {key: torch.randint(VOCAB_SIZE, (rows, length), generator=generator) for key in ("tokens", "labels")}
            for _ in range(number)
        ]
        step = build_step(model, config, ranks, CPU)
        step.forward_backward(batches, torch.ones(()))  # in the first one, ranks of a pipeline vote
        model.zero_grad()
        trace = trace_step(model, step, config, batches, ranks)
        trace.microbatches = trace.traced = number
        measured.append(figures(trace) | {"tracked_bytes": tracked(model, step, batches)})
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(measured))


class Tracker(MemTracker):
    """Of all storages, not by module: it cannot follow a module through several microbatches."""

    def _ignore(self, *_) -> None: ...

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _ignore


def tracked(model, step, batches) -> int:
    """Peak of what torch's own tracker counts beside parameters, buffers and their gradients, in the same step."""
    tracker = Tracker()
    tracker.track_external(model)
    # They are there from the step before: without its modules, the tracker would not know them from activations.
    tracker.track_external(*[part for parameter in model.parameters() for part in local_parts(parameter.grad)])
    with tracker:
        step.forward_backward(batches, torch.ones(()))
    peak = {getattr(key, "value", key): value for key, value in tracker.get_tracker_snapshot("peak")[CPU].items()}
    return peak["Total"] - sum(peak[name] for name in ("Parameter", "Buffer", "Other"))


def compare(layouts: list[list[str]], world_size: int, stages: list[int], folder: Path) -> None:
    """stages: by layout, how many places along pp there are."""
    run_on_ranks(world_size, measure, layouts, folder)
    for index, (flags, number) in enumerate(zip(layouts, stages, strict=True)):
        for rank in range(0, world_size, world_size // number):
            measured = json.loads((folder / f"{rank}.json").read_text())[index]
            planned = figures(trace_rank(load_config(flags), VOCAB_SIZE, rank, world_size, on_gpu=False))
            for name in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"):
                assert planned[name] == measured[name], (flags, rank, name)
            assert planned["messages"].keys() == measured["messages"].keys(), (flags, rank)
            for name, value in measured["messages"].items():
                allowed = 0.05 if name.startswith("bytes") else 0.0
                assert planned["messages"][name] == pytest.approx(value, rel=allowed), (flags, rank, name)
            for name in ("activation_bytes", "tracked_bytes"):
                assert planned["activation_bytes"] == pytest.approx(measured[name], rel=0.15), (flags, rank, name)


def test_four_ranks(tmp_path):
    compare(
        [
            [*SMALL, *SHIFTED, *degrees(tensor=2, context=2)],
            [*SMALL, *SHIFTED, *degrees(pipeline=2, expert=2), "--training.global_batch_size", "16"],
        ],
        4,
        [1, 2],
        tmp_path,
    )


DEBUG_LAYOUTS = [
    DEBUG,
    [*DEBUG, *degrees(expert=2), "--parallelism.data_parallel_replicate_degree", "2"],
    [*DEBUG, *degrees(tensor=2, context=2, expert=4), "--activation_checkpoint.mode", "selective"],
    [*DEBUG, *degrees(context=2, tensor=2, pipeline=2, expert=2)],
    [*DEBUG, *degrees(pipeline=2), "--parallelism.pipeline_parallel_schedule", "Interleaved1F1B"],
]


@pytest.mark.long
def test_eight_ranks_of_the_debug_model(tmp_path):
    compare(DEBUG_LAYOUTS, 8, [1, 1, 1, 2, 2], tmp_path)
