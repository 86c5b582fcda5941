"""Parameter initialization that does not depend on the parallel layout.

Every parameter is drawn whole, from a generator seeded by (seed, the parameter's global name), and a
sharded parameter keeps its slice of that draw. So one process, FSDP over any number of ranks and a
pipeline stage that holds only some of the layers all start from the same weights.

Modules write ordinary `init_weights()` methods with the functions below; the decoder opens
`named_draws(model, seed)` around them. Outside of it (a module used alone) they use torch's default generator.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_generator_of: ContextVar[Callable[[Tensor], torch.Generator | None]] = ContextVar(
    "generator_of", default=lambda parameter: None
)


@contextmanager
def named_draws(model: nn.Module, seed: int) -> Iterator[None]:
    """A context in which each parameter of `model` is drawn from (seed, its name in `model`)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def generator_of(parameter: Tensor) -> torch.Generator:
        digest = hashlib.sha256(f"{seed}/{names[id(parameter)]}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))

    token = _generator_of.set(generator_of)
    try:
        yield
    finally:
        _generator_of.reset(token)


@torch.no_grad()
def fill_(parameter: Tensor, draw: Callable[[Tensor, torch.Generator | None], object]) -> None:
    """Fills `parameter` with `draw(whole, generator)`, which writes in place into the whole tensor on the CPU.

    parameter: any shape, a plain tensor or a DTensor (which keeps its own shard of the whole).
    """
    # Drawn in float32 whatever the parameter's dtype, so that runs in every precision start from the same values.
    whole = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    draw(whole, _generator_of.get()(parameter))
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.copy_(own_part(whole, parameter))


def own_part(whole: Tensor, parameter: Tensor, first_dim: int = 0) -> Tensor:
    """Return the part of `whole`, equal on all ranks, that corresponds to this rank's part of a sharded parameter.

    first_dim: along dimensions before it, `whole` is already cut.
    """
    if not isinstance(parameter, DTensor):
        return whole
    # The last mesh axis cuts first: FSDP shards the parts of tensor or expert parallelism.
    for axis in reversed(range(parameter.device_mesh.ndim)):
        placement = parameter.placements[axis]
        # Shard, or _StridedShard, which FSDP uses for a dim that is already cut
        if not placement.is_replicate() and placement.dim >= first_dim:  # type: ignore[attr-defined]
            parts = whole.chunk(parameter.device_mesh.size(axis), placement.dim)  # type: ignore[attr-defined]
            rank = parameter.device_mesh.get_local_rank(axis)
            whole = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)  # type: ignore[attr-defined]
    return whole


def normal_(parameter: Tensor, std: float, mean: float = 0.0) -> None:
    """Normal with the given standard deviation and mean."""
    fill_(parameter, lambda whole, generator: whole.normal_(mean, std, generator=generator))


def uniform_(parameter: Tensor, low: float, high: float) -> None:
    """Uniform in [low, high)."""
    fill_(parameter, lambda whole, generator: whole.uniform_(low, high, generator=generator))


def constant_(parameter: Tensor, value: float) -> None:
    """Every element `value`."""
    fill_(parameter, lambda whole, generator: whole.fill_(value))


def orthogonal_(parameter: Tensor, gain: float) -> None:
    """Rows or columns orthogonal and of length `gain` (arXiv 1312.6120)."""
    fill_(parameter, lambda whole, generator: nn.init.orthogonal_(whole, gain, generator))


def copy_(parameter: Tensor, values: Tensor) -> None:
    """The given values, of the parameter's shape. Compute them in an explicit dtype, not in torch's default."""
    fill_(parameter, lambda whole, generator: whole.copy_(values))
