"""Where each token goes when documents are cut into chunks.

Every document is cut into chunks of C tokens, its last one padded. Chunks are ordered by their place in the document
first and documents from the longest to the shortest, so that the documents which still have a j-th chunk are always
the first `num_active[j]` ones and the j-th chunks are one contiguous slice: the scan over chunks runs over slices,
in parallel over documents, and no token is computed that belongs to padding beyond a document's last chunk.

    three documents of 5, 1 and 3 chunks  ->  | a0 c0 b0 | a1 c1 | a2 c2 | a3 | a4 |      num_active = [3, 2, 2, 1, 1]
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkLayout:
    """Legend: T tokens in all (batch times length), M chunks, C tokens a chunk, N documents (empty ones included)."""

    chunk_size: int
    num_active: list[int]  # documents that have a j-th chunk, for each j
    tokens_MC: Tensor  # int64: the token at each slot (0 at padded ones)
    padded_M_C: Tensor | None  # int64: padded slots, counted over M * C; None where there are none
    slot_of_token_T: Tensor  # int64: each token's slot, counted over M * C
    order_N: Tensor  # int64: documents from the longest to the shortest
    indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # made once, for every layer

    def starts(self) -> list[int]:
        """The first chunk of each step of the scan."""
        starts = [0]
        for count in self.num_active[:-1]:
            starts.append(starts[-1] + count)
        return starts

    def to_chunks(self, x: Tensor, num_heads: int) -> Tensor:
        """[B, T, Hx, ...] -> [M * num_heads, C, ...], zero where padded; head j reads head j // (num_heads / Hx)."""
        rows = x.reshape(-1, *x.shape[3:]).index_select(0, self._rows_of_slots(x.shape[2], num_heads))
        rows = rows.view(-1, num_heads, self.chunk_size, *x.shape[3:])
        if self.padded_M_C is not None:
            chunk, slot = self.padded_M_C // self.chunk_size, self.padded_M_C % self.chunk_size
            rows = rows.index_put((chunk, torch.arange(num_heads, device=x.device)[:, None], slot), rows.new_zeros(()))
        return rows.flatten(0, 1)

    def to_tokens(self, x: Tensor, num_heads: int, shape: tuple[int, int], num_target_heads: int) -> Tensor:
        """[M * num_heads, C, ...] -> [B, T, num_target_heads, ...]; heads that shared a source are summed."""
        rows = x.flatten(0, 1).index_select(0, self._slots_of_rows(num_heads))
        rows = rows.view(*shape, num_heads, *x.shape[2:])
        if num_target_heads != num_heads:
            rows = rows.unflatten(2, (num_target_heads, -1)).sum(3)
        return rows

    def _rows_of_slots(self, num_source_heads: int, num_heads: int) -> Tensor:
        key = (num_source_heads, num_heads)
        if key not in self.indices:
            heads = torch.arange(num_heads, device=self.tokens_MC.device) // (num_heads // num_source_heads)
            rows = self.tokens_MC[:, None, :] * num_source_heads + heads[None, :, None]
            self.indices[key] = rows.reshape(-1)
        return self.indices[key]

    def _slots_of_rows(self, num_heads: int) -> Tensor:
        if (num_heads,) not in self.indices:
            chunk, slot = self.slot_of_token_T // self.chunk_size, self.slot_of_token_T % self.chunk_size
            heads = torch.arange(num_heads, device=chunk.device)
            slots = (chunk[:, None] * num_heads + heads) * self.chunk_size + slot[:, None]
            self.indices[(num_heads,)] = slots.reshape(-1)
        return self.indices[(num_heads,)]


def chunk_layout(
    batch_size: int, length: int, bounds: Sequence[int] | None, max_chunk_size: int, device: torch.device
) -> ChunkLayout:
    """The layout of `batch_size` rows of `length` tokens, or of the documents that `bounds` bounds in one row."""
    if bounds is None:
        num_documents = batch_size
        starts_list = [row * length for row in range(batch_size)]
        lengths_list = [length] * batch_size
    else:
        if bounds[0] != 0 or bounds[-1] != length or list(bounds) != sorted(bounds):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {length}; it is {list(bounds[:8])} ... "
                f"{bounds[-1]}."
            )
        num_documents = len(bounds) - 1
        starts_list = list(bounds[:-1])
        lengths_list = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    order = sorted(range(num_documents), key=lambda document: -lengths_list[document])
    longest = max(lengths_list, default=0)
    # Short documents take one short chunk; a longer one is a whole number of sub-blocks.
    chunk_size = max(1, min(max_chunk_size, longest if longest < 16 else -(-longest // 16) * 16))

    num_chunks = [-(-lengths_list[document] // chunk_size) for document in order]
    num_steps = max(num_chunks, default=0)
    num_active, active = [], num_documents  # num_chunks falls
    for step in range(num_steps):
        while num_chunks[active - 1] <= step:
            active -= 1
        num_active.append(active)

    first_token, num_valid = [], []
    for step, count in enumerate(num_active):
        for document in order[:count]:
            first_token.append(starts_list[document] + step * chunk_size)
            num_valid.append(min(chunk_size, lengths_list[document] - step * chunk_size))
    slots = torch.arange(chunk_size, device=device)
    tokens = torch.tensor(first_token, dtype=torch.int64, device=device)[:, None] + slots
    valid = slots < torch.tensor(num_valid, dtype=torch.int64, device=device)[:, None]
    all_valid = sum(num_valid) == len(num_valid) * chunk_size
    flat_tokens = tokens.reshape(-1)
    if all_valid:
        valid_slots, padded = torch.arange(tokens.numel(), device=device), None
    else:
        valid_slots, padded = valid.reshape(-1).nonzero()[:, 0], (~valid).reshape(-1).nonzero()[:, 0]
        tokens = tokens.masked_fill(~valid, 0)
    slot_of_token = torch.empty(batch_size * length, dtype=torch.int64, device=device)
    slot_of_token[flat_tokens[valid_slots]] = valid_slots
    return ChunkLayout(
        chunk_size, num_active, tokens, padded, slot_of_token, torch.tensor(order, dtype=torch.int64, device=device)
    )


_kept = lru_cache(maxsize=16)(chunk_layout)


def kept_layout(v: Tensor, cu_seqlens: Tensor | None, max_chunk_size: int) -> ChunkLayout:
    """The layout of v's rows or documents, made once for all layers of a step, both ways.

    For real tensors, not for traced ones. Raises ValueError for bounds that are none.
    """
    return _kept(*v.shape[:2], None if cu_seqlens is None else tuple(cu_seqlens.tolist()), max_chunk_size, v.device)
