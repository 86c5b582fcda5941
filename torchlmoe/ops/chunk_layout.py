"""Where each token goes when documents are cut into chunks.

Every document is cut into chunks of C tokens, its last one padded. Chunks are ordered by their place in the document
first and documents from the longest to the shortest, so that the documents which still have a j-th chunk are always
the first `num_active[j]` ones and the j-th chunks are one contiguous slice: the scan over chunks runs over slices,
in parallel over documents, and no token is computed that belongs to padding beyond a document's last chunk.

    three documents of 5, 1 and 3 chunks  ->  | a0 c0 b0 | a1 c1 | a2 c2 | a3 | a4 |      num_active = [3, 2, 2, 1, 1]

A slab is a run of such slices: what is computed at a time, few enough chunks to stay in a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slab:
    """Consecutive slices of chunks. Legend: M chunks of this slab, C tokens a chunk, H heads of the chunks."""

    num_active: list[int]  # documents that take part in each step of the scan
    tokens_MC: Tensor  # int64: the token at each slot (0 at padded ones)
    padded: tuple[Tensor, Tensor] | None  # int64: chunks and slots of padding; None where there is none
    num_tokens: int  # of all slabs
    indices: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # made once, for every layer

    def cut(self, x: Tensor, num_heads: int) -> Tensor:
        """[B, T, Hx, ...] -> [M * num_heads, C, ...], zero where padded; head j reads head j // (num_heads / Hx)."""
        rows = x.reshape(-1, *x.shape[3:]).index_select(0, self._rows(x.shape[2], num_heads))
        rows = rows.view(-1, num_heads, self.tokens_MC.shape[1], *x.shape[3:])
        if self.padded is not None:
            chunk, slot = self.padded
            rows = rows.index_put((chunk, torch.arange(num_heads, device=x.device), slot), rows.new_zeros(()))
        return rows.flatten(0, 1)

    def paste(self, x: Tensor, rows: Tensor, num_heads: int) -> None:
        """Writes x [M * num_heads, C, ...] to its places in `rows` (of `empty_rows`), heads that share one summed."""
        target_heads = (rows.shape[0] - 1) // self.num_tokens
        if target_heads != num_heads:
            x = x.unflatten(0, (-1, target_heads, num_heads // target_heads)).sum(2).flatten(0, 1)
        places = self._rows(target_heads, target_heads)
        if self.padded is not None:
            chunk, slot = self.padded
            places = places.view(-1, target_heads, x.shape[1]).clone()
            places[chunk, torch.arange(target_heads, device=x.device), slot] = rows.shape[0] - 1
        rows.index_copy_(0, places.flatten(), x.flatten(0, 1).to(rows.dtype))

    def _rows(self, num_source_heads: int, num_heads: int) -> Tensor:
        key = (num_source_heads, num_heads)
        if key not in self.indices:
            heads = torch.arange(num_heads, device=self.tokens_MC.device) // (num_heads // num_source_heads)
            rows = self.tokens_MC[:, None, :] * num_source_heads + heads[None, :, None]
            self.indices[key] = rows.reshape(-1)
        return self.indices[key]


@dataclass(frozen=True)
class ChunkLayout:
    """Legend: T tokens in all (batch times length), N documents (empty ones included)."""

    chunk_size: int
    slabs: list[Slab]
    order_N: Tensor  # int64: documents from the longest to the shortest

    def restore_order(self, x_N: Tensor) -> Tensor:
        """From the longest document first to the order in which they came."""
        return torch.empty_like(x_N).index_copy(0, self.order_N, x_N)


def empty_rows(like: Tensor) -> Tensor:
    """For `Slab.paste`: [B * T * H + 1, ...]; padding goes to the last row."""
    return like.new_empty(like.shape[:3].numel() + 1, *like.shape[3:])


def chunk_layout(
    batch_size: int,
    length: int,
    bounds: Sequence[int] | None,
    max_chunk_size: int,
    slab_size: int,
    device: torch.device,
) -> ChunkLayout:
    """The layout of `batch_size` rows of `length` tokens, or of the documents that `bounds` bounds in one row.

    A slab has about `slab_size` chunks; the slices of which it is made are not cut.
    """
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
    # Short documents take one short chunk. Decay per channel halves chunks, so they are powers of two.
    chunk_size = min(max_chunk_size, 1 << max(0, longest - 1).bit_length())

    num_chunks = [-(-lengths_list[document] // chunk_size) for document in order]
    num_steps = max(num_chunks, default=0)
    num_active = [sum(count > step for count in num_chunks) for step in range(num_steps)]

    slabs = []
    step = 0
    while step < num_steps:
        steps = range(step, min(num_steps, step + max(1, slab_size // num_active[step])))
        places = [(document, index) for index in steps for document in order[: num_active[index]]]
        first_token = [starts_list[document] + index * chunk_size for document, index in places]
        num_valid = [lengths_list[document] - index * chunk_size for document, index in places]
        slots = torch.arange(chunk_size, device=device)
        tokens = torch.tensor(first_token, dtype=torch.int64, device=device)[:, None] + slots
        padded = None
        if min(num_valid) < chunk_size:
            invalid = slots >= torch.tensor(num_valid, dtype=torch.int64, device=device)[:, None]
            chunk, slot = invalid.nonzero().unbind(1)
            padded, tokens = (chunk[:, None], slot[:, None]), tokens.masked_fill(invalid, 0)
        slabs.append(Slab([num_active[index] for index in steps], tokens, padded, batch_size * length))
        step = steps.stop
    return ChunkLayout(chunk_size, slabs, torch.tensor(order, dtype=torch.int64, device=device))
