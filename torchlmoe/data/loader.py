"""Loads batches of packed rows: for training in the order of `RowOrder`, for validation in the order of the store.

The order does not depend on the number of data-parallel ranks. That number only decides which rows of a step each rank
reads.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from tensordict import TensorDict

from torchlmoe.data.order import RowOrder
from torchlmoe.data.packing import max_documents, num_rows, row
from torchlmoe.data.store import TokenStore


class TrainLoader:
    """Loads the microbatches of any training step; a background thread reads ahead.

    order: the order of the rows.
    local_batch_size: rows in one microbatch of one rank; local_batch_size * world_size must divide global_batch_size.
    rank, world_size: this rank's index among the data-parallel ranks, and their number.
    num_prefetch: steps to read ahead.

    Attribute: `num_microbatches`, the number of microbatches per step.
    """

    def __init__(
        self,
        order: RowOrder,
        *,
        local_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_prefetch: int = 2,
    ):
        assert 0 <= rank < world_size
        assert order.global_batch_size % (local_batch_size * world_size) == 0
        self.order, self.local_batch_size = order, local_batch_size
        self.rank, self.world_size, self.num_prefetch = rank, world_size, num_prefetch
        self.num_microbatches = order.global_batch_size // (local_batch_size * world_size)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="train_loader")
        self._ahead: dict[int, Future[list[TensorDict]]] = {}

    def batches(self, step: int) -> list[TensorDict]:
        """Return the microbatches of step `step`, counted from 0. Errors of the background thread are raised here.

        Each holds tokens, labels int64 [local_batch_size, seq_len] and document_bounds int32
        [local_batch_size, max_docs + 1]; see packing.row.
        """
        steps = range(step, step + self.num_prefetch + 1)
        for other in [ahead for ahead in self._ahead if ahead not in steps]:
            self._ahead.pop(other).cancel()
        for ahead in steps:
            if ahead not in self._ahead:
                self._ahead[ahead] = self._executor.submit(self._read, ahead)
        return self._ahead.pop(step).result()

    def _read(self, step: int) -> list[TensorDict]:
        places_MWB = np.arange(self.order.global_batch_size).reshape(-1, self.world_size, self.local_batch_size)
        of_step, sources = self.order.rows_of_step(step), self.order.sources
        return [
            _microbatch(
                [(sources[of_step.sources[place]].store, int(of_step.rows[place])) for place in places_B],
                self.order.seq_len,
                self.order.max_docs,
            )
            for places_B in places_MWB[:, self.rank]
        ]

    def close(self) -> None:
        """Stop the background thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def validation_batches(
    store: TokenStore,
    *,
    seq_len: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_batches: int | None = None,
) -> Iterator[TensorDict]:
    """Yields this rank's microbatches of the store, with the keys of TrainLoader.batches. Each row occurs once, in
    order.

    Every rank gets the same number of microbatches. After the last row, rows without labels complete them.
    max_batches: maximum number of batches over all ranks, so that the rows do not depend on the number of ranks; None
        for the whole split.
    """
    max_docs = max_documents(store, seq_len)
    rows = num_validation_rows(store, seq_len, batch_size, max_batches)
    for first_of_all in range(0, rows, batch_size * world_size):
        indices = np.arange(batch_size) + first_of_all + rank * batch_size
        indices = np.where(indices < rows, indices, num_rows(store, seq_len))
        yield _microbatch([(store, int(index)) for index in indices], seq_len, max_docs)


def validation_text_bytes(store: TokenStore, *, seq_len: int, batch_size: int, max_batches: int | None = None) -> int:
    """Returns the number of UTF-8 bytes of text in the labels of `validation_batches`, over all ranks.

    Bits per byte is the sum of the labels' negative log-likelihoods, end tokens included, / ln 2 / bytes.
    The result is 0 if the tokens do not represent text. The bytes of a whole split were counted from its text, those of
    a part are counted from its labels. That needs a byte-level tokenizer which keeps the text unchanged; with others a
    part raises ValueError.
    """
    num_labels = num_validation_rows(store, seq_len, batch_size, max_batches) * seq_len
    if num_labels >= store.num_tokens or not store.is_text:
        return store.text_bytes
    if store.token_bytes is None:
        raise ValueError(
            "With this tokenizer the bytes of text in a part of the validation split are unknown: "
            "validate on all of the split, and make it shorter with data.validation_max_tokens."
        )
    # The labels of tokens [0, n) are tokens [1, n + 1).
    counts = np.bincount(store.tokens(1, num_labels + 1), minlength=store.vocab_size)
    return int(counts @ store.token_bytes.astype(np.int64))


def num_validation_rows(store: TokenStore, seq_len: int, batch_size: int, max_batches: int | None = None) -> int:
    """Returns the number of rows with labels in `validation_batches`, over all ranks."""
    available = num_rows(store, seq_len)
    return available if max_batches is None else min(available, max_batches * batch_size)


def _microbatch(places: list[tuple[TokenStore, int]], seq_len: int, max_docs: int) -> TensorDict:
    rows = [row(store, index, seq_len, max_docs) for store, index in places]
    tokens_BL, labels_BL, document_bounds_BN = map(torch.stack, zip(*rows, strict=True))
    return TensorDict(
        {"tokens": tokens_BL, "labels": labels_BL, "document_bounds": document_bounds_BN},
        batch_size=[len(rows)],
    )
