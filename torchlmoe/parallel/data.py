"""Data parallelism: FSDP2 with float32 masters, and float32 islands where the model casts down."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from torchlmoe.model.decoder import Decoder


def apply_fsdp(model: Decoder, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shards each block's parameters over `mesh` (`Ranks.parameters`, replicas first), computes in `dtype`.

    Parameters keep their own dtype and so do the modules marked `float32_island`; gradients are reduced in at least
    float32. Activations follow the parameters, and what a module is handed keeps its dtype (HGRN2's lower bounds are
    float32). The loss must be a mean over all ranks' tokens: gradients are summed, not averaged.
    """
    casts_down = torch.promote_types(dtype, torch.float32) != dtype
    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if casts_down
        else MixedPrecisionPolicy()
    )

    for block in model.blocks.values():
        # A group has one policy; the islands of a block form a group of their own.
        islands = [module for module in block.modules() if getattr(module, "float32_island", False)]
        if casts_down and islands:
            fully_shard(islands, mesh=mesh)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for module in model.common.values():
        fully_shard(module, mesh=mesh)
    outer: list[nn.Module] = [model.embedding, model.head]
    if model.head.projection is None:  # the head uses the embedding's weight: they live in one group
        fully_shard(outer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    else:
        for module in outer:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum that scales on the way
