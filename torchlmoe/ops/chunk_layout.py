"""Places of tokens when documents are cut into chunks.

Every document is cut into chunks of C tokens, its last one padded. Chunks are ordered by their place in the document
first and documents from the longest to the shortest, so that the documents which still have a j-th chunk are always
the first `num_active[j]` ones and the j-th chunks are one contiguous slice: the scan over chunks runs over slices,
in parallel over documents, and no padding beyond a document's last chunk is computed.

    three documents of 5, 1 and 3 chunks  ->  | a0 c0 b0 | a1 c1 | a2 c2 | a3 | a4 |      num_active = [3, 2, 2, 1, 1]

A slab is a run of such slices that is computed at once; its chunks are few enough to stay in a cache.

Documents much shorter than a chunk would be mostly padding: `chunk_layouts` lays them out in shorter chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from torchlmoe.ops.checks import check_bounds

MOST_SLOTS_PER_TOKEN = 4  # of chunks, padding included


@dataclass(frozen=True)
class Slab:
    """Consecutive slices of chunks. Legend: M chunks of this slab, C tokens per chunk, H heads of the chunks."""

    num_active: list[int]  # documents that take part in each step of the scan
    tokens_MC: Tensor  # int64: the token at each slot (0 at padded ones)
    padded_MC: Tensor | None  # bool; None without padding
    steps: slice | None  # if documents are equal whole chunks, the slab's place in each; then no indices are needed
    indices: dict[str, Tensor] = field(default_factory=dict)  # made once, for every layer

    def cut_into(self, x: Tensor, out: Tensor) -> Tensor:
        """x [B, T, Hx, ...] -> out [M * num_heads, C, ...], in its dtype, zero where padded; returns out.

        Head j reads head j // (num_heads / Hx) of x.
        """
        num_heads = out.shape[0] // self.tokens_MC.shape[0]
        if self.steps is not None:
            chunks = self._view(x, self.steps)
            out.unflatten(0, (*chunks.shape[:3], -1)).copy_(chunks.unsqueeze(3))
            return out
        rows = x.reshape(-1, *x.shape[3:]).index_select(0, self._rows(x.shape[2], num_heads // x.shape[2]))
        if self.padded_MC is not None:
            rows.index_fill_(0, self._slots(num_heads, padded=True), 0)
        return out.copy_(rows.view(out.shape))

    def paste(self, x: Tensor, out: Tensor) -> None:
        """Writes x [M * H, C, ...] to its places in out [B, T, Hx, ...]; heads that share one are summed."""
        num_heads = out.shape[2]
        if (repeat := x.shape[0] // self.tokens_MC.shape[0] // num_heads) > 1:
            x = x.unflatten(0, (-1, repeat)).sum(1)
        if self.steps is not None:
            view = self._view(out, self.steps)
            view.copy_(x.view(view.shape))
            return
        rows, places = x.flatten(0, 1).to(out.dtype), self._rows(num_heads, 1)
        if self.padded_MC is not None:
            valid = self._slots(num_heads, padded=False)
            rows, places = rows.index_select(0, valid), places.index_select(0, valid)
        out.view(-1, *out.shape[3:]).index_copy_(0, places, rows)

    def _view(self, x: Tensor, steps: slice) -> Tensor:
        """[B, T, H, ...] -> [steps, documents, H, C, ...]"""
        documents = x if x.shape[0] > 1 else x[0].unflatten(0, (self.num_active[0], -1))
        return documents.unflatten(1, (-1, self.tokens_MC.shape[1]))[:, steps].transpose(0, 1).transpose(2, 3)

    def _rows(self, num_heads: int, repeat: int) -> Tensor:
        """The rows of [B * T * num_heads] that the slots of repeat * num_heads heads hold."""
        if (key := f"rows {num_heads} {repeat}") not in self.indices:
            heads = torch.arange(num_heads, device=self.tokens_MC.device).repeat_interleave(repeat)
            self.indices[key] = (self.tokens_MC[:, None, :] * num_heads + heads[:, None]).flatten()
        return self.indices[key]

    def _slots(self, num_heads: int, padded: bool) -> Tensor:
        """The indices of padded slots, or of the others, counted over [M, num_heads, C]."""
        if (key := f"slots {num_heads} {padded}") not in self.indices:
            assert self.padded_MC is not None
            chosen_MC = self.padded_MC if padded else ~self.padded_MC
            self.indices[key] = chosen_MC[:, None].expand(-1, num_heads, -1).flatten().nonzero()[:, 0]
        return self.indices[key]


@dataclass(frozen=True)
class ChunkLayout:
    """Legend: N documents (empty ones included)."""

    slabs: list[Slab]
    order_N: Tensor  # int64: documents from the longest to the shortest


def restore_order(layouts: Sequence[ChunkLayout], x_N: Tensor) -> Tensor:
    """From the order of the layouts, one after another, to that in which the documents came."""
    order_N = layouts[0].order_N if len(layouts) == 1 else torch.cat([layout.order_N for layout in layouts])
    return torch.empty_like(x_N).index_copy(0, order_N, x_N)


@dataclass(frozen=True)
class Plan:
    """A layout in numbers, without tensors."""

    order: list[int]  # documents from the longest to the shortest
    starts: list[int]  # of every document
    lengths: list[int]
    chunk_size: int
    num_active: list[list[int]]  # by slab

    @property
    def num_first(self) -> int:
        """Number of documents at the start of the slabs, summed over all slabs."""
        return sum(active[0] for active in self.num_active)

    @property
    def num_slots(self) -> int:
        return self.chunk_size * sum(map(sum, self.num_active))


def chunk_plan(
    batch_size: int,
    length: int,
    bounds: Sequence[int] | None,
    max_chunk_size: int,
    slab_size: int,
    documents: Sequence[int] | None = None,
) -> Plan:
    """Plan the layout of `batch_size` rows of `length` tokens, or of the documents with `bounds` in one row.

    A slab has about `slab_size` chunks; it consists of whole slices.
    documents: the documents to lay out, by their place in `bounds`; all unless given.
    """
    if bounds is None:
        starts, lengths = [row * length for row in range(batch_size)], [length] * batch_size
    else:
        check_bounds(bounds, length)
        starts, lengths = list(bounds[:-1]), [end - start for start, end in pairwise(bounds)]
    order = sorted(range(len(starts)) if documents is None else documents, key=lambda document: -lengths[document])
    longest = lengths[order[0]] if order else 0
    # Short documents take one short chunk. Decay per channel halves chunks, so sizes are powers of two.
    chunk_size = min(max_chunk_size, 1 << max(0, longest - 1).bit_length())

    num_chunks = [-(-lengths[document] // chunk_size) for document in order]
    num_steps = max(num_chunks, default=0)
    num_active, active = [], len(order)  # num_chunks falls
    for step in range(num_steps):
        while num_chunks[active - 1] <= step:
            active -= 1
        num_active.append(active)
    slabs, step = [], 0
    while step < num_steps:
        num_slices = max(1, slab_size // num_active[step])
        slabs.append(num_active[step : step + num_slices])
        step += num_slices
    return Plan(order, starts, lengths, chunk_size, slabs)


def chunk_plans(
    batch_size: int, length: int, bounds: Sequence[int] | None, max_chunk_size: int, slab_size: int
) -> list[Plan]:
    """`chunk_plan` of all documents, or of documents by length if that has more than MOST_SLOTS_PER_TOKEN."""
    shape = (batch_size, length, bounds, max_chunk_size, slab_size)
    whole = chunk_plan(*shape)
    if whole.num_slots <= MOST_SLOTS_PER_TOKEN * batch_size * length:
        return [whole]
    limits = (max_chunk_size // 16, max_chunk_size // 4)
    groups: dict[int, list[int]] = {}
    for document in whole.order:
        group = sum(whole.lengths[document] > limit for limit in limits)
        groups.setdefault(group, []).append(document)
    return [chunk_plan(*shape, documents=documents) for documents in groups.values()]


def layout_of(plan: Plan, device: torch.device) -> ChunkLayout:
    """The plan's layout on a device."""
    slots = torch.arange(plan.chunk_size, device=device)
    slabs, start = [], 0
    are_equal = len({*plan.lengths}) == 1 and plan.lengths[0] % plan.chunk_size == 0
    for num_active in plan.num_active:
        steps = range(start, start + len(num_active))
        places = [(document, step) for step in steps for document in plan.order[: num_active[step - start]]]
        first_token = [plan.starts[document] + step * plan.chunk_size for document, step in places]
        num_valid = [plan.lengths[document] - step * plan.chunk_size for document, step in places]
        tokens = torch.tensor(first_token, dtype=torch.int64, device=device)[:, None] + slots
        padded = None
        if min(num_valid) < plan.chunk_size:
            padded = slots >= torch.tensor(num_valid, dtype=torch.int64, device=device)[:, None]
            tokens = tokens.masked_fill(padded, 0)
        slabs.append(Slab(num_active, tokens, padded, slice(steps.start, steps.stop) if are_equal else None))
        start = steps.stop
    return ChunkLayout(slabs, torch.tensor(plan.order, dtype=torch.int64, device=device))


# Made once for the forward and backward of all layers of a step, even if each layer packs its tokens differently.
@lru_cache(maxsize=64)
def chunk_layouts(
    batch_size, length, bounds, max_chunk_size: int, slab_size: int, device: torch.device
) -> tuple[ChunkLayout, ...]:
    """Arguments are the same as those of `chunk_plans`."""
    return tuple(layout_of(x, device) for x in chunk_plans(batch_size, length, bounds, max_chunk_size, slab_size))
