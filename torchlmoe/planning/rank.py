"""Traces one rank's step without a device, by running its code: memory, computation and communication."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchlmoe.config.batch import batch_sizes, num_stages
from torchlmoe.config.settings import Config
from torchlmoe.model.decoder import Decoder
from torchlmoe.parallel.parallelize import ready, shape
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.planning.communication import Message
from torchlmoe.planning.memory import local_parts
from torchlmoe.planning.trace import Trace
from torchlmoe.planning.work import Task
from torchlmoe.planning.world import as_on_gpu, fake_rank
from torchlmoe.training.optimizer import build_optimizer, clip_gradients
from torchlmoe.training.pipeline_step import PipelineStep
from torchlmoe.training.step import Step, build_step

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Part:
    """A part of a step.

    kind: "forward" or "backward" of one microbatch through one stage; "update" of all parameters; or "step", for
    operations between these.
    """

    kind: str
    stage: int = 0
    microbatch: int = 0


@dataclass
class RankTrace:
    """Memory of a rank, in bytes, and its work in a step.

    activation_bytes: peak of all memory except parameters, buffers, gradients and optimizer state. It includes tensors
        saved for the backward, temporary tensors, gathered parameters and buffers of collectives.
    peak_bytes: peak of all memory.
    microbatches: number in a step; `traced` of them were traced. tasks, messages: by part of the step, of the traced
        microbatches; the others are counted like the typical one (see `weight`).
    order: with a pipeline, the actions of the schedule by rank.
    """

    stage: int
    parameter_bytes: int = 0
    buffer_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    activation_bytes: int = 0
    peak_bytes: int = 0
    microbatches: int = 1
    traced: int = 1
    tasks: dict[Part, Counter[Task]] = field(default_factory=dict)
    messages: dict[Part, Counter[Message]] = field(default_factory=dict)
    order: Mapping[int, Sequence[Any]] | None = None

    def parts(self) -> list[Part]:
        """The parts in which something is computed or sent."""
        return [*dict.fromkeys((*self.tasks, *self.messages))]

    def typical(self, kind: str) -> int:
        """A microbatch that is neither the first, which gathers parameters, nor the last, which reduces gradients."""
        return self.traced - 1 if kind == "forward" else max(0, self.traced - 2)

    def weight(self, part: Part) -> int:
        """How many parts of the whole step a traced part stands for."""
        if part.kind in ("forward", "backward"):
            rest = self.microbatches - self.traced
            return 1 + rest * (part.microbatch == self.typical(part.kind))
        return 1

    def total_messages(self) -> Counter[Message]:
        """Number of messages of the whole step."""
        total = _total(self.messages, self.weight)
        for message in total:
            if message.axis == "pp" and message.collective == "send":  # counted under "step": one per microbatch
                total[message] = total[message] * self.microbatches // self.traced
        return total

    def flops(self) -> int:
        """FLOPs of the whole step in products, recurrences and attention, including recompute."""
        return sum(task.flops * count for task, count in _total(self.tasks, self.weight).items())


def trace_rank(config: Config, vocab_size: int, rank: int, world_size: int, *, on_gpu: bool = True) -> RankTrace:
    """Traces one rank of `world_size`. Raises the errors of `shape`.

    on_gpu: trace what a GPU would do, not a CPU. Each row is one document, experts have equal loads, and blocks are not
    compiled.
    """
    config = replace(config, compile=replace(config.compile, enable=False))
    with fake_rank(rank, world_size) as fake, as_on_gpu() if on_gpu else nullcontext():
        ranks = Ranks(config.parallelism, CPU.type)
        model = shape(config, vocab_size, ranks, CPU)
        with fake:
            model.to_empty(device=CPU)
            ready(model, config, ranks)
            rows, whole = batch_sizes(config.training, ranks.num_row_places)
            microbatches = whole // (rows * ranks.num_row_places)
            step, order, traced, held = build_step(model, config, ranks, CPU), None, min(microbatches, 2), 0
            if isinstance(step, PipelineStep):
                order = step.schedule.pipeline_order
                config, traced = _shortened(config, ranks, microbatches)
                held = _held_by_schedule(step, config, microbatches, traced)
                step = build_step(model, config, ranks, CPU)
            batches = [example_batch(rows, config.training.seq_len) for _ in range(traced)]
            trace = trace_step(model, step, config, batches, ranks)
    rest = (microbatches - traced) * size_of(batches[0].values())
    trace.activation_bytes += held + rest
    trace.peak_bytes += held + rest
    trace.microbatches, trace.traced, trace.order = microbatches, traced, order
    return trace


def example_batch(rows: int, length: int) -> dict[str, Tensor]:
    """A microbatch whose rows are one document each: tokens and labels int64 [rows, length], bounds int32 [rows, 2]."""
    return {
        "tokens": torch.zeros(rows, length, dtype=torch.int64),
        "labels": torch.zeros(rows, length, dtype=torch.int64),
        "document_bounds": torch.tensor([[0, length]], dtype=torch.int32).repeat(rows, 1),
    }


def trace_step(
    model: Decoder, step: Step, config: Config, batches: Sequence[dict[str, Tensor]], ranks: Ranks
) -> RankTrace:
    """Traces one step on `batches`, fake or real tensors: forward, backward, clipping and the optimizer's update."""
    trace, rank = Trace(ranks), RankTrace(ranks["pp"].get_local_rank())
    memory = trace.memory
    optimizer = build_optimizer(model, config.optimizer)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    kept = memory.numbers([*parameters, *buffers])
    memory.numbers(tensor for batch in batches for tensor in batch.values())
    with trace.watching(), _in_parts(trace, model, step):
        trace.phase = Part("step")
        step.forward_backward(batches, torch.ones(()))
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        kept = kept | memory.numbers(gradients)
        rank.activation_bytes, peak = memory.peak(without=kept), memory.peak()
        trace.phase = Part("update")
        clip_gradients(model, config.training.max_norm, step.counted_elsewhere)
        optimizer.step()
    state = [x for of_one in optimizer.state.values() for x in of_one.values() if isinstance(x, Tensor)]
    rank.parameter_bytes, rank.buffer_bytes = size_of(parameters), size_of(buffers)
    rank.gradient_bytes, rank.optimizer_bytes = size_of(gradients), size_of(state)
    # From the second step on, the optimizer's state exists during the forward and backward.
    rank.peak_bytes = max(peak + rank.optimizer_bytes, memory.peak())
    rank.tasks, rank.messages = trace.work.tasks, trace.communication.messages  # type: ignore[assignment]
    return rank


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's parts of the tensors."""
    return sum(part.numel() * part.element_size() for tensor in tensors for part in local_parts(tensor))


