"""From settings to a model that is ready to train: the statements of `build_model` are the order of application."""

import torch
from torch.distributed.device_mesh import DeviceMesh

from torchlmoe.config import Config
from torchlmoe.model.decoder import Decoder, build_on_meta
from torchlmoe.parallel.data import apply_fsdp


def build_model(config: Config, vocab_size: int, mesh: DeviceMesh, device: torch.device) -> Decoder:
    """Builds on the meta device, shards, then gives every rank its slices of the same initial weights.

    A single process in float32 or float64 trains the plain module.
    """
    dtype = getattr(torch, config.training.dtype)
    model = build_on_meta(config, vocab_size).to(torch.promote_types(dtype, torch.float32))
    if mesh.size() > 1 or dtype is torch.bfloat16:
        apply_fsdp(model, mesh, dtype)
    model.to_empty(device=device)
    model.init_weights(config.training.seed)
    return model
