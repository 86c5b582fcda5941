"""Makes a plan: memory, communication and step time of a layout, from a trace of one rank per pipeline place."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torchlmoe.config.batch import batch_sizes, check_degrees, ranks_of_rows
from torchlmoe.config.settings import Config
from torchlmoe.model.decoder import count_parameters
from torchlmoe.parallel.parallelize import whole_model
from torchlmoe.planning.communication import Message
from torchlmoe.planning.gpus import GPU
from torchlmoe.planning.rank import Part, RankTrace, trace_rank
from torchlmoe.planning.roofline import Machine
from torchlmoe.planning.schedule import makespan

# Fraction of a GPU's memory that a plan may use. The rest is for its context, NCCL's buffers and fragmentation.
USABLE_FRACTION = 0.9


@dataclass(frozen=True)
class Layout:
    """Degrees by mesh axis: pp, dp_replicate, dp_shard, cp, tp, and ep, whose ranks are borrowed from the others."""

    degrees: Mapping[str, int]

    @classmethod
    def of(cls, config: Config, world_size: int) -> "Layout":
        """The layout that the settings describe. Raises ConfigError for degrees that do not fit the number of ranks."""
        check_degrees(config, world_size)
        parallelism = config.parallelism
        others = {
            "pp": parallelism.pipeline_parallel_degree,
            "dp_replicate": parallelism.data_parallel_replicate_degree,
            "cp": parallelism.context_parallel_degree,
            "tp": parallelism.tensor_parallel_degree,
        }
        shard = world_size // prod(others.values())
        degrees = {"pp": others["pp"], "dp_replicate": others["dp_replicate"], "dp_shard": shard}
        return cls({**degrees, "cp": others["cp"], "tp": others["tp"], "ep": parallelism.expert_parallel_degree})

    def __str__(self) -> str:
        return " ".join(f"{axis} {degree}" for axis, degree in self.degrees.items())

    @property
    def strides(self) -> dict[str, int]:
        """By axis, the difference between the ranks of two neighbors. A joined axis has that of its last member."""
        sizes = self.degrees
        strides = {"tp": 1, "cp_tp": 1, "ep": 1, "world": 1, "efsdp": sizes["ep"], "cp": sizes["tp"]}
        strides["dp_shard_cp"] = sizes["tp"]
        strides["dp_shard"] = sizes["tp"] * sizes["cp"]
        strides["dp_replicate"] = strides["dp_shard"] * sizes["dp_shard"]
        strides["pp"] = strides["dp_replicate"] * sizes["dp_replicate"]
        return strides

    def rank_of_stage(self, stage: int) -> int:
        """The rank that is traced for a stage: the last span of the first data rank, which attends to the most keys."""
        return stage * self.strides["pp"] + (self.degrees["cp"] - 1) * self.degrees["tp"]


@dataclass(frozen=True)
class Plan:
    """The figures that `report` prints.

    flops_per_rank: FLOPs of a step, including recompute, of the rank that computes most.
    mfu: model FLOPs, without recompute, as a fraction of the devices' peak. bubble_fraction: time in which ranks wait.
    fits: whether every rank's peak is at most `USABLE_FRACTION` of its memory; reason: why, in one sentence.
    traces: of one rank per place along pp.
    """

    world_size: int
    layout: Layout
    gpu: str
    parameters: int
    active_parameters: int
    flops_per_rank: int
    tokens_per_step: int
    seconds_per_step: float
    mfu: float
    bubble_fraction: float
    fits: bool
    reason: str
    traces: list[RankTrace]

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the rank that needs most."""
        return max(trace.peak_bytes for trace in self.traces)

    def communication(self) -> list[tuple[str, str, int, int]]:
        """Axis, collective, count and bytes per step, of the rank that sends most of them; sorted by name."""
        largest: dict[tuple[str, str], tuple[int, int]] = {}
        for trace in self.traces:
            of_rank: dict[tuple[str, str], tuple[int, int]] = {}
            for message, count in trace.total_messages().items():
                key = (message.axis, message.collective)
                before = of_rank.get(key, (0, 0))
                of_rank[key] = (before[0] + count, before[1] + count * message.num_bytes)
            for key, figures in of_rank.items():
                largest[key] = max(largest.get(key, (0, 0)), figures, key=lambda pair: pair[1])
        return [(*key, *figures) for key, figures in sorted(largest.items())]


