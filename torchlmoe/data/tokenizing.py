"""Tokenizes a piece of a corpus into shards. This process does it, or one of several workers."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from torchlmoe.data.corpus import Reading
from torchlmoe.data.parts import Parts, ShardFacts
from torchlmoe.data.store_writer import ShardWriter
from torchlmoe.data.tokenizer import Tokenizer

# Enough to keep the tokenizer's threads busy, but few enough to bound memory and to show progress.
CHARACTERS_AT_ONCE = 2**22
# Number of characters per batch that are checked for text that the tokenizer drops.
CHARACTERS_LOOKED_AT = 2**17
# A piece with more characters becomes several shards, so that a killed run keeps the finished ones.
CHARACTERS_PER_SHARD = 2**30

Report = Callable[[int, int, int], None]  # called with the numbers of further documents, bytes of text and tokens


@dataclass(frozen=True)
class Job:
    """Everything that a process needs to tokenize any piece."""

    reading: Reading
    tokenizer: Tokenizer
    parts: Parts

    @property
    def counts(self) -> bool:
        """Whether documents must be counted: they are held out by number, which depends on earlier pieces."""
        return bool(self.reading.held_out) and len(self.reading.pieces) > 1


def count_documents(job: Job, piece: int) -> None:
    """Counts the documents of a piece, from which the numbers of later pieces' documents follow."""
    job.parts.save_count(piece, sum(1 for _ in job.reading.pieces[piece].documents()))


def tokenize_piece(job: Job, piece: int, limit: int | None, report: Report) -> None:
    """Writes the shards of a piece that do not exist yet.

    limit: maximum number of tokens of the piece; the last document may be cut. None for all.
    """
    first_number = sum(job.parts.count(earlier) or 0 for earlier in range(piece)) if job.counts else 0
    shards = list(job.parts.of_piece(piece))
    num_read = sum(facts.num_read for facts in shards)
    numbered = islice(enumerate(job.reading.pieces[piece].documents(), first_number), num_read, None)
    while not (shards and shards[-1].is_last):
        room = None if limit is None else limit - sum(facts.num_tokens for facts in shards)
        shards.append(_write_shard(job, piece, len(shards), numbered, room, report))


def _write_shard(
    job: Job, piece: int, number: int, numbered: Iterator[tuple[int, str]], limit: int | None, report: Report
) -> ShardFacts:
    """Writes the next shard of a piece, from its remaining documents."""
    tokenizer = job.tokenizer
    shard = _Shard(tokenizer, job.parts.write(piece, number, vocab_size=tokenizer.vocab_size, end_id=tokenizer.end_id))
    num_read = num_characters = 0
    is_last = False
    try:
        while num_characters < CHARACTERS_PER_SHARD and not is_last:
            texts, read, is_last = _batch(numbered, job.reading.takes)
            num_read, num_characters = num_read + read, num_characters + sum(map(len, texts))
            before = len(shard.writer.lengths), shard.text_bytes, shard.writer.num_tokens
            is_last |= not shard.append(texts, limit)
            now = len(shard.writer.lengths), shard.text_bytes, shard.writer.num_tokens
            report(*(b - a for a, b in zip(before, now, strict=True)))
        facts = shard.facts(num_read, is_last)
        job.parts.finish(piece, number, shard.writer, facts)
    finally:
        shard.writer.drop()
    return facts


def _batch(numbered: Iterator[tuple[int, str]], takes: Callable[[int], bool]) -> tuple[list[str], int, bool]:
    """Documents to tokenize at once, the number of documents read for them, and whether they are the last."""
    texts: list[str] = []
    num_read = num_characters = 0
    for number, text in numbered:
        num_read += 1
        if text and takes(number):
            texts.append(text)
            num_characters += len(text)
            if num_characters >= CHARACTERS_AT_ONCE:
                return texts, num_read, False
    return texts, num_read, True


class _Shard:
    """The documents of a shard, with their counts."""

    def __init__(self, tokenizer: Tokenizer, writer: ShardWriter):
        self.tokenizer, self.writer = tokenizer, writer
        self.token_bytes = tokenizer.token_bytes()
        self.text_bytes = 0
        self.dropped = Counter[str]()

    def append(self, texts: list[str], limit: int | None) -> bool:
        """Tokenize and write documents. Returns False once the limit of tokens is reached."""
        num_checked = 0
        for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            ids_N = np.array(ids, dtype=np.int64)
            text_bytes = len(text.encode())
            # A normalizer may have changed the text, so the bytes of its tokens are compared with those of the text.
            if self.token_bytes is not None and int(self.token_bytes[ids_N].sum()) != text_bytes:
                self.token_bytes = None
            if self.token_bytes is None and num_checked < CHARACTERS_LOOKED_AT:
                num_checked += len(text)
                self.dropped.update(self.tokenizer.dropped_characters(text))
            room = len(ids) if limit is None else limit - self.writer.num_tokens - 1
            if room < 0:
                return False
            if room < len(ids):
                ids_N = ids_N[:room]
                if self.token_bytes is None:
                    text_bytes = self.tokenizer.bytes_covered(text, room)
                else:
                    text_bytes = int(self.token_bytes[ids_N].sum())
            self.writer.append(ids_N)
            self.text_bytes += text_bytes
        return True

    def facts(self, num_read: int, is_last: bool) -> ShardFacts:
        """The facts about the shard. num_read, is_last: see `ShardFacts`."""
        return ShardFacts(
            num_tokens=self.writer.num_tokens,
            num_documents=len(self.writer.lengths),
            text_bytes=self.text_bytes,
            num_read=num_read,
            has_token_bytes=self.token_bytes is not None,
            is_last=is_last,
            dropped=[character for character, _ in self.dropped.most_common(5)],
        )
