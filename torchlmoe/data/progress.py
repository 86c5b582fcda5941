"""Shows the progress of tokenization: a live line on a terminal, otherwise a log line every few seconds."""

import logging
import sys
import time
from types import TracebackType
from typing import NamedTuple

from rich.console import Console
from rich.status import Status

logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 5.0


class Task(NamedTuple):
    """Tokenize a piece of the corpus up to `limit` tokens or, with only_count, count its documents."""

    piece: int
    limit: int | None = None
    only_count: bool = False


class TokenizationProgress:
    """Counts documents, UTF-8 bytes of text and tokens within a `with`, and logs the totals at its end.

    name: of the data, for messages. sizes: piece -> bytes to read, 0 if unknown. max_tokens: limit of tokenization.
    """

    def __init__(self, name: str, sizes: dict[int, int] | None = None, max_tokens: int | None = None):
        self.name, self.sizes, self.max_tokens = name, sizes or {}, max_tokens
        self.num_documents = self.text_bytes = self.num_tokens = 0
        self.bytes_done = self.num_counted = 0
        self._status = Status("", console=Console(stderr=True)) if sys.stderr.isatty() else None

    def __enter__(self) -> "TokenizationProgress":
        self._start = self._last_logged = time.monotonic()
        if self._status is not None:
            self._status.start()
        return self

    def add(self, num_documents: int, text_bytes: int, num_tokens: int) -> None:
        """Add to the counts."""
        self.num_documents += num_documents
        self.text_bytes += text_bytes
        self.num_tokens += num_tokens
        self._say()

    def finish(self, task: Task) -> None:
        """Record that a piece is complete."""
        if task.only_count:
            self.num_counted += 1
            self._start = time.monotonic()  # the estimate is of tokenization, which follows
        else:
            self.bytes_done += self.sizes[task.piece]
        self._say()

    def _say(self) -> None:
        now = time.monotonic()
        if self._status is not None:
            self._status.update(self._line())
        elif now - self._last_logged >= LOG_INTERVAL_SECONDS:
            self._last_logged = now
            logger.info(self._line())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
        if error is None:
            logger.info(self._line())

    def _line(self) -> str:
        if self.num_counted and not self.num_documents:
            return (
                f"Tokenizing {self.name}: counted the documents of {self.num_counted:,} of {len(self.sizes):,} pieces"
            )
        megabytes = self.text_bytes / 1e6
        speed = megabytes / max(time.monotonic() - self._start, 1e-9)
        return (
            f"Tokenizing {self.name}: {self.num_documents:,} documents, {megabytes:,.1f} MB of text, "
            f"{self.num_tokens:,} tokens, {speed:.1f} MB/s{self._estimate()}"
        )

    def _estimate(self) -> str:
        """The finished percentage and the estimated remaining time in words; "" at the beginning and the end."""
        done = [self.bytes_done / total if (total := sum(self.sizes.values())) else 0.0]
        if self.max_tokens is not None:
            done.append(self.num_tokens / self.max_tokens)
        if not 0 < max(done) < 1:
            return ""
        seconds = (time.monotonic() - self._start) * (1 / max(done) - 1)
        hours, minutes = divmod(round(seconds / 60), 60)
        return f", {100 * max(done):.0f}% done, about {f'{hours} h ' if hours else ''}{minutes} min left"
