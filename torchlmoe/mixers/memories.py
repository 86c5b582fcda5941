"""Several states in place of one (arXiv 2502.13685): inputs are packed by memory, and outputs are mixed by token.

Legend: B rows, T tokens, N documents, K memories per token, S memories in total, M = B * T * K slots.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from torchlmoe.layers.initialization import normal_
from torchlmoe.layers.recurrence import LinearRecurrence
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.layers.short_convolution import ShortConvolution
from torchlmoe.ops.grouped_matmul import grouped_matmul
from torchlmoe.routing.dispatch import Slots, gather_slots, permute_slots, reorder_choices, sum_slots
from torchlmoe.styles.run_halo import RunHalo


@dataclass(frozen=True)
class Memories:
    """The memories that tokens are routed to. Each memory of each document is one run of packed tokens.

    cu_seqlens: int32 [N * S + 1], bounds of the runs, a document's memories one after another; empty ones are common.
    weight_M: the share of each slot's output in its token's, at least float32. shape: (B, T).
    document_bounds: int32 [N + 1] of the packed row, None if rows are not packed.
    by_memory: the slots sorted by memory only, if memories have their own projections; None if they share
        them. With their own projections, inputs of the recurrence are packed already (`MemorySequence.project`).
    """

    slots: Slots
    cu_seqlens: Tensor
    weight_M: Tensor
    shape: tuple[int, int]
    document_bounds: Tensor | None
    by_memory: Slots | None = None

    @classmethod
    def of_choices(
        cls,
        memory_TK: Tensor,
        weight_TK: Tensor,
        num_memories: int,
        shape: tuple[int, int],
        cu_seqlens: Tensor | None,
        start: int = 0,
        own_projections: bool = False,
        alignment: int = 1,
    ) -> "Memories":
        """memory_TK int64 [B * T, K], distinct in a row; cu_seqlens, start: see `SequenceLayout`; alignment: see
        `Slots`.
        """
        num_tokens = shape[0] * shape[1]
        tokens = torch.arange(num_tokens, device=memory_TK.device)
        if cu_seqlens is None:
            document_T, num_documents = tokens // shape[1], shape[0]
        else:
            document_T = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens.int() + start, right=True)
            num_documents = len(cu_seqlens) - 1
        run_TK = document_T[:, None] * num_memories + memory_TK
        slots = Slots.sorted_by_expert(run_TK, num_documents * num_memories)
        bounds = torch.cat([slots.offset_E.new_zeros(1), slots.offset_E])
        by_memory = Slots.sorted_by_expert(memory_TK, num_memories, alignment) if own_projections else None
        return cls(slots, bounds, reorder_choices(weight_TK, slots), shape, cu_seqlens, by_memory)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, M, ...]."""
        rows = x.reshape(x.shape[0] * x.shape[1], prod(x.shape[2:]))
        return gather_slots(rows, self.slots).view(1, self.slots.token_M.shape[0], *x.shape[2:])

    def mix(self, o: Tensor) -> Tensor:
        """[1, M, heads, V] -> [B, T, heads, V], the weighted sum over each token's slots."""
        weighted = o * self.weight_M[:, None, None].to(o.dtype)
        return sum_slots(weighted.flatten(2)[0], self.slots).view(*self.shape, *o.shape[2:])


@dataclass(frozen=True)
class MemorySequence(SequenceLayout):
    """A layout whose tokens go to `memories` (never None; its default lets it follow fields that have one)."""

    memories: Memories | None = None

    @classmethod
    def of(cls, sequence: SequenceLayout, memories: Memories) -> "MemorySequence":
        return cls(sequence.positions, sequence.cu_seqlens, sequence.start, sequence.share, memories)

    def project(self, projection: Callable[..., Tensor], x: Tensor) -> Tensor:
        """projection(x): [1, M, ...] if memories have their own projections, else [B, T, ...]."""
        assert self.memories is not None
        if self.memories.by_memory is None:
            return projection(x)
        own = isinstance(projection, MemoryLinear)
        return projection(x, self.memories) if own else self.memories.pack(projection(x))