def make_plan(config: Config, vocab_size: int, world_size: int, gpu: GPU, gpu_name: str, ranks_per_node: int) -> Plan:
    """Plans a layout of `world_size` ranks. Raises ValueError if model, batch and degrees do not fit together."""
    layout = Layout.of(config, world_size)
    whole = whole_model(config, vocab_size, world_size)
    traces = [
        trace_rank(config, vocab_size, layout.rank_of_stage(stage), world_size, on_gpu=gpu.device_type != "cpu")
        for stage in range(layout.degrees["pp"])
    ]
    machine = Machine(gpu, ranks_per_node, layout.strides)
    seconds, bubble = _step_seconds(traces, machine)
    _, rows = batch_sizes(config.training, world_size // ranks_of_rows(config))
    tokens = rows * config.training.seq_len
    model_flops = 3 * whole.flops_per_token(config.training.seq_len) * tokens  # backward costs two forwards
    rate = gpu.matmul_rate(config.training.dtype_on(gpu.device_type))
    peak, room = max(trace.peak_bytes for trace in traces), USABLE_FRACTION * gpu.memory_bytes
    fits = peak <= room
    return Plan(
        world_size=world_size,
        layout=layout,
        gpu=gpu_name,
        parameters=count_parameters(whole),
        active_parameters=count_parameters(whole, active=True),
        flops_per_rank=max(trace.flops() for trace in traces),
        tokens_per_step=tokens,
        seconds_per_step=seconds,
        mfu=model_flops / (seconds * rate * world_size),
        bubble_fraction=bubble,
        fits=fits,
        reason=f"the peak of {peak / 2**30:.2f} GiB is {'within' if fits else 'more than'} {room / 2**30:.2f} GiB, "
        f"{USABLE_FRACTION:.0%} of the memory of {gpu_name}",
        traces=traces,
    )


def _step_seconds(traces: list[RankTrace], machine: Machine) -> tuple[float, float]:
    """Seconds of a step, and the fraction of the pipeline's time in which ranks wait."""
    once = [_once_seconds(trace, machine) for trace in traces]
    if len(traces) == 1:
        trace = traces[0]
        return once[0] + sum(
            _part_seconds(trace, part, machine) * trace.weight(part)
            for part in trace.parts()
            if part.kind in ("forward", "backward")
        ), 0.0
    of_stage = {
        (part.kind, part.stage): _part_seconds(trace, part, machine)
        for trace in traces
        for part in trace.parts()
        if part.kind in ("forward", "backward") and part.microbatch == trace.typical(part.kind)
    }
    sends = [message for trace in traces for message in trace.total_messages() if message.collective == "send"]
    transfer = max((machine.seconds_to_send(message) for message in sends if message.axis == "pp"), default=0.0)
    assert traces[0].order is not None
    end, bubble = makespan(traces[0].order, lambda kind, stage: of_stage[kind, stage], transfer)
    if not machine.gpu.overlaps:
        end *= 1 - bubble  # ranks share cores: while one waits, others use its part
    # FSDP gathers before the first microbatch and reduces after the last, and no typical microbatch overlaps with it.
    return end + max(once), bubble


def _once_seconds(trace: RankTrace, machine: Machine) -> float:
    """Seconds of what happens once per step: the update, sums of gradients and, in a pipeline, FSDP's messages."""
    seconds = 0.0
    for part in trace.parts():
        messages = trace.messages.get(part, Counter[Message]())
        if part.kind in ("step", "update"):
            seconds += machine.computing(trace.tasks.get(part, Counter()))
            seconds += machine.sending(messages, fsdp=False) + machine.sending(messages, fsdp=True)
        elif trace.order is not None and part.microbatch != trace.typical(part.kind):
            computing = machine.computing(trace.tasks.get(part, Counter()))
            seconds += machine.beside(computing, messages)
    return seconds


def _part_seconds(trace: RankTrace, part: Part, machine: Machine) -> float:
    messages = trace.messages.get(part, Counter[Message]())
    computing = machine.computing(trace.tasks.get(part, Counter()))
    return computing + machine.beside(computing, messages) + machine.sending(messages, fsdp=False)
