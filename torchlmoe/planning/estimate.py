"""Estimates memory and time of a layout from sizes, without a trace.

An estimate is a lower bound of the traced plan, and ranks layouts in a similar order.
"""

from dataclasses import dataclass

from torchlmoe.config.batch import batch_sizes, num_stages, ranks_of_rows
from torchlmoe.config.settings import Config
from torchlmoe.feed_forwards.experts import Experts
from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.model.decoder import Decoder
from torchlmoe.planning.communication import Message
from torchlmoe.planning.gpus import GPU
from torchlmoe.planning.layout import Layout
from torchlmoe.planning.roofline import PRODUCT_FRACTION, Machine

# Operations of a block, forward and backward. Blocks have more, since an estimate must not exceed the traced plan.
_OPERATIONS_OF_BLOCK = 100


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    dim: width. blocks: number of blocks. experts, others: numbers of parameters in experts and elsewhere.
    top_k: experts per token, summed over routed layers. flops_per_token: of a forward.
    """

    dim: int
    blocks: int
    experts: int
    others: int
    top_k: int
    flops_per_token: float

    @classmethod
    def of(cls, model: Decoder, seq_len: int) -> "Sizes":
        experts = sum(
            x.numel() for module in model.modules() if isinstance(module, Experts) for x in module.parameters()
        )
        routed = [block.feed_forward for block in model.blocks.values() if isinstance(block.feed_forward, MoE)]
        return cls(
            dim=model.spec.dim,
            blocks=len(model.blocks),
            experts=experts,
            others=sum(x.numel() for x in model.parameters()) - experts,
            top_k=sum(layer.router.top_k for layer in routed),
            flops_per_token=model.flops_per_token(seq_len),
        )


@dataclass(frozen=True)
class Estimate:
    """peak_bytes: per rank, of parameters, gradients and one optimizer value per parameter. seconds: per step."""

    peak_bytes: int
    seconds: float


def estimate(config: Config, sizes: Sizes, world_size: int, gpu: GPU, ranks_per_node: int) -> Estimate:
    """Estimates one layout: products at full rate, messages of FSDP, tensor and expert parallelism, bubble of 1F1B.

    Stages are assumed to be equal. Nothing else of a step is counted, not even recompute.
    Raises ConfigError for degrees that do not fit the number of ranks.
    """
    layout = Layout.of(config, world_size)
    degrees, machine = layout.degrees, Machine(gpu, ranks_per_node, layout.strides)
    dtype = config.training.dtype_on(gpu.device_type)
    pipeline, tensor, expert = degrees["pp"], degrees["tp"], degrees["ep"]
    shard = degrees["dp_shard"] * degrees["cp"]
    data_ranks = world_size // ranks_of_rows(config)
    rows, whole = batch_sizes(config.training, data_ranks)
    microbatches = whole // (rows * data_ranks)
    tokens = rows * config.training.seq_len // (degrees["cp"] * tensor)  # per rank and microbatch, between blocks

    def send(axis: str, collective: str, ranks: int, num_bytes: float) -> float:
        return machine.seconds_to_send(Message(axis, collective, ranks, int(num_bytes))) if ranks > 1 else 0.0

    flops = 3 * sizes.flops_per_token * whole * config.training.seq_len / world_size
    starting = microbatches * sizes.blocks / pipeline * _OPERATIONS_OF_BLOCK * gpu.seconds_to_start
    computing = max(flops / (gpu.matmul_rate(dtype) * PRODUCT_FRACTION), starting)

    others, experts = sizes.others / (pipeline * tensor), sizes.experts / (pipeline * expert)
    gathers = 1 if pipeline > 1 else microbatches
    fsdp = 0.0
    for axis, ranks, number in (("dp_shard_cp", shard, others), ("efsdp", shard * tensor // expert, experts)):
        fsdp += gathers * send(axis, "all_gather", ranks, number * dtype.itemsize)
        fsdp += send(axis, "reduce_scatter", ranks, number * max(4, dtype.itemsize))
        fsdp += send("dp_replicate", "all_reduce", degrees["dp_replicate"], number * max(4, dtype.itemsize) / ranks)

    activation = tokens * sizes.dim * dtype.itemsize
    for_heads = 4 * sizes.blocks * send("tp", "all_gather", tensor, activation * tensor)
    for_experts = 4 * sizes.top_k * send("ep", "all_to_all", expert, activation) if sizes.top_k else 0.0
    waiting = microbatches / pipeline * (for_heads + for_experts)

    chunks = microbatches * (num_stages(config) // pipeline)
    busy = computing + waiting
    seconds = busy * (1 + (pipeline - 1) / chunks) + (max(0.0, fsdp - computing) if gpu.overlaps else fsdp)
    state = max(4, dtype.itemsize) * 3 * (sizes.others + sizes.experts) * degrees["dp_replicate"] / world_size
    return Estimate(int(state), seconds)
