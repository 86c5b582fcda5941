"""Reads token stores: memory-mapped shards of tokens, the bounds of documents, and an index.

A store is a folder of raw little-endian files:

    index.json          counts, the shards, and the recipe of the store
    tokens_00000.bin    a shard: consecutive documents, each as [end_id, t1 .. tn]; uint16, or uint32 if the vocabulary
                        is over 65,536
    documents.bin       int64 [num_documents + 1], the start of each document, and the end of the last
    token_bytes.bin     uint16 [vocab_size], UTF-8 bytes of each token; only if they are exact for this text

Shards may be outside the folder: token files of other programs are not copied. Their documents end with `end_id`, or
have no end token (StoreIndex.end_tokens). Readers always see the same stream of [end_id, t1 .. tn].
"""

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

MOST_OPEN_SHARDS = 256  # open at the same time, since each takes a file descriptor, whose number is limited


@dataclass(frozen=True)
class Shard:
    """A file of tokens.

    file: its name in the store's folder, or the absolute path of a file elsewhere. offset: bytes before the tokens.
    """

    file: str
    num_tokens: int
    dtype: str
    offset: int = 0


@dataclass(frozen=True)
class StoreIndex:
    """The content of index.json.

    recipe: the data, tokenizer and options of which the store was made; the cache compares it.
    content: identity of the store, a sha256 of its documents in order.
    text_bytes: UTF-8 bytes of its text. has_token_bytes: whether token_bytes.bin exists.
    end_tokens: whether documents in the shards begin with the end token, end with it, or have none.
    token_dtype, shard_size: only in stores of version 0.1, whose shards have shard_size tokens, except for the last.
    """

    recipe: dict
    vocab_size: int
    end_id: int
    num_tokens: int
    num_documents: int
    text_bytes: int
    has_token_bytes: bool
    content: str
    shards: list[Shard] | None = None
    end_tokens: Literal["first", "last", "none"] = "first"
    token_dtype: str | None = None
    shard_size: int | None = None

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "StoreIndex":
        """Raises ValueError, TypeError or KeyError if the text is not a valid index."""
        fields: dict[str, Any] = json.loads(text)
        if "shards" in fields:
            fields["shards"] = [Shard(**shard) for shard in fields["shards"]]
        else:
            num_tokens, size, dtype = fields["num_tokens"], fields["shard_size"], fields["token_dtype"]
            fields["shards"] = [
                Shard(f"tokens_{number:05d}.bin", min(size, num_tokens - start), dtype)
                for number, start in enumerate(range(0, num_tokens, size))
            ]
        return cls(**fields)


class TokenStore:
    """A finished store, opened for reading.

    index: its StoreIndex. token_bytes: uint16 [vocab_size] or None. is_text: whether the tokens represent text, whose
    bits per byte can be computed. Raises ValueError, also while reading, if a file is missing or does not have the size
    that the index gives.
    """

    is_text = True

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.index = StoreIndex.from_json((folder / "index.json").read_text())
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self._damaged(folder / "index.json", "cannot be read") from error
        index = self.index
        self.num_tokens, self.num_documents = index.num_tokens, index.num_documents
        self.vocab_size, self.end_id, self.text_bytes = index.vocab_size, index.end_id, index.text_bytes
        self._shards = index.shards or []
        self._first_tokens = list(accumulate((shard.num_tokens for shard in self._shards), initial=0))
        for shard in self._shards:
            self._check(folder / shard.file, shard.offset + shard.num_tokens * np.dtype(shard.dtype).itemsize)
        self._open_shard = lru_cache(MOST_OPEN_SHARDS)(self._map_shard)
        self._document_starts = self._map("documents.bin", "<i8", index.num_documents + 1)
        self.token_bytes = self._map("token_bytes.bin", "<u2", index.vocab_size) if index.has_token_bytes else None

    def _map(self, name: str, dtype: str, size: int, offset: int = 0) -> np.ndarray:
        path = self.folder / name
        self._check(path, offset + size * np.dtype(dtype).itemsize)
        return np.memmap(path, dtype=dtype, mode="r", shape=(size,), offset=offset)

    def _map_shard(self, number: int) -> np.ndarray:
        shard = self._shards[number]
        return self._map(shard.file, shard.dtype, shard.num_tokens, shard.offset)

    def _check(self, path: Path, expected: int) -> None:
        """Check a file's size before each read: the kernel kills a process that reads past the end of a mapped file."""
        try:
            size = path.stat().st_size
        except OSError:
            raise self._damaged(path, "is missing or cannot be read") from None
        if size != expected:
            raise self._damaged(path, f"has {size} bytes in place of the {expected} that index.json gives")

    @property
    def document_starts(self) -> np.ndarray:
        """int64 [num_documents + 1]: position of each document's first token, and the number of tokens."""
        self._check(self.folder / "documents.bin", self._document_starts.nbytes)
        return self._document_starts

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, int64; fewer at its end."""
        stop = min(stop, self.num_tokens)
        if stop <= start:
            return np.empty(0, dtype=np.int64)
        if self.index.end_tokens == "first":
            return self._stored(start, stop)
        if self.index.end_tokens == "last":  # each end token stands where the next document starts
            stored = self._stored(max(start - 1, 0), stop - 1)
            return stored if start else np.concatenate([[self.end_id], stored])
        starts = self.document_starts
        first, last = np.searchsorted(starts, [start, stop])
        inside = starts[first:last] - start
        return np.insert(self._stored(start - first, stop - last), inside - np.arange(len(inside)), self.end_id)

    def own_labels(self, start: int, stop: int) -> np.ndarray | None:
        """Labels of tokens [start, stop), int64; fewer at the end. None if they are the next tokens, as in text."""
        return None

    def _stored(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the shards, int64."""
        out = np.empty(stop - start, dtype=np.int64)
        position = int(start)
        while position < stop:
            number = bisect_right(self._first_tokens, position) - 1
            shard, offset = self._shards[number], position - self._first_tokens[number]
            path = self.folder / shard.file
            self._check(path, shard.offset + shard.num_tokens * np.dtype(shard.dtype).itemsize)
            piece = self._open_shard(number)[offset : offset + stop - position]
            out[position - start : position - start + len(piece)] = piece
            if piece.max() >= self.vocab_size:
                raise self._damaged(path, f"holds token {piece.max()}, beyond the vocabulary of {self.vocab_size}")
            position += len(piece)
        return out

    def _damaged(self, path: Path, problem: str) -> ValueError:
        if path.parent != self.folder:
            return ValueError(f"{path} {problem}: give the file from which the folder {self.folder} was made.")
        return ValueError(f"{path} {problem}: delete the folder {path.parent} and the tokens are built again.")
