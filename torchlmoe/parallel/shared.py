"""Sums gradients of parameters that several pipeline stages have: modules shared by layers, and tied embeddings.

Each stage computes the gradient of its use, and the parameter's gradient is the sum. Equal gradients and equal
optimizers give equal updates, so the copies stay equal.
"""

from collections.abc import Sequence, Set
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchlmoe.parallel.ranks import Ranks


class SharedParameters:
    """names: for each rank along `pp`, the names of its parameters; the argument is equal on all ranks.
    timeout_seconds: timeout of collectives.

    counted_elsewhere: names of this rank's parameters that an earlier rank along `pp` has too.
    """

    def __init__(self, names: Sequence[Sequence[str]], ranks: Ranks, timeout_seconds: float):
        holders: dict[str, list[int]] = {}
        for place, own_names in enumerate(names):
            for name in own_names:
                holders.setdefault(name, []).append(place)
        own = ranks["pp"].get_local_rank()
        self.counted_elsewhere: Set[str] = {name for name, places in holders.items() if own in places[1:]}
        self._groups: list[tuple[dist.ProcessGroup, list[str]]] = []
        columns = ranks.mesh.mesh.flatten(1)  # [pp, others]: the ranks of a column differ only in their stages
        for places in sorted({tuple(places) for places in holders.values() if len(places) > 1}):
            # Every rank must take part in the creation of each group, even if it is in none of them.
            group, _ = dist.new_subgroups_by_enumeration(
                columns[list(places)].T.tolist(), timeout=timedelta(seconds=timeout_seconds)
            )
            if own in places:
                shared = sorted(name for name, holding in holders.items() if tuple(holding) == places)
                self._groups.append((group, shared))

    @torch.no_grad()
    def sum_gradients(self, model: nn.Module) -> None:
        """Sum shared gradients over stages. Call it once per step, after all other sums of gradients."""
        parameters = dict(model.named_parameters())
        for group, names in self._groups:
            for name in names:
                gradient = parameters[name].grad
                assert gradient is not None, name
                local: Tensor = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                dist.all_reduce(local, group=group)
