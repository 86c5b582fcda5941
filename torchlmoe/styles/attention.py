"""Context parallelism for softmax attention, as a style for `parallelize_module`.

Each of the P ranks of the mesh holds a contiguous span of the tokens, all of equal length. There are two ways to attend
to earlier spans:

    all_gather (LASP-2H, arXiv 2502.07563): one all-gather of keys and values, for the queries of the span; one
        reduce-scatter of their gradients.
    ulysses (arXiv 2309.14509): one all-to-all from spans with all heads to all tokens with 1 / P of the heads, one for
        the output in the other direction, and the same for the gradients.

With H heads of queries, G heads of keys and D numbers per head, a rank receives for each token of its span
2 G (P - 1) D numbers with all_gather and 2 (H + lcm(G, P)) (P - 1) / P D with ulysses, and as many in the backward. So
all_gather suits few ranks and few key heads. It keeps the keys of all heads in memory, ulysses those of 1 / P of them.
The file needs only torch.
"""

from functools import partial
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle


class AttentionSequenceParallel(ParallelStyle):
    """Splits the sequence of a module with forward(q, k, v, *, cu_seqlens=None, query_start=0, ...) -> o like q.

    The caller passes q [B, T / P, H, D], k and v [B, T / P, G, D] of the rank's own span, and gets o of that span.
    `cu_seqlens` are bounds in all T tokens. The module must support queries that start at token `query_start` of T
    keys.

    communication: "all_gather" or "ulysses". num_heads: H. Applying the style raises ValueError if ulysses cannot split
    H over the ranks. A mesh of one rank leaves the module unchanged.
    """

    def __init__(self, communication: str = "all_gather", num_heads: int | None = None):
        if communication not in ("all_gather", "ulysses"):
            raise ValueError(f"communication = {communication!r} must be 'all_gather' or 'ulysses'.")
        self.communication, self.num_heads = communication, num_heads

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        degree = device_mesh.size()
        if degree == 1:
            return module
        if self.communication == "all_gather":
            module.register_forward_pre_hook(partial(_gather_keys, device_mesh), with_kwargs=True)
            return module
        if self.num_heads is not None and self.num_heads % degree:
            raise ValueError(
                f"ulysses cannot spread num_heads = {self.num_heads} over {degree} ranks; make num_heads a multiple of "
                f"{degree}, or use all_gather."
            )
        module.register_forward_pre_hook(partial(_to_heads, device_mesh))
        module.register_forward_hook(partial(_to_spans, device_mesh))
        return module


def _gather_keys(mesh: DeviceMesh, module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]):
    q, k, v = inputs
    # With tokens as the first dimension, the parts of the ranks arrive in the order of the sequence.
    span = DTensor.from_local(torch.cat([k, v], -1).transpose(0, 1), mesh, [Shard(0)])
    whole = span.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()]).transpose(0, 1)
    k, v = whole.split([k.shape[-1], v.shape[-1]], -1)
    return (q, k, v), options | {"query_start": mesh.get_local_rank() * q.shape[1]}


def _to_heads(mesh: DeviceMesh, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each of q, k and v [B, T / P, heads, D] -> [B, T, heads / P, D]. Heads of keys are repeated if P needs more."""
    q, k, v = inputs
    degree, num_copies = mesh.size(), lcm(k.shape[2], mesh.size()) // k.shape[2]
    k, v = (x.repeat_interleave(num_copies, 2) for x in (k, v))
    # The first dimension is the destination: it gets its part of the heads of q, k and v.
    heads_PBTHD = torch.cat([x.unflatten(2, (degree, -1)) for x in (q, k, v)], 3).movedim(2, 0)
    spans_PBTHD = all_to_all_single_autograd(heads_PBTHD.contiguous(), None, None, (mesh, 0))
    rows = spans_PBTHD.movedim(0, 1).flatten(1, 2)
    return rows.split([x.shape[2] // degree for x in (q, k, v)], 2)


def _to_spans(mesh: DeviceMesh, module: nn.Module, inputs: tuple[Tensor, ...], o: Tensor) -> Tensor:
    """The inverse of `_to_heads` for o."""
    spans_PBTHD = o.unflatten(1, (mesh.size(), -1)).movedim(1, 0)
    heads_PBTHD = all_to_all_single_autograd(spans_PBTHD.contiguous(), None, None, (mesh, 0))
    return heads_PBTHD.movedim(0, 2).flatten(2, 3)