class MemoryLinear(nn.Module):
    """x [B, T, in] -> [1, M, out]: multiplies each slot's token by the matrix of its memory, without a bias."""

    head_dims = {"weight": 1}

    def __init__(
        self, in_features: int, out_features: int, num_memories: int, init_std: float, units: int | None = None
    ):
        super().__init__()
        self.init_std, self.units = init_std, units
        self.weight = nn.Parameter(torch.empty(num_memories, out_features, in_features))

    def init_weights(self) -> None:
        normal_(self.weight, self.init_std)

    def forward(self, x: Tensor, memories: Memories) -> Tensor:
        by_memory = memories.by_memory
        assert by_memory is not None
        y = grouped_matmul(gather_slots(x.flatten(0, 1), by_memory), self.weight, by_memory.offset_E)
        return permute_slots(y, by_memory, memories.slots)[None]

    def flops_per_slot(self) -> int:
        """Forward FLOPs of one slot."""
        return 2 * self.weight[0].numel()


class RunConvolution(ShortConvolution):
    """A convolution of packed tokens [1, M, channels], in which each memory of a document is a separate run."""

    def forward(self, x: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None = None) -> Tensor:
        assert isinstance(sequence, MemorySequence)
        assert sequence.memories is not None
        bounds = sequence.memories.cu_seqlens
        if cache is None:
            return self.convolve(x, cu_seqlens=bounds)
        earlier = sequence.restarted(cache["inputs"]).to(x.dtype)
        y, last = self.continue_runs(x, bounds, earlier.flatten(0, 1))
        cache["inputs"].copy_(last.view_as(earlier))
        return y

    def continue_runs(self, x: Tensor, bounds: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve x [1, M, channels] with bounds int32 [runs + 1], continuing each run.

        earlier: [runs, width - 1, channels], the last inputs of each run. Returns y like x, and the new last inputs.
        """
        reach, num_runs = self.weight.shape[1] - 1, len(bounds) - 1
        token_M = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        place_M = token_M + reach * (1 + torch.searchsorted(bounds[1:].contiguous(), token_M, right=True))
        # Put the last inputs of each run before it.
        extended_bounds = bounds + reach * torch.arange(num_runs + 1, dtype=torch.int32, device=x.device)
        window = torch.arange(reach, device=x.device)
        extended = x.new_empty(x.shape[1] + num_runs * reach, x.shape[2])
        extended[extended_bounds[:-1, None] + window] = earlier
        extended[place_M] = x[0]
        last = extended[extended_bounds[1:, None] - reach + window]
        return self.convolve(extended[None], cu_seqlens=extended_bounds)[:, place_M], last

    def context_parallel_style(self, lsm: str, attention: str) -> ParallelStyle:
        """A separate style: a token's predecessors in its run are not those in its row."""
        return RunHalo()


class MemoryRecurrence(LinearRecurrence):
    """A recurrence over the runs of `MemorySequence`, whose outputs are mixed by token.

    document_bounds: of the row, while cu_seqlens are the bounds of runs; used by the context-parallel style.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, document_bounds: Tensor | None = None, **terms
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(q, k, v, **terms)

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, *, sequence: SequenceLayout, cache: TensorDict | None, **terms
    ) -> Tensor:
        """Like `layers.recurrence.recur`, with one state per memory."""
        assert isinstance(sequence, MemorySequence)
        memories = sequence.memories
        assert memories is not None
        if memories.by_memory is None:
            q, k, v = memories.pack(q), memories.pack(k), memories.pack(v)
            terms = {name: memories.pack(term) if _is_per_token(term) else term for name, term in terms.items()}
        if cache is not None:
            terms |= {"initial_state": sequence.restarted(cache["state"]).flatten(0, 1), "output_final_state": True}
        o, state = self(q, k, v, cu_seqlens=memories.cu_seqlens, document_bounds=memories.document_bounds, **terms)
        if cache is not None:
            assert state is not None
            cache["state"].copy_(state.view_as(cache["state"]))
        return memories.mix(o)


def _is_per_token(term: object) -> bool:
    """Terms per head, such as a constant decay or a bonus, have one or two dims."""
    return isinstance(term, Tensor) and term.dim() > 2
