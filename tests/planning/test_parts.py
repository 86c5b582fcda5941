"""The planner's parts alone: bubbles, the roofline, sizes without values, estimates, and this CPU's rates."""

from collections import Counter
from dataclasses import astuple, replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B

from torchlmoe.config.load import load_config
from torchlmoe.ops.fake_values import equal_documents, has_values
from torchlmoe.parallel.parallelize import whole_model
from torchlmoe.planning.communication import Message
from torchlmoe.planning.estimate import Sizes, estimate
from torchlmoe.planning.gpus import GPU, GPUS, gpu_named
from torchlmoe.planning.layout import make_plan
from torchlmoe.planning.rank import trace_rank
from torchlmoe.planning.roofline import LINK_FRACTION, MEMORY_FRACTION, OTHER_FRACTION, PRODUCT_FRACTION, Machine
from torchlmoe.planning.schedule import makespan
from torchlmoe.planning.search import search
from torchlmoe.planning.work import Task
from torchlmoe.routing.exchange import Exchange

SMALL = """--model.layer_pattern LN --model.dim 32 --model.num_layers 2 --model.num_heads 2 --moe.num_experts 4
--moe.top_k 2 --moe.expert_dim 16 --model.vocab_size 64 --training.seq_len 32 --training.local_batch_size 2
--training.global_batch_size 16 --validation.enable false""".split()
# One operation a second, a number a second, and a byte: what a task takes can be counted on fingers.
SLOW = GPU(10**12, 1.0, 2.0, 0.5, 1.0, 1.0, 0.25, seconds_to_start=0.0, seconds_of_message=3.0)


def seconds(kind: str, stage: int) -> float:
    return 1.0 if kind == "forward" else 2.0


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 2), (2, 9), (4, 4), (4, 8), (8, 32)])
def test_the_bubble_of_1f1b(ranks, microbatches):
    """With equal stages it is (P - 1) / (P - 1 + M), whatever a backward takes (arXiv 2104.04473)."""
    order = Schedule1F1B._get_pipeline_order(SimpleNamespace(_num_stages=ranks, _n_microbatches=microbatches))  # type: ignore[arg-type]
    end, bubble = makespan(order, seconds, transfer=0.0)
    assert end == pytest.approx(3.0 * (microbatches + ranks - 1))
    assert bubble == pytest.approx((ranks - 1) / (ranks - 1 + microbatches))


@pytest.mark.parametrize(("ranks", "microbatches", "chunks"), [(2, 2, 2), (2, 8, 2), (4, 8, 2), (4, 8, 3), (8, 16, 2)])
def test_the_bubble_of_the_interleaved_schedule(ranks, microbatches, chunks):
    """V stages on each rank make it V times as short: (P - 1) / (P - 1 + M V) (arXiv 2104.04473)."""
    rounds = microbatches // ranks
    schedule = SimpleNamespace(
        pp_group_size=ranks,
        n_local_stages=chunks,
        _n_microbatches=microbatches,
        number_of_rounds=rounds,
        microbatches_per_round=microbatches // rounds,
    )
    order = {
        rank: ScheduleInterleaved1F1B._calculate_single_rank_operations(schedule, rank)  # type: ignore[arg-type]
        for rank in range(ranks)
    }
    end, bubble = makespan(order, seconds, transfer=0.0)
    assert end == pytest.approx(3.0 * (microbatches * chunks + ranks - 1))
    assert bubble == pytest.approx((ranks - 1) / (ranks - 1 + microbatches * chunks))


def test_a_slow_stage_and_transfers_lengthen_the_bubble():
    order = Schedule1F1B._get_pipeline_order(SimpleNamespace(_num_stages=2, _n_microbatches=2))  # type: ignore[arg-type]
    # Stage 1 works from 1 to 1 + 2 * 6; then the last backward of stage 0.
    assert makespan(order, lambda kind, stage: seconds(kind, stage) * (1 + stage), transfer=0.0)[0] == 1 + 2 * 6 + 2
    # Of two microbatches a forward and a backward are sent in a row; the rest travels while ranks work.
    assert makespan(order, seconds, transfer=0.5)[0] == pytest.approx(9.0 + 2 * 0.5)


@pytest.mark.parametrize(
    ("schedule", "tensors"),
    # The first stage gets a gradient. A rank with two stages gets two and an activation, and holds the three it sends.
    [("1F1B", 1), ("Interleaved1F1B", 6)],
)
def test_what_a_schedule_holds_grows_with_the_microbatches(schedule, tensors):
    """As on two gloo processes, where 12 microbatches more hold 442,752 and 2,408,832 bytes more."""
    flags = [*SMALL, "--model.layer_pattern", "LNLN", "--model.num_layers", "4", "--training.seq_len", "64"]
    flags += ["--model.dim", "64", "--parallelism.pipeline_parallel_degree", "2"]
    flags += ["--parallelism.pipeline_parallel_schedule", schedule]
    few, many = (
        trace_rank(load_config([*flags, "--training.global_batch_size", str(2 * number)]), 64, 0, 2, on_gpu=False)
        for number in (4, 16)
    )
    activation, batch = 2 * 64 * 64 * 4, 2 * 64 * 8 * 2 + 2 * 2 * 4
    for name in ("activation_bytes", "peak_bytes"):
        # The batch is there as the loader gives it, and as one tensor that the schedule splits.
        more, expected = getattr(many, name) - getattr(few, name), 12 * (tensors * activation + 2 * batch)
        assert abs(more - expected) <= (activation if tensors > 1 else 0)  # the peak may be a message earlier or later


