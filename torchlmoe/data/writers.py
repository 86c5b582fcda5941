"""Detects lost writers of a store: each writer updates a sign of life in the shared folder, which the others watch.

A sign is a counter. A watcher measures with its own clock how long a counter stands still, so hosts' clocks may differ.
"""

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from torchlmoe.data.parts import replace

SECONDS_BETWEEN_SIGNS = 5.0


class SignOfLife:
    """Updates this writer's sign in a background thread, within a `with`.

    folder: shared by all writers. writer: this writer's number.
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
            # Fails if the folder is gone, since the store is complete; or if the disk is full, which other writes
            # report.
            with suppress(OSError):
                replace(self._path, str(self._number).encode())
            if self._stopped.wait(SECONDS_BETWEEN_SIGNS):
                return


class Watch:
    """Watches the signs of other writers. timeout: seconds after which a writer whose sign stands still is lost."""

    def __init__(self, folder: Path, timeout: float):
        self.folder, self.timeout = folder, timeout
        self._last: dict[int, tuple[str | None, float]] = {}

    def lost(self, writers: Iterable[int]) -> list[int]:
        """Return the lost writers among some. The time counts from the first look at a sign, even at a missing one."""
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
