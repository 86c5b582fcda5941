"""Planned peaks of memory, against torch's own tracker on the real step in one process."""

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from torchlmoe.config.load import load_config
from torchlmoe.parallel.mesh import start_process_group
from torchlmoe.parallel.parallelize import build_model
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.planning.rank import CPU, example_batch, trace_rank
from torchlmoe.training.optimizer import build_optimizer, clip_gradients
from torchlmoe.training.step import build_step

VOCAB_SIZE = 1024
SIZES = """--model.layer_pattern LN --model.dim 128 --model.num_layers 2 --model.num_heads 2 --moe.num_experts 8
--moe.top_k 2 --moe.expert_dim 64 --training.seq_len 256 --training.local_batch_size 2
--validation.enable false""".split()


@pytest.fixture
def process_group():
    start_process_group(CPU)
    yield
    torch.distributed.destroy_process_group()


def tracked(config) -> dict[str, int]:
    """The tracker's account of the moment at which most is allocated in the second step, by what it is for."""
    ranks = Ranks(config.parallelism, CPU.type)
    model = build_model(config, VOCAB_SIZE, ranks, CPU)
    step, optimizer = build_step(model, config, ranks, CPU), build_optimizer(model, config.optimizer)
    rows, length = config.training.local_batch_size, config.training.seq_len
    batch = example_batch(rows, length)
    batch |= {key: torch.randint(VOCAB_SIZE, (rows, length)) for key in ("tokens", "labels")}

    def run() -> None:
        step.forward_backward([batch], torch.ones(()))
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    run()
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        run()
    return {getattr(key, "value", key): value for key, value in tracker.get_tracker_snapshot("peak")[CPU].items()}


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--activation_checkpoint.mode", "selective"],
        ["--activation_checkpoint.mode", "full"],
    ],
    ids=["plain", "selective", "full"],
)
def test_peak_is_that_of_the_real_step(process_group, flags):
    config = load_config([*SIZES, *flags])
    real = tracked(config)
    torch.distributed.destroy_process_group()
    planned = trace_rank(config, VOCAB_SIZE, 0, 1, on_gpu=False)
    start_process_group(CPU)
    kept = sum(real[name] for name in ("Parameter", "Buffer", "Gradient", "Optstate"))
    assert planned.activation_bytes == pytest.approx(real["Total"] - kept, rel=0.15), real
    assert planned.peak_bytes == pytest.approx(real["Total"], rel=0.15), real
    assert (planned.parameter_bytes, planned.optimizer_bytes) == (real["Parameter"], real["Optstate"])


def test_recompute_lowers_the_peak():
    """And what it computes again counts."""
    none, full = (
        trace_rank(load_config([*SIZES, "--activation_checkpoint.mode", mode]), VOCAB_SIZE, 0, 1)
        for mode in ("none", "full")
    )
    assert full.activation_bytes < 0.6 * none.activation_bytes
    assert 1.2 * none.flops() < full.flops() < 1.34 * none.flops()
