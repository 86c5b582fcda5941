"""SIGTERM and SIGINT ask for an end: the step is finished and saved first. The same signal again ends at once."""

import os
import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within its `with` signals are noted in `name`, that of the first one; None while there was none.

    Only the same signal twice ends at once: on Ctrl-C, torchrun sends its ranks a SIGTERM after the terminal's SIGINT.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._seen: set[int] = set()

    def __enter__(self) -> "StopRequest":
        self._before: dict[signal.Signals, Any] = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number in self._seen:
            os._exit(128 + number)
        self._seen.add(number)
        self.name = self.name or signal.Signals(number).name
