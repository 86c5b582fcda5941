"""SIGTERM and SIGINT ask for an end: the step is finished and saved first. A second request ends at once."""

import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# On one Ctrl-C a rank gets the terminal's SIGINT, and torchrun's SIGINT and SIGTERM a moment later.
SECONDS_OF_ONE_REQUEST = 2.0


class StopRequest:
    """Within its `with`, `name` is that of the first signal; None while there was none."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __enter__(self) -> "StopRequest":
        self._before: dict[signal.Signals, Any] = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > SECONDS_OF_ONE_REQUEST:
            os._exit(128 + number)
