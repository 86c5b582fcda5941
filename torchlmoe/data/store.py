"""Tokens on disk: memory-mapped shards, the bounds of the documents, and an index that says what is there.

A store is a folder of raw little-endian files:

    index.json         counts, data types, and what the store was made from
    tokens_00000.bin   the documents back to back, each as [end_id, t1 .. tn]; uint16, or uint32 if the
                       vocabulary is over 65,536; shards of `shard_size` tokens that ignore document bounds
    documents.bin      int64 [num_documents + 1], where each document starts, and the end of the last
    token_bytes.bin    uint16 [vocab_size], UTF-8 bytes of each token; only where they are exact for this text
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

SHARD_SIZE = 2**27


@dataclass(frozen=True)
class StoreIndex:
    """The content of index.json.

    recipe: what the store was made from, for people and for the cache.
    content: sha256 of its documents' tokens in their order, the store's identity.
    """

    recipe: dict
    vocab_size: int
    end_id: int
    token_dtype: str
    shard_size: int
    num_tokens: int
    num_documents: int
    text_bytes: int
    has_token_bytes: bool
    content: str


class TokenStore:
    """A finished store, opened for reading; the attributes of StoreIndex are its own.

    token_bytes: uint16 [vocab_size] or None.
    Raises ValueError where a file is missing or does not have the size that the index gives, also while reading.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.index = StoreIndex(**json.loads((folder / "index.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise _damaged(folder / "index.json", "cannot be read") from error
        index = self.index
        self.num_tokens, self.num_documents = index.num_tokens, index.num_documents
        self.vocab_size, self.end_id, self.text_bytes = index.vocab_size, index.end_id, index.text_bytes
        sizes = [
            min(index.shard_size, index.num_tokens - start) for start in range(0, index.num_tokens, index.shard_size)
        ]
        self._shards = [self._map(_shard_name(i), index.token_dtype, size) for i, size in enumerate(sizes)]
        self._document_starts = self._map("documents.bin", "<i8", index.num_documents + 1)
        self.token_bytes = self._map("token_bytes.bin", "<u2", index.vocab_size) if index.has_token_bytes else None

    def _map(self, name: str, dtype: str, size: int) -> np.ndarray:
        self._check(name, size * np.dtype(dtype).itemsize)
        return np.memmap(self.folder / name, dtype=dtype, mode="r", shape=(size,))

    def _check(self, name: str, expected: int) -> None:
        """Also before a mapped file is read again: past the end of one cut short, the kernel would kill the process."""
        path = self.folder / name
        try:
            size = path.stat().st_size
        except OSError:
            raise _damaged(path, "is gone or cannot be read") from None
        if size != expected:
            raise _damaged(path, f"has {size} bytes in place of the {expected} that index.json gives")

    @property
    def document_starts(self) -> np.ndarray:
        """int64 [num_documents + 1]."""
        self._check("documents.bin", self._document_starts.nbytes)
        return self._document_starts

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int64 tokens [start, stop) of the stream, cut off at its end."""
        stop = min(stop, self.num_tokens)
        out = np.empty(max(stop - start, 0), dtype=np.int64)
        position = start
        while position < stop:
            shard, offset = divmod(position, self.index.shard_size)
            self._check(_shard_name(shard), self._shards[shard].nbytes)
            piece = self._shards[shard][offset : offset + stop - position]
            out[position - start : position - start + len(piece)] = piece
            if piece.max() >= self.vocab_size:
                path = self.folder / _shard_name(shard)
                raise _damaged(path, f"holds token {piece.max()}, beyond the vocabulary of {self.vocab_size}")
            position += len(piece)
        return out


class StoreWriter:
    """Builds a store beside `folder`; `finish` moves it there in one step, and nothing is left without it.

    Use it as a context manager, and under a lock where several processes may write the same folder.
    """

    def __init__(self, folder: Path, *, vocab_size: int, end_id: int, recipe: dict, shard_size: int = SHARD_SIZE):
        self.folder = folder
        self.partial = folder.with_name(f"{folder.name}.partial")
        self.vocab_size, self.end_id, self.recipe, self.shard_size = vocab_size, end_id, recipe, shard_size
        self.token_dtype = "<u2" if vocab_size <= 2**16 else "<u4"
        self.num_tokens = self.num_documents = self.text_bytes = 0
        self._digest = hashlib.sha256(f"{self.token_dtype} {vocab_size} {end_id}".encode())
        self._shard: BinaryIO | None = None
        self._documents: BinaryIO | None = None

    def __enter__(self) -> "StoreWriter":
        # What a killed process left behind is of no use to anyone.
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._documents = (self.partial / "documents.bin").open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what a full disk has no room for, and was said already
            self._close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def append(self, ids: list[int] | np.ndarray, text_bytes: int) -> None:
        """Adds one document: its tokens, without an end token, and the length of its text in UTF-8."""
        with _names(self.partial):
            self._append(ids, text_bytes)

    def _append(self, ids: list[int] | np.ndarray, text_bytes: int) -> None:
        assert self._documents is not None
        self._documents.write(np.array([self.num_tokens], dtype="<i8").tobytes())
        tokens = np.array([self.end_id, *ids], dtype=self.token_dtype)
        self._digest.update(np.array([len(tokens)], dtype="<i8").tobytes())
        self._digest.update(tokens.tobytes())
        while len(tokens):
            room = self.shard_size - self.num_tokens % self.shard_size
            if room == self.shard_size:
                if self._shard is not None:
                    self._shard.close()
                self._shard = (self.partial / _shard_name(self.num_tokens // self.shard_size)).open("wb")
            assert self._shard is not None
            self._shard.write(tokens[:room].tobytes())
            self.num_tokens += len(tokens[:room])
            tokens = tokens[room:]
        self.num_documents += 1
        self.text_bytes += text_bytes

    def finish(self, token_bytes: np.ndarray | None = None) -> TokenStore:
        """Completes the store. token_bytes: uint16 [vocab_size], if exact for every document."""
        with _names(self.partial):
            self._finish(token_bytes)
        return TokenStore(self.folder)

    def _finish(self, token_bytes: np.ndarray | None) -> None:
        assert self._documents is not None
        assert self.num_documents > 0
        self._documents.write(np.array([self.num_tokens], dtype="<i8").tobytes())
        self._close()
        if token_bytes is not None:
            (self.partial / "token_bytes.bin").write_bytes(token_bytes.astype("<u2").tobytes())
        index = StoreIndex(
            recipe=self.recipe,
            vocab_size=self.vocab_size,
            end_id=self.end_id,
            token_dtype=self.token_dtype,
            shard_size=self.shard_size,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            text_bytes=self.text_bytes,
            has_token_bytes=token_bytes is not None,
            content=self._digest.hexdigest(),
        )
        (self.partial / "index.json").write_text(json.dumps(asdict(index), indent=2))
        self.partial.rename(self.folder)

    def _close(self) -> None:
        for file in (self._shard, self._documents):
            if file is not None:
                file.close()


def _shard_name(shard: int) -> str:
    return f"tokens_{shard:05d}.bin"


@contextmanager
def _names(folder: Path) -> Iterator[None]:
    """Says where it was that something could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"The tokens could not be written to {folder}: {error.strerror}; make room, or set data.cache_dir to a "
            "folder that has some."
        ) from error


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} {what}: delete the folder {path.parent} and the tokens are built again.")
