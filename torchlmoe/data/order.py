"""Computes the rows of each training step, from one source of data or a mixture, by the seed and the step alone.

Only the step must be saved: row `step * global_batch_size + i` of the run is computed by arithmetic. The rows of a
mixture are assigned to the sources in turn, so that each source has its share of any number of rows to within one row.
Each source has separate epochs. The shuffle of an epoch is a permutation that is computed for each place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torchlmoe.data.packing import max_documents, num_rows
from torchlmoe.data.shuffle import permuted, place_of
from torchlmoe.data.store import TokenStore

# Shares are multiples of 1 / UNIT, so that counts are exact for any number of rows.
UNIT = 2**40


@dataclass(frozen=True)
class Source:
    """A store to train on, and the weight of its rows among those of all sources. name: for logs."""

    store: TokenStore
    weight: float = 1.0
    name: str = "data"


class StepRows(NamedTuple):
    """The rows of a step, int64 [global_batch_size]. sources: index of each row's source. rows: its number there."""

    sources: np.ndarray
    rows: np.ndarray


class RowOrder:
    """The order of the rows of one or several sources.

    seq_len: tokens in a row. global_batch_size: rows in one optimizer step. seed: of the shuffle.
    Attributes: `sources`, without those of weight 0; `num_rows`, of each source in an epoch; `num_tokens`, of all
    sources; `max_docs`, the maximum number of documents in a row.
    Raises ValueError if a store is shorter than a row, and for weights that are negative or all zero.
    """

    def __init__(self, sources: Sequence[Source], *, seq_len: int, global_batch_size: int, seed: int = 0):
        check_weights([source.weight for source in sources])
        self.sources = [source for source in sources if source.weight > 0]
        for source in self.sources:
            if source.store.num_tokens < seq_len:
                name = "the training data" if len(self.sources) == 1 else f"the data of {source.name!r} in data.mixture"
                raise ValueError(
                    f"training.seq_len = {seq_len} is longer than {name}, {source.store.num_tokens} tokens: choose a "
                    "shorter one or give more data."
                )
        self.seq_len, self.global_batch_size, self.seed = seq_len, global_batch_size, seed
        self.num_rows = [num_rows(source.store, seq_len) for source in self.sources]
        self.num_tokens = sum(source.store.num_tokens for source in self.sources)
        self.max_docs = max(max_documents(source.store, seq_len) for source in self.sources)
        weights = np.array([source.weight for source in self.sources])
        rests = np.cumsum(weights[::-1])[::-1]  # sums of the weights of each source and all later ones
        self._shares = [round(UNIT * weight / rest) for weight, rest in zip(weights, rests, strict=True)]

    def rows_of_step(self, step: int) -> StepRows:
        """Return the rows of a step over all ranks: by microbatch, then by rank."""
        count = self.global_batch_size
        sources, rows = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        for source, places, positions in self._dealt(step * count, count):
            sources[places], rows[places] = source, self._shuffled(source, positions)
        if len(self.sources) > 1:
            # Assigned in turn, rows of one source would always go to the same rank. A shuffle within the step prevents
            # it.
            places = permuted(np.arange(count), count, (self.seed, step, len(self.sources)))
            sources, rows = sources[places], rows[places]
        return StepRows(sources, rows)

    def rows_of_sources(self, num_rows: int) -> list[int]:
        """Return the number of rows of each source among the run's first `num_rows` rows."""
        counts = []
        for share in self._shares:
            counts.append(_dealt_before(num_rows, share))
            num_rows -= counts[-1]
        return counts

    def tokens_of_sources(self, num_steps: int) -> list[int]:
        """Return the tokens of each source in the first `num_steps` steps, without padding."""
        counts = self.rows_of_sources(num_steps * self.global_batch_size)
        return [self._tokens(source, count) for source, count in enumerate(counts)]

    def tokens_of_steps(self, num_steps: int) -> int:
        """Return the tokens in the first `num_steps` steps, over all ranks, without padding."""
        return sum(self.tokens_of_sources(num_steps))

    def figures(self, num_steps: int) -> dict[str, float]:
        """Return for each source of a mixture its share of the first `num_steps` steps' rows, and its epochs.

        Empty for a single source.
        """
        rows, tokens = self.rows_of_sources(num_steps * self.global_batch_size), self.tokens_of_sources(num_steps)
        figures = {}
        for source, count, seen in zip(self.sources, rows, tokens, strict=True):
            figures[f"data/{source.name}/share"] = count / max(sum(rows), 1)
            figures[f"data/{source.name}/epochs"] = seen / source.store.num_tokens
        return figures if len(self.sources) > 1 else {}

    def _dealt(self, first: int, count: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield for each source its places among rows [first, first + count) of the run, and its own row numbers.

        The first source takes its share of all rows, the next its share of the remaining ones, and so on.
        """
        places = np.arange(count)
        for source, share in enumerate(self._shares):
            before = _dealt_before(first, share)
            if share == UNIT:
                yield source, places, before + np.arange(len(places))
                return
            # The fraction of a row that earlier rows left over, in units.
            remainder = first * share - before * UNIT
            whole = (remainder + np.arange(len(places) + 1) * share + UNIT // 2) // UNIT
            is_own = np.diff(whole).astype(bool)
            yield source, places[is_own], before + np.arange(is_own.sum())
            places, first = places[~is_own], first - before

    def _shuffled(self, source: int, positions: np.ndarray) -> np.ndarray:
        """The rows of a source's store at some positions of its sequence of epochs."""
        size = self.num_rows[source]
        out = np.empty_like(positions)
        for epoch in np.unique(positions // size):
            of_epoch = positions // size == epoch
            out[of_epoch] = permuted(positions[of_epoch] % size, size, self._key(source, int(epoch)))
        return out

    def _key(self, source: int, epoch: int) -> tuple[int, ...]:
        return (self.seed, epoch) if source == 0 else (self.seed, epoch, source)

    def _tokens(self, source: int, count: int) -> int:
        rows, num_tokens = self.num_rows[source], self.sources[source].store.num_tokens
        epochs, places = divmod(count, rows)
        filling = rows * self.seq_len - num_tokens
        has_last = filling > 0 and place_of(rows - 1, rows, self._key(source, epochs)) < places
        return epochs * num_tokens + places * self.seq_len - has_last * filling


def check_weights(weights: Sequence[float]) -> None:
    """Raises ValueError for weights that are negative or all zero."""
    for weight in weights:
        if weight < 0:
            raise ValueError(f"data.mixture has a source with weight = {weight}: weights are 0 or more.")
    if not any(weights):
        raise ValueError("data.mixture has only sources with weight = 0: give at least one of them a larger weight.")


def _dealt_before(num_rows: int, share: int) -> int:
    """Number of rows that a source with this share takes of the first `num_rows`."""
    return (num_rows * share + UNIT // 2) // UNIT
