"""The recurrences as submodules, so that a sequence-parallel plan can name them."""

from functools import partial

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.layers.sequence import Sequence
from torchlmoe.ops import elementwise_recurrence, linear_recurrence, online_gradient, span_summary
from torchlmoe.ops.elementwise_recurrence import check_backend, elementwise_span_summary
from torchlmoe.parallel.sequence import ElementwiseSequenceParallel, LSMSequenceParallel, StateRing


class LinearRecurrence(nn.Module):
    """`ops.linear_recurrence` with its signature and a backend of its own. Looks across tokens.

    document_bounds: of the row, where cu_seqlens are its documents' memories; for the style that splits sequences.
    """

    def __init__(self, backend: str = "auto"):
        super().__init__()
        self.backend = backend

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, document_bounds: Tensor | None = None, **terms
    ) -> tuple[Tensor, Tensor | None]:
        return linear_recurrence(q, k, v, backend=self.backend, **terms)

    def sequence_parallel_style(self, lsm: str, attention: str) -> ParallelStyle:
        return LSMSequenceParallel(lsm, partial(span_summary, backend=self.backend))


class ElementwiseRecurrence(nn.Module):
    """`ops.elementwise_recurrence` with its signature and a backend of its own. Looks across tokens."""

    def __init__(self, backend: str = "auto"):
        super().__init__()
        check_backend(backend)
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **terms) -> tuple[Tensor, Tensor | None]:
        return elementwise_recurrence(q, k, v, backend=self.backend, **terms)

    def sequence_parallel_style(self, lsm: str, attention: str) -> ParallelStyle:
        return ElementwiseSequenceParallel(lsm, span_summary=partial(elementwise_span_summary, backend=self.backend))


class OnlineGradient(nn.Module):
    """`ops.online_gradient` with its signature and a backend of its own. Looks across tokens."""

    def __init__(self, backend: str = "auto"):
        super().__init__()
        check_backend(backend, "online_gradient")
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **terms) -> tuple[Tensor, Tensor | None]:
        return online_gradient(q, k, v, backend=self.backend, **terms)

    def sequence_parallel_style(self, lsm: str, attention: str) -> ParallelStyle:
        """Its state is no affine map of the one before, which leaves the ring."""
        return StateRing()


def recur(
    recurrence: nn.Module, q: Tensor, k: Tensor, v: Tensor, *, sequence: Sequence, cache: TensorDict | None, **terms
) -> Tensor:
    """Runs `recurrence` from `cache["state"]` and leaves the last state there; without a cache, from zero.

    Where `sequence` has memories, each is a state of its own, and the outputs of a token's memories are mixed.
    """
    cu_seqlens, memories = sequence.cu_seqlens if cache is None else None, sequence.memories
    if memories is not None and sequence.packed_memories is None:
        q, k, v = memories.pack(q), memories.pack(k), memories.pack(v)
        terms = {name: memories.pack(term) if _is_per_token(term) else term for name, term in terms.items()}
    if memories is not None:
        cu_seqlens = memories.cu_seqlens
        terms["document_bounds"] = memories.document_bounds
    if cache is not None:
        terms |= {"initial_state": cache["state"].flatten(0, -4), "output_final_state": True}
    o, state = recurrence(q, k, v, cu_seqlens=cu_seqlens, **terms)
    if cache is not None:
        cache["state"].copy_(state.view_as(cache["state"]))
    return o if memories is None else memories.mix(o)


def _is_per_token(term: object) -> bool:
    """Terms per head, such as a constant decay or a bonus, have one or two dims."""
    return isinstance(term, Tensor) and term.dim() > 2


def recur_normalized(
    recurrence: nn.Module, q: Tensor, k: Tensor, v: Tensor, *, normalizer_eps: float, **others
) -> Tensor:
    """`recur`, divided by the sum of the attention weights, which is what a column of ones on v reads.

    No weight is negative, but an inner product of features may round to less than zero.
    """
    o = recur(recurrence, q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1), **others)
    return o[..., :-1] / (o[..., -1:].clamp(min=0) + normalizer_eps)
