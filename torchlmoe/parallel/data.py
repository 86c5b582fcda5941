"""Data parallelism: FSDP2 with float32 masters. In a lower precision, float32 islands stay outside FSDP."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from torchlmoe.feed_forwards.experts import Experts
from torchlmoe.model.decoder import Decoder
from torchlmoe.parallel.islands import float32_islands, replicate
from torchlmoe.parallel.ranks import Ranks


def apply_fsdp(model: Decoder, roots: Sequence[nn.Module], ranks: Ranks, dtype: torch.dtype) -> None:
    """Shards parameters over `ranks.parameters`, and experts over `ranks.expert_parameters`. Computes in `dtype`.

    roots: the modules whose forward is called: the model, or its pipeline stages. A stage runs several microbatches
        before its first backward, so it keeps gathered parameters from its first forward to its last backward.
    Parameters keep their dtype, and modules marked `float32_island` compute in it. Gradients are summed over
    `ranks.parameters` in at least float32; those of parameters that ranks of tp share are first summed over tp in
    `dtype`. Inputs of a module are not cast, since HGRN2's lower bounds are float32. Gradients are summed, not
    averaged, so the loss must be divided by the number of all ranks' tokens.
    """
    mesh = ranks.parameters
    casts_down = torch.promote_types(dtype, torch.float32) != dtype
    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if casts_down
        else MixedPrecisionPolicy()
    )

    is_whole = model in roots
    reshard = None if is_whole else False  # None: after the forward, except for the root
    place = _placing_experts(model, ranks)
    common = replicate(model.common.modules(), ranks)
    for block in model.blocks.values():
        islands = replicate(float32_islands(block), ranks) if casts_down else None
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=reshard,
            mp_policy=policy,
            shard_placement_fn=place,
            ignored_params=islands,
        )
    if not model.spec.tie_embeddings:
        for module in model.ends():
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    elif is_whole:  # the head uses the embedding's weight, so both are one group
        fully_shard(model.ends(), mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    # With tied embeddings, a stage has the weight in its root's group.
    for root in roots:
        fully_shard(root, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, ignored_params=common)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo does not support a scaled sum


def _placing_experts(model: Decoder, ranks: Ranks) -> Callable[[nn.Parameter], Any]:
    """Returns FSDP's placement of parameters: the first dimension over the group's ranks, except for experts.

    Experts may be on other ranks. They are not a separate group, since its hooks would break a compiled block into
    several graphs.
    """
    mesh = ranks.expert_parameters
    degree = mesh.size(mesh.ndim - 1)
    dims = {
        id(parameter): _dim_of_experts(parameter, degree)
        for module in model.modules()
        if isinstance(module, Experts)
        for parameter in module.parameters()
    }
    if not ranks.spreads_experts:
        return lambda parameter: Shard(dims.get(id(parameter), 0))
    # Imported here, since torch 2.11 may lack it; a single GPU does not need it.
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult

    where = FSDPMeshInfo(mesh, 0) if mesh.ndim == 1 else HSDPMeshInfo(mesh, 1, 0)
    placed = {dim: ShardPlacementResult(Shard(dim), where) for dim in set(dims.values())}
    return lambda parameter: placed[dims[id(parameter)]] if id(parameter) in dims else None


def _dim_of_experts(parameter: nn.Parameter, degree: int) -> int:
    """Returns the dimension along which a rank's experts [E, m, n] are sharded over `degree` ranks.

    It is 0 if each rank gets at least one expert. FSDP would pad fewer experts to one per rank, and every rank would
    gather the padding. In that case it is a dimension of the matrices that `degree` divides.
    """
    shape = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).shape
    if shape[0] >= degree:
        return 0
    return next((dim for dim in (1, 2) if shape[dim] % degree == 0), 0)
