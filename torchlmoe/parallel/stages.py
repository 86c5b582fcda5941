"""Cuts a model into pipeline stages, by cost or by the settings, and defines the module that runs a stage.

The model is built whole on the meta device and then cut. So names, initial weights, checkpoints and figures do not
depend on the cut. With P ranks along `pp`, rank r has the stages r, r + P, r + 2 P and so on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from torchlmoe.config.batch import num_stages
from torchlmoe.config.settings import Config
from torchlmoe.model.batch import describe
from torchlmoe.model.decoder import Decoder


@dataclass(frozen=True)
class Place:
    """The place of a stage in the model.

    index: of the stage. blocks: indices of its blocks. takes_shared, gives_shared: whether the stage receives from the
    preceding stage, and sends to the next one, a tensor that layers share.
    """

    index: int
    blocks: range
    takes_shared: bool
    gives_shared: bool


class Stage(nn.Module):
    """Consecutive blocks of a decoder, with its embedding before the first and its head after the last.

    A stage takes the outputs of the preceding one: x [1, T, dim] and, if `takes_shared`, the tensor that layers share.
    The first stage takes neither. A stage returns the same for the next one; the last stage returns the loss of the
    microbatch. Every stage also takes the microbatch itself, for the layout of its documents.
    """

    def __init__(self, model: Decoder, place: Place):
        super().__init__()
        self.part, self.place = model.part(place.blocks), place

    def forward(
        self,
        *received: Tensor,
        tokens: Tensor,
        document_bounds: Tensor,
        labels: Tensor,
        loss_weight: float | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        part = self.part
        microbatch = describe(tokens, document_bounds, labels, loss_weight, part.span, tells_padding=self.training)
        x = part.embed(microbatch.tokens) if part.is_first else received[0]
        shared = received[1] if self.place.takes_shared else None
        x, shared = part.run_blocks(x, microbatch.sequence, shared=shared)
        if part.is_last:
            return part.run_head(x, microbatch.labels)
        if self.place.gives_shared:
            assert shared is not None
            return x, shared
        return x

    def examples(self, num_tokens: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The tensors that the stage takes, and those that it returns, on the meta device.

        num_tokens: of a microbatch. dtype: of activations.
        """
        part = self.part
        span = num_tokens // part.span.number
        x = torch.empty(1, span // part.span.pieces, part.spec.dim, dtype=dtype, device="meta", requires_grad=True)
        shared = torch.empty(1, span, part.shared_width, dtype=dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device="meta", requires_grad=True)
        inputs = () if part.is_first else (x, shared)[: 1 + self.place.takes_shared]
        return inputs, (loss,) if part.is_last else (x, shared)[: 1 + self.place.gives_shared]


@dataclass
class Pipeline:
    """The pipeline, seen from one rank.

    places: of the rank's stages, in order. names: for each rank along `pp`, the names of its parameters.
    elsewhere: names of parameters and persistent buffers that only other ranks have.
    stages: the modules that run this rank's stages; `make_stages` sets them.
    """

    places: list[Place]
    names: list[list[str]]
    elsewhere: frozenset[str]
    stages: list[Stage] = field(default_factory=list)


def cut(model: Decoder, bounds: Sequence[int], rank: int, num_ranks: int) -> Decoder:
    """Returns the part of a model for rank `rank` of `num_ranks` along `pp`. It has a `pipeline`.

    bounds: see `stage_bounds`.
    """
    sharing = [int(index) for index, block in model.blocks.items() if block.shared_width]

    def crosses(bound: int) -> bool:
        return bool(sharing) and sharing[0] < bound <= sharing[-1]

    places = [
        Place(index, range(first, end), crosses(first), crosses(end))
        for index, (first, end) in enumerate(pairwise(bounds))
    ]
    parts = [
        model.part(block for place in places[other::num_ranks] for block in place.blocks) for other in range(num_ranks)
    ]
    names = [[name for name, _ in part.named_parameters()] for part in parts]
    part = parts[rank]
    elsewhere = frozenset(model.state_dict().keys() - part.state_dict().keys())
    part.pipeline = Pipeline(places[rank::num_ranks], names, elsewhere)
    return part


def make_stages(model: Decoder) -> list[Stage]:
    """Returns the stages of a cut model. They use the model's current modules, so layouts must be applied before."""
    assert isinstance(model.pipeline, Pipeline)
    model.pipeline.stages = [Stage(model, place) for place in model.pipeline.places]
    return model.pipeline.stages


def elsewhere(model: Decoder) -> frozenset[str]:
    """Names of the parameters and persistent buffers that only other ranks along `pp` have."""
    return model.pipeline.elsewhere if isinstance(model.pipeline, Pipeline) else frozenset()


def stage_bounds(model: Decoder, config: Config) -> list[int]:
    """Returns the index of the first block of each stage, then the number of blocks.

    model: the whole model, on the meta device. Raises ValueError for a split that does not fit it.
    """
    number, num_blocks, split = num_stages(config), len(model.blocks), config.parallelism.pipeline_parallel_split
    if split is None:
        if number > num_blocks:
            raise ValueError(
                f"parallelism.pipeline_parallel_degree = {config.parallelism.pipeline_parallel_degree} needs {number} "
                f"stages of at least one block, and the model has {num_blocks} blocks; choose a lower degree."
            )
        return balanced(stage_costs(model, config.training.seq_len), number)
    bounds = [0, *split[split[:1] == [0] :], num_blocks]
    if any(first >= second for first, second in pairwise(bounds)):
        raise ValueError(
            f"parallelism.pipeline_parallel_split = {split} must rise and name blocks from 1 to {num_blocks - 1}, so "
            "that each stage has at least one of the model's blocks."
        )
    return bounds


def stage_costs(model: Decoder, seq_len: int) -> list[int]:
    """Forward FLOPs of one token in each block; the last includes the head."""
    costs = [block.flops_per_token(seq_len) for block in model.blocks.values()]  # type: ignore[operator]
    return [*costs[:-1], costs[-1] + model.head_flops_per_token()]


def balanced(costs: Sequence[int], number: int) -> list[int]:
    """Cuts `costs` into `number` consecutive parts so that the highest cost of a part is as low as possible.

    Returns the index of the first cost of each part, then the number of costs.
    """
    before = [0, *accumulate(costs)]
    # best[end]: for costs[:end], the highest cost of a part, and the beginnings of the parts.
    best: list[tuple[int, list[int]]] = [(before[end], [0]) for end in range(len(before))]
    for parts in range(2, number + 1):
        best = [
            min(
                (
                    (max(best[start][0], before[end] - before[start]), [*best[start][1], start])
                    for start in range(parts - 1, end)
                ),
                default=(0, []),  # fewer costs than parts
            )
            for end in range(len(before))
        ]
    return [*best[-1][1], len(costs)]


def describe_stages(model: Decoder, config: Config) -> str:
    """One line for the console: the blocks of each stage and its share of the cost. model: the whole model."""
    costs, bounds = stage_costs(model, config.training.seq_len), stage_bounds(model, config)
    of_stages = [sum(costs[start:stop]) for start, stop in pairwise(bounds)]
    stages = [
        f"{start}-{stop - 1} ({cost / sum(costs):.0%})"
        for (start, stop), cost in zip(pairwise(bounds), of_stages, strict=True)
    ]
    balance = sum(of_stages) / len(of_stages) / max(of_stages)
    return (
        f"pipeline: {config.parallelism.pipeline_parallel_schedule}, {len(stages)} stages on "
        f"{config.parallelism.pipeline_parallel_degree} ranks with blocks {', '.join(stages)} of the FLOPs; "
        f"mean / highest {balance:.2f}"
    )
