"""Writes token stores: each shard by the process that has its documents, then the index."""

import hashlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from torchlmoe.data.store import Shard, StoreIndex, TokenStore

TOKENS_HASHED_AT_ONCE = 2**24


def token_dtype(vocab_size: int) -> str:
    """NumPy dtype of tokens on disk: uint16, or uint32 if the vocabulary has more than 65,536 tokens."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


class ShardWriter:
    """Writes one shard under a temporary name. `finish` renames it.

    lengths: number of tokens in each document so far, including the end token.
    """

    def __init__(self, path: Path, *, vocab_size: int, end_id: int):
        self.path, self.end_id, self.dtype = path, end_id, token_dtype(vocab_size)
        # A separate name per process: one that still writes after its parent was killed must not write to the same file
        # as its successor.
        self._unfinished = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.unfinished")
        self._file = self._unfinished.open("wb")
        self.lengths: list[int] = []
        self.num_tokens = 0

    def append(self, ids: np.ndarray) -> None:
        """Add one document. ids: its tokens, without an end token."""
        self._file.write(np.concatenate([[self.end_id], ids]).astype(self.dtype).tobytes())
        self.lengths.append(len(ids) + 1)
        self.num_tokens += len(ids) + 1

    def finish(self) -> None:
        """Close the shard and rename it, or remove it if it has no documents."""
        self._file.close()
        if self.lengths:
            self._unfinished.replace(self.path)
        else:
            self.drop()

    def drop(self) -> None:
        """Close the shard and remove it, unless `finish` renamed it."""
        try:
            self._file.close()
        finally:
            self._unfinished.unlink(missing_ok=True)


def publish_store(
    partial: Path,
    folder: Path,
    *,
    shards: list[Shard],
    lengths: Iterable[np.ndarray],
    recipe: dict,
    vocab_size: int,
    end_id: int,
    text_bytes: int,
    token_bytes: np.ndarray | None = None,
) -> TokenStore:
    """Makes a store of the shards in folder `partial`, in their order, and renames the folder to `folder`.

    lengths: int64 for each shard, numbers of tokens of its documents. token_bytes: uint16 [vocab_size], if exact for
    every document. Other files in `partial` are removed.
    """
    dtype = token_dtype(vocab_size)
    digest = hashlib.sha256(f"{dtype} {vocab_size} {end_id}".encode())
    num_tokens = num_documents = 0
    with (partial / "documents.bin").open("wb") as documents:
        for shard, lengths_N in zip(shards, lengths, strict=True):
            starts = num_tokens + np.cumsum(lengths_N) - lengths_N
            documents.write(starts.astype("<i8").tobytes())
            update_digest(digest, partial_reader(partial / shard.file, dtype), lengths_N, dtype)
            num_tokens, num_documents = num_tokens + shard.num_tokens, num_documents + len(lengths_N)
        documents.write(np.array([num_tokens], dtype="<i8").tobytes())
    if token_bytes is not None:
        (partial / "token_bytes.bin").write_bytes(token_bytes.astype("<u2").tobytes())
    index = StoreIndex(
        recipe=recipe,
        vocab_size=vocab_size,
        end_id=end_id,
        num_tokens=num_tokens,
        num_documents=num_documents,
        text_bytes=text_bytes,
        has_token_bytes=token_bytes is not None,
        content=digest.hexdigest(),
        shards=shards,
    )
    (partial / "index.json").write_text(index.to_json())
    names = {"documents.bin", "index.json", *(shard.file for shard in shards)}
    for path in partial.iterdir():  # killed processes may have left files
        if path.name not in (names | {"token_bytes.bin"} if token_bytes is not None else names):
            path.unlink()
    partial.rename(folder)
    return TokenStore(folder)


def partial_reader(path: Path, dtype: str) -> Callable[[int, int], np.ndarray]:
    """Returns a function of (start, stop) that reads these tokens of a shard."""
    tokens = np.memmap(path, dtype=dtype, mode="r")
    return lambda start, stop: np.asarray(tokens[start:stop])


def update_digest(
    digest: "hashlib._Hash", read: Callable[[int, int], np.ndarray], lengths: np.ndarray, dtype: str
) -> None:
    """Adds documents to the digest that identifies a store: for each its length, int64, and its tokens.

    read: returns tokens [start, stop) of these documents as `dtype`; called in order, once for every token.
    lengths: int64, number of tokens in each document.
    """
    stops = np.cumsum(lengths)
    starts = stops - lengths
    first = 0
    while first < len(lengths):  # documents of up to TOKENS_HASHED_AT_ONCE tokens at a time, to bound memory
        last = int(np.searchsorted(stops, starts[first] + TOKENS_HASHED_AT_ONCE, side="right"))
        if last == first:
            digest.update(np.array([lengths[first]], dtype="<i8").tobytes())
            for start in range(starts[first], stops[first], TOKENS_HASHED_AT_ONCE):
                digest.update(read(start, min(start + TOKENS_HASHED_AT_ONCE, int(stops[first]))).tobytes())
            first += 1
            continue
        content = read(int(starts[first]), int(stops[last - 1])).view(np.uint8)
        # Inserts each document's length before the bytes of its first token.
        places = np.repeat((starts[first:last] - starts[first]) * np.dtype(dtype).itemsize, 8)
        digest.update(np.insert(content, places, lengths[first:last].astype("<i8").view(np.uint8)).tobytes())
        first = last


@contextmanager
def failures_named(folder: Path) -> Iterator[None]:
    """Adds the folder and the remedy to errors of writing, within the context."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # an error of this package, which names the remedy
            raise
        raise OSError(
            f"The tokens could not be written to {folder}: {error.strerror}; make room, or set data.cache_dir to a "
            "folder that has some."
        ) from error