def test_the_roofline_takes_the_slower_of_computing_and_moving():
    machine = Machine(SLOW, ranks_per_node=4, strides={"tp": 1, "dp_shard": 2})
    bfloat16, float32 = torch.bfloat16, torch.float32
    assert machine.seconds_of(Task(70, 8, bfloat16, True)) == pytest.approx(70 / PRODUCT_FRACTION)
    assert machine.seconds_of(Task(70, 8, float32, True)) == pytest.approx(140 / PRODUCT_FRACTION)
    assert machine.seconds_of(Task(70, 8, torch.float8_e4m3fn, True)) == pytest.approx(35 / PRODUCT_FRACTION)
    assert machine.seconds_of(Task(70, 8, bfloat16, False)) == pytest.approx(70 / OTHER_FRACTION)
    assert machine.seconds_of(Task(8, 800, bfloat16, True)) == pytest.approx(800 / MEMORY_FRACTION)
    machine = replace(machine, gpu=replace(SLOW, seconds_to_start=1e4))
    assert machine.seconds_of(Task(70, 8, bfloat16, True)) == 1e4


def test_messages_travel_at_the_rate_of_their_link():
    machine = Machine(SLOW, ranks_per_node=4, strides={"tp": 1, "dp_shard": 2})
    of = machine.seconds_to_send
    assert of(Message("tp", "all_gather", 4, 80)) == pytest.approx(3 + 60 / LINK_FRACTION)
    assert of(Message("tp", "all_reduce", 4, 80)) == pytest.approx(3 + 120 / LINK_FRACTION)
    assert of(Message("tp", "send", 2, 80)) == pytest.approx(3 + 80 / LINK_FRACTION)
    # Four ranks, each two from the next, are on two nodes.
    assert of(Message("dp_shard", "all_gather", 2, 80)) == pytest.approx(3 + 40 / LINK_FRACTION)
    assert of(Message("dp_shard", "all_gather", 4, 80)) == pytest.approx(3 + 60 / LINK_FRACTION * 4)


def test_messages_of_fsdp_run_beside_the_computation_of_a_gpu():
    machine = Machine(SLOW, ranks_per_node=4, strides={"dp_shard": 1})
    messages = Counter({Message("dp_shard", "all_gather", 2, 80): 1, Message("tp", "all_gather", 2, 80): 5})
    sending = 3 + 40 / LINK_FRACTION
    assert machine.beside(10.0, messages) == pytest.approx(sending - 10.0)
    assert machine.beside(1000.0, messages) == 0.0
    assert replace(machine, gpu=replace(SLOW, overlaps=False)).beside(1000.0, messages) == pytest.approx(sending)


def test_sizes_without_values_are_an_even_split():
    bounds = torch.tensor([0, 3, 10], dtype=torch.int32)
    assert has_values(bounds)
    with FakeTensorMode():
        bounds = torch.zeros(4, dtype=torch.int32)
        assert not has_values(bounds)
        assert equal_documents(10, bounds) == [0, 3, 6, 10]
    for rank in range(3):
        mesh = SimpleNamespace(size=lambda: 3, get_local_rank=lambda rank=rank: rank)
        # What a rank gets from each of the others is what each of them sends to it.
        assert Exchange(mesh, 6)._even(8) == ([3, 3, 2], [[3, 3, 2][rank]] * 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpu", "degrees"),
    [
        ("h100", {"pipeline": 2}),
        ("h100", {"context": 2, "expert": 4}),
        ("slow", {}),
        ("slow", {"tensor": 2, "expert": 2}),
    ],
)
def test_an_estimate_is_less_than_what_a_trace_finds(gpu, degrees):
    """Or a search could leave out the fastest layout."""
    flags = [text for axis, d in degrees.items() for text in (f"--parallelism.{axis}_parallel_degree", str(d))]
    config, gpu = (
        load_config([*SMALL, *flags]),
        {"h100": GPUS["h100"], "slow": replace(SLOW, seconds_of_message=0.0)}[gpu],
    )
    sizes = Sizes.of(whole_model(config, 64, 4), config.training.seq_len)
    guess, plan = estimate(config, sizes, 4, gpu, 8), make_plan(config, 64, 4, gpu, "h100", 8)
    assert 0.05 * plan.seconds_per_step < guess.seconds < plan.seconds_per_step
    assert guess.peak_bytes < plan.peak_bytes


def test_fsdp_sends_each_parameter_twice_and_its_gradient_once():
    """In each of two microbatches, in float32. A trace of real ranks counts bytes by the same code."""
    plan = make_plan(load_config(SMALL), 64, 4, GPUS["h100"], "h100", 8)
    sent = {collective: num_bytes for axis, collective, _, num_bytes in plan.communication() if axis == "dp_shard"}
    assert sent["all_gather"] == pytest.approx(2 * 2 * 4 * plan.parameters, rel=0.01)  # and what pads vectors
    assert sent["reduce_scatter"] == pytest.approx(2 * 4 * plan.parameters, rel=0.01)


def test_a_search_traces_the_best_estimates_first():
    config, gpu = load_config(SMALL), GPUS["h100"]
    told: list = []
    plans, legal = search(config, 64, 4, gpu, "h100", 8, told.append, num_traced=3)
    assert len(told) == len(plans) == 3 < legal
    assert [plan.seconds_per_step for plan in plans] == sorted(plan.seconds_per_step for plan in told)
    with pytest.raises(ValueError, match=r"--world-size 4 is too few: .* choose more ranks\."):
        search(config, 64, 4, replace(gpu, memory_bytes=1000), "h100", 8, told.append)


def test_this_cpu_is_measured():
    part = gpu_named("cpu", 4)
    assert all(value > 0 for value in astuple(part) if isinstance(value, (int, float)) and not isinstance(value, bool))
    assert (part.overlaps, part.device_type) == (False, "cpu")
    assert part.seconds_to_start < 1e-2
    assert 1e6 < part.link < 1e12
