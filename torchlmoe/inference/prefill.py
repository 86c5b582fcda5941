"""Reads prompts into a cache: shared prefixes once, the rest in groups of equal length.

There is no padding, since it would enter the recurrent states. The prompts form a tree, whose nodes are runs of tokens
that the same prompts share. Runs of equal depth and length are read together, each from its parent's state.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from torchlmoe.inference.cache import copy_rows, new_cache, read
from torchlmoe.model.decoder import Decoder

MIN_SHARED = 32  # minimum number of tokens in a shared run, since each run costs a call


@dataclass
class Run:
    """A node of the tree: tokens [start, end) of prompt number `prompt`, and of all others below the node.

    ending: numbers of the prompts that end with this run. parts: the runs that follow it.
    """

    prompt: int
    start: int
    end: int
    ending: list[int]
    parts: list["Run"]


def read_prompts(model: Decoder, prompts: Sequence[Sequence[int]], max_length: int) -> tuple[TensorDict, Tensor]:
    """Returns a cache with one row per prompt, as from `new_cache`, and the logits [prompts, V] of each last token."""
    cache = new_cache(model, len(prompts), max_length)
    device = model.embedding.weight.device
    logits: dict[int, Tensor] = {}

    def read_runs(runs: list[Run], rows: TensorDict, parents: list[int]) -> None:
        """parents: for each run, the row of `rows` that it continues."""

        def length(pair: tuple[Run, int]) -> int:
            return pair[0].end - pair[0].start

        for _, group in groupby(sorted(zip(runs, parents, strict=True), key=length), key=length):
            batch, parent_rows = map(list, zip(*group, strict=True))
            batch_cache = new_cache(model, len(batch), max(run.end for run in batch))
            copy_rows(rows, parent_rows, batch_cache, range(len(batch)))
            tokens = torch.tensor([list(prompts[run.prompt][run.start : run.end]) for run in batch], device=device)
            last = read(model, batch_cache, tokens)
            ending = {prompt: row for row, run in enumerate(batch) for prompt in run.ending}
            copy_rows(batch_cache, list(ending.values()), cache, list(ending))
            logits.update((prompt, last[row]) for prompt, row in ending.items())
            parts = [(part, row) for row, run in enumerate(batch) for part in run.parts]
            if parts:
                read_runs([part for part, _ in parts], batch_cache, [row for _, row in parts])

    runs = shared_runs(prompts)
    read_runs(runs, new_cache(model, 1, 0), [0] * len(runs))
    return cache, torch.stack([logits[index] for index in range(len(prompts))])


def shared_runs(prompts: Sequence[Sequence[int]]) -> list[Run]:
    """Returns the roots of the tree. Prompts share a run if they have at least MIN_SHARED tokens of it in common."""
    order = sorted(range(len(prompts)), key=lambda index: list(prompts[index]))
    arrays = [np.array(prompts[index], dtype=np.int64) for index in order]
    common = [_common(a, b) for a, b in pairwise(arrays)]  # number of tokens that each shares with the next

    def runs(first: int, end: int, start: int) -> Iterator[Run]:
        while first < end:
            shared = stop = len(arrays[first])
            count = 1
            for other in range(first + 1, end):
                shared = min(shared, common[other - 1])
                if shared - start < MIN_SHARED:
                    break
                count, stop = other - first + 1, shared
            ending = sum(len(array) == stop for array in arrays[first : first + count])  # these sort first
            parts = list(runs(first + ending, first + count, stop))
            yield Run(order[first], start, stop, order[first : first + ending], parts)
            first += count

    return list(runs(0, len(order), 0))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two prompts."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
