"""Several states in place of one (arXiv 2502.13685): tokens packed by memory on the way in, mixed on the way out.

Legend: B rows, T tokens, N documents, K memories of a token, S memories in all, M = B * T * K slots.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from torchlmoe.layers.dispatch import Slots, gather_slots, permute_slots, reorder_choices, sum_slots
from torchlmoe.layers.initialization import normal_
from torchlmoe.ops.grouped_matmul import grouped_matmul


@dataclass(frozen=True)
class Memories:
    """To which memories the tokens go, each memory of each document being one run of packed tokens.

    cu_seqlens: int32 [N * S + 1], bounds of the runs, a document's memories one after another; empty ones are common.
    weight_M: the share of each slot's output in its token's, at least float32. shape: (B, T).
    document_bounds: int32 [N + 1] of the packed row, None where rows are not packed.
    by_memory: the slots sorted by memory alone, where memories have projections of their own; None where they share
        them. With projections of their own, what enters the recurrence comes packed (`Sequence.project`).
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
        """memory_TK int64 [B * T, K], distinct in a row; cu_seqlens, start as of `Sequence`, alignment of `Slots`."""
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


class MemoryLinear(nn.Module):
    """x [B, T, in] -> [1, M, out]: each slot's token by the matrix of its memory, no bias."""

    def __init__(self, in_features: int, out_features: int, num_memories: int, init_std: float):
        super().__init__()
        self.init_std = init_std
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
