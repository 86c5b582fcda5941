"""Chunk layouts for scans over steps: one layout for all documents, with slabs of a fixed number of steps."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from torchlmoe.ops.chunk_layout import ChunkLayout, chunk_plan, layout_of


def chunk_layout(batch_size, length, bounds, max_chunk_size: int, slab_size: int, device: torch.device) -> ChunkLayout:
    """Arguments are the same as those of `chunk_plan`."""
    return layout_of(chunk_plan(batch_size, length, bounds, max_chunk_size, slab_size), device)


# Made once for the forward and backward of all layers of a step.
kept_chunk_layout = lru_cache(maxsize=64)(chunk_layout)


def kept_scan_layout(v: Tensor, cu_seqlens: Tensor | None, chunk_size: int, slab_steps: int) -> ChunkLayout:
    """Return the layout of v's rows or documents, with slabs of about `slab_steps` chunks per document.

    For real tensors, not for traced ones. Raises ValueError for invalid bounds.
    """
    bounds = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    return kept_chunk_layout(*_scan_key(v, bounds, chunk_size, slab_steps), v.device)


def num_scan_starts(v: Tensor, bounds: Sequence[int] | None, chunk_size: int, slab_steps: int) -> int:
    """Number of states at the start of that layout's slabs; v may be without values."""
    return chunk_plan(*_scan_key(v, bounds, chunk_size, slab_steps)).num_first


def _scan_key(v: Tensor, bounds: Sequence[int] | None, chunk_size: int, slab_steps: int) -> tuple:
    batch_size, length = v.shape[:2]
    longest = length
    if bounds is not None:
        longest = max((end - start for start, end in pairwise(bounds)), default=0)
    abreast = -(-batch_size * length // max(1, longest))
    return batch_size, length, bounds, chunk_size, slab_steps * max(1, abreast)
