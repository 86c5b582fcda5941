"""Which of several writers of a store is lost: each leaves a sign of life beside it, which the others watch.

A sign is a number that rises, and a watcher measures the time for which it stands still: clocks of hosts do not matter.
"""

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from torchlmoe.data.parts import replace

SECONDS_BETWEEN_SIGNS = 5.0


class SignOfLife:
    """Within a `with`, this writer is seen to live, whatever it does or waits for.

    folder: which all writers see.
    """

    def __init__(self, folder: Path, writer: int):
        self._path, self._number, self._stopped = _sign(folder, writer), time.time_ns(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="sign of life", daemon=True)

    def __enter__(self) -> "SignOfLife":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._number += 1
            with suppress(
                OSError
            ):  # The store is whole and the folder gone; or the disk is full, which others will say.
                replace(self._path, str(self._number).encode())
            if self._stopped.wait(SECONDS_BETWEEN_SIGNS):
                return


class Watch:
    """Looks at the signs of other writers. timeout: seconds after which one whose sign stands still is lost."""

    def __init__(self, folder: Path, timeout: float):
        self.folder, self.timeout = folder, timeout
        self._last: dict[int, tuple[str | None, float]] = {}

    def lost(self, writers: Iterable[int]) -> list[int]:
        """Those whose sign has not changed for so long, from the first look at it; one without a sign, too."""
        now = time.monotonic()
        lost = []
        for writer in writers:
            sign = None
            with suppress(OSError):
                sign = _sign(self.folder, writer).read_text()
            before, since = self._last.setdefault(writer, (sign, now))
            if sign != before:
                self._last[writer] = sign, now
            elif now - since >= self.timeout:
                lost.append(writer)
        return lost


def _sign(folder: Path, writer: int) -> Path:
    return folder / f"writer-{writer}.alive"
