"""Records the finished parts of a store that is being built, so that any process can continue with the rest.

Beside a store's folder are `<folder>.partial`, with the shards, and `<folder>.parts`, with facts about them. A piece of
the corpus becomes one shard, or several if it is long. The `.json` of a shard is written last, and marks it as valid.
The finished store contains none of these files.
"""

import json
import os
import shutil
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from torchlmoe.data.store import Shard
from torchlmoe.data.store_writer import ShardWriter


@dataclass(frozen=True)
class ShardFacts:
    """Facts about one finished shard.

    num_read: documents of the piece that were read for it, including those that were left out.
    has_token_bytes: whether the table of bytes per token is exact for its text.
    is_last: whether it is the last shard of its piece. dropped: examples of characters without a token.
    """

    num_tokens: int
    num_documents: int
    text_bytes: int
    num_read: int
    has_token_bytes: bool
    is_last: bool
    dropped: list[str] = field(default_factory=list)


class Parts:
    """The finished shards of the store that will be at `folder`."""

    def __init__(self, folder: Path):
        self.partial = folder.with_name(f"{folder.name}.partial")
        self.folder = folder.with_name(f"{folder.name}.parts")
        self._complete: dict[int, list[ShardFacts]] = {}  # facts of complete pieces, which do not change

    def create(self) -> None:
        """Create the folders."""
        for folder in (self.partial, self.folder):
            folder.mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """Delete the folders."""
        for folder in (self.folder, self.partial):
            shutil.rmtree(folder, ignore_errors=True)

    def of_piece(self, piece: int) -> list[ShardFacts]:
        """The finished shards of a piece, in order."""
        if piece in self._complete:
            return self._complete[piece]
        facts: list[ShardFacts] = []
        while (path := self.folder / f"{_name(piece, len(facts))}.json").exists():
            facts.append(ShardFacts(**json.loads(path.read_text())))
        if facts and facts[-1].is_last:
            self._complete[piece] = facts
        return facts

    def is_done(self, piece: int) -> bool:
        """Whether all shards of a piece are finished."""
        shards = self.of_piece(piece)
        return bool(shards) and shards[-1].is_last

    def tokens_of(self, piece: int) -> int:
        """Number of tokens in the finished shards of a piece."""
        return sum(facts.num_tokens for facts in self.of_piece(piece))

    def shard(self, piece: int, number: int, dtype: str) -> Shard:
        """Entry of the store's index for shard `number` of a piece."""
        return Shard(_file(piece, number), self.of_piece(piece)[number].num_tokens, dtype)

    def lengths(self, piece: int, number: int) -> np.ndarray:
        """Number of tokens in each document of a shard, int64 [num_documents]."""
        return np.fromfile(self.folder / f"{_name(piece, number)}.lengths", "<i8")

    def write(self, piece: int, number: int, *, vocab_size: int, end_id: int) -> ShardWriter:
        """Open shard `number` of a piece for writing."""
        return ShardWriter(self.partial / _file(piece, number), vocab_size=vocab_size, end_id=end_id)

    def finish(self, piece: int, number: int, writer: ShardWriter, facts: ShardFacts) -> None:
        """Move the shard to its place, then write the file that marks it as valid."""
        writer.finish()
        name = _name(piece, number)
        replace(self.folder / f"{name}.lengths", np.array(writer.lengths, dtype="<i8").tobytes())
        replace(self.folder / f"{name}.json", json.dumps(asdict(facts)).encode())

    def forget(self, piece: int) -> None:
        """Discard a piece, so that it is tokenized again."""
        for number in reversed(range(len(self.of_piece(piece)))):
            (self.folder / f"{_name(piece, number)}.json").unlink()
            (self.partial / _file(piece, number)).unlink(missing_ok=True)
        self._complete.pop(piece, None)

    def count(self, piece: int) -> int | None:
        """Number of documents in a piece; None if they are not counted yet."""
        path = self.folder / f"{piece:05d}.count"
        return int(path.read_text()) if path.exists() else None

    def save_count(self, piece: int, count: int) -> None:
        """Record the number of documents in a piece."""
        replace(self.folder / f"{piece:05d}.count", str(count).encode())


def replace(path: Path, content: bytes) -> None:
    """Writes a file atomically: other processes see all of it or nothing."""
    unfinished = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _name(piece: int, number: int) -> str:
    return f"{piece:05d}" if number == 0 else f"{piece:05d}_{number:03d}"


def _file(piece: int, number: int) -> str:
    return f"tokens_{_name(piece, number)}.bin"
