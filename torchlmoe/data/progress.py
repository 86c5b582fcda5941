"""Says how far tokenization has come: a live line on a terminal, else a logged line every few seconds."""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.status import Status

logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 5.0


class TokenizationProgress:
    """Counts documents, UTF-8 bytes of text and tokens within a `with`, and logs the totals at its end."""

    def __init__(self, name: str):
        self.name = name
        self.num_documents = self.text_bytes = self.num_tokens = 0
        self._status = Status("", console=Console(stderr=True)) if sys.stderr.isatty() else None

    def __enter__(self) -> "TokenizationProgress":
        self._start = self._last_logged = time.monotonic()
        if self._status is not None:
            self._status.start()
        return self

    def update(self, num_documents: int, text_bytes: int, num_tokens: int) -> None:
        """The totals so far."""
        self.num_documents, self.text_bytes, self.num_tokens = num_documents, text_bytes, num_tokens
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
        megabytes = self.text_bytes / 1e6
        speed = megabytes / max(time.monotonic() - self._start, 1e-9)
        return (
            f"Tokenizing {self.name}: {self.num_documents:,} documents, {megabytes:,.1f} MB of text, "
            f"{self.num_tokens:,} tokens, {speed:.1f} MB/s"
        )