def _shortened(config: Config, ranks: Ranks, microbatches: int) -> tuple[Config, int]:
    """Settings of a step with just enough microbatches to fill the pipeline, and their number.

    This is the number of stages plus one: then the first stage holds gradients together with its most activations.
    """
    of_round = 1
    if config.parallelism.pipeline_parallel_schedule == "Interleaved1F1B":
        of_round = microbatches // (microbatches // ranks["pp"].size())
    number = min(microbatches, -(-(num_stages(config) + 1) // of_round) * of_round)
    rows, _ = batch_sizes(config.training, ranks.num_row_places)
    training = replace(config.training, local_batch_size=rows, global_batch_size=number * rows * ranks.num_row_places)
    return replace(config, training=training), number


def _held_by_schedule(step: PipelineStep, config: Config, microbatches: int, traced: int) -> int:
    """Bytes that torch's schedules hold for the microbatches of a step and that a trace of `traced` of them misses.

    A stage has a receive buffer per tensor and microbatch. An interleaved schedule waits for its sends at the end of
    the step; until then real messages hold their tensors, but those of a fake group do not.
    """
    rows, _ = batch_sizes(config.training, step.ranks.num_row_places)
    exchanged = 0
    for stage in step.stages:
        inputs, outputs = stage.examples(rows * config.training.seq_len, config.training.dtype_on(CPU.type))
        is_first, is_last = stage.place.index == 0, stage.place.index == step.num_stages - 1
        exchanged += (not is_first) * size_of(inputs) + (not is_last) * size_of(outputs)
    cat_of_batches = (microbatches - traced) * size_of(example_batch(rows, config.training.seq_len).values())
    return exchanged * (microbatches - traced + step.is_interleaved * microbatches) + cat_of_batches


@contextmanager
def _in_parts(trace: Trace, model: Decoder, step: Step) -> Iterator[None]:
    """Within the context, operations are counted under their part of the step."""
    if isinstance(step, PipelineStep):
        for stage in step.pipeline_stages:
            for kind in ("forward", "backward"):
                name = f"{kind}_one_chunk"
                setattr(stage, name, partial(_one_chunk, trace, kind, stage.stage_index, getattr(stage, name)))
        yield
        return
    number = 0

    def begin(*_: Any) -> None:
        trace.phase = Part("forward", 0, number)

    def end(*_: Any) -> None:
        nonlocal number
        trace.phase = Part("backward", 0, number)
        number += 1

    hooks = [model.register_forward_pre_hook(begin, prepend=True), model.register_forward_hook(end)]
    yield
    for hook in hooks:
        hook.remove()


def _one_chunk(
    trace: Trace, kind: str, stage: int, run: Callable[..., Any], microbatch: int, *args: Any, **options: Any
):
    trace.phase = Part(kind, stage, microbatch)
    try:
        return run(microbatch, *args, **options)
    finally:
        trace.phase = Part("step")


def _total(counted: Mapping[Part, Counter], weight: Callable[[Part], int]) -> Counter:
    total: Counter = Counter()
    for part, counter in counted.items():
        for entry, count in counter.items():
            total[entry] += count * weight(part)
    return total
