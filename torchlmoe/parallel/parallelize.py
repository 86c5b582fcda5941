"""Builds a model from settings, ready to train. `shape` applies parallel layouts in the order of its statements."""

import torch

from torchlmoe.config.batch import shortest_span
from torchlmoe.config.settings import Config
from torchlmoe.model.decoder import Decoder, build_on_meta
from torchlmoe.parallel.compile import compile_blocks
from torchlmoe.parallel.context import apply_context_parallel, apply_halos, context_parallel_plans
from torchlmoe.parallel.data import apply_fsdp
from torchlmoe.parallel.expert import apply_expert_parallel, check_experts
from torchlmoe.parallel.float8 import convert_experts_to_mxfp8, convert_to_float8
from torchlmoe.parallel.islands import read_islands
from torchlmoe.parallel.precision import compute_in
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.parallel.recompute import recompute
from torchlmoe.parallel.stages import cut, make_stages, stage_bounds
from torchlmoe.parallel.tensor import apply_tensor_parallel, tensor_parallel_plan
from torchlmoe.routing.balance import RoutedLayer
from torchlmoe.styles.heads import read_local_parts


def whole_model(config: Config, vocab_size: int, world_size: int) -> Decoder:
    """Returns the whole model on the meta device. Raises ValueError if the degrees cannot split it.

    Every rank checks the whole model, so that no rank waits for one that has failed.
    """
    model, degrees = build_on_meta(config, vocab_size), config.parallelism
    if degrees.pipeline_parallel_degree > 1:
        stage_bounds(model, config)
    if degrees.tensor_parallel_degree > 1:
        tensor_parallel_plan(model, degrees.tensor_parallel_degree)
    if degrees.context_parallel_degree > 1:
        context_parallel_plans(model, degrees, shortest_span(config, world_size))
    check_experts(model, degrees.expert_parallel_degree)
    return model


def build_model(config: Config, vocab_size: int, ranks: Ranks, device: torch.device) -> Decoder:
    """Returns the model on `device`, sharded over `ranks`. Its initial weights do not depend on the layout."""
    return fill(shape(config, vocab_size, ranks, device), config, ranks, device)


def shape(config: Config, vocab_size: int, ranks: Ranks, device: torch.device) -> Decoder:
    """Returns the rank's model on the meta device, with all parallel layouts applied and no memory allocated.

    Parameters are in at least float32. A single process has the plain module. Raises ValueError if the settings do not
    fit the model or the device.
    """
    dtype = config.training.dtype_on(device.type)
    model = build_on_meta(config, vocab_size).to(_master_dtype(dtype))
    if ranks["pp"].size() > 1:
        model = cut(model, stage_bounds(model, config), ranks["pp"].get_local_rank(), ranks["pp"].size())
    tensor = ranks["tp"].size()
    plan = tensor_parallel_plan(model, tensor) if tensor > 1 else []  # before float8 replaces layers
    if config.float8.enable:
        convert_to_float8(model, config.float8, device, ranks["tp"])
    if config.float8.experts == "mxfp8":
        convert_experts_to_mxfp8(model, device, config.compile.enable)
    if plan:
        apply_tensor_parallel(model, plan, ranks["tp"])
    if ranks["cp"].size() > 1:
        apply_context_parallel(model, ranks["cp"], config.parallelism, shortest_span(config, ranks.world_size))
    if ranks.pieces.size() > 1:
        apply_halos(model, ranks.pieces)
    if config.parallelism.expert_parallel_degree > 1:
        apply_expert_parallel(model, ranks)
    spread_balance(model, ranks)
    if config.activation_checkpoint.mode != "none":
        for block in model.blocks.values():
            recompute(block, config.activation_checkpoint.mode)
    if config.compile.enable:
        compile_blocks(model, device)
    if ranks.world_size > 1:
        apply_fsdp(model, [model] if model.pipeline is None else make_stages(model), ranks, dtype)
    read_local_parts(model)
    return model


def spread_balance(model: Decoder, ranks: Ranks) -> None:
    """Sets the ranks over which routed layers count a microbatch: cp for mixers, cp and tp for feed-forward layers."""
    for block in model.blocks.values():
        for layer, mesh in ((block.mixer, ranks["cp"]), (block.feed_forward, ranks.pieces)):
            if isinstance(layer, RoutedLayer) and mesh.size() > 1:
                layer.load_balance.mesh = mesh


def fill(model: Decoder, config: Config, ranks: Ranks, device: torch.device) -> Decoder:
    """Allocates the storage of a shaped model, and initializes each rank's slices of the same weights."""
    model.to_empty(device=device)
    model.init_weights(config.training.seed)
    return ready(model, config, ranks)


def ready(model: Decoder, config: Config, ranks: Ranks) -> Decoder:
    """Makes parameters read as casts or local parts. This comes last, since a write to a cast would be lost."""
    dtype = config.training.dtype_on(ranks.mesh.device_type)
    if ranks.world_size == 1 and dtype != _master_dtype(dtype):
        compute_in(dtype, model)
    read_islands(model)
    return model


def _master_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
