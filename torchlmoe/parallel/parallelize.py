"""From settings to a model that is ready to train: the statements of `build_model` are the order of application."""

import torch
from torch.distributed.device_mesh import DeviceMesh

from torchlmoe.config import Config
from torchlmoe.config_loader import shortest_span
from torchlmoe.model.decoder import Decoder, build_on_meta
from torchlmoe.parallel.compile import compile_blocks
from torchlmoe.parallel.context import apply_context_parallel
from torchlmoe.parallel.data import apply_fsdp
from torchlmoe.parallel.float8 import convert_to_float8
from torchlmoe.parallel.precision import compute_in
from torchlmoe.parallel.recompute import recompute


def build_model(config: Config, vocab_size: int, mesh: DeviceMesh, device: torch.device) -> Decoder:
    """Builds on the meta device, shards, then gives every rank its slices of the same initial weights.

    Parameters are in at least float32; a single process trains the plain module.
    """
    dtype = getattr(torch, config.training.dtype)
    master_dtype = torch.promote_types(dtype, torch.float32)
    model = build_on_meta(config, vocab_size).to(master_dtype)
    if mesh["cp"].size() > 1:
        apply_context_parallel(model, mesh["cp"], config.parallelism, shortest_span(config, mesh.size()))
    if config.float8.enable:
        convert_to_float8(model, config.float8, device)
    if config.activation_checkpoint.mode != "none":
        for block in model.blocks.values():
            recompute(block, config.activation_checkpoint.mode)
    if config.compile.enable:
        compile_blocks(model, device)
    if mesh.size() > 1:
        apply_fsdp(model, mesh, dtype)
    model.to_empty(device=device)
    model.init_weights(config.training.seed)
    if mesh.size() == 1 and dtype != master_dtype:
        compute_in(dtype, model)
    return model
