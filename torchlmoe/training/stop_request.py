"""Turns SIGTERM and SIGINT into requests to stop: the run first finishes and saves its step. A second signal kills it.

The death of torchrun is a request too. If SIGKILL kills torchrun, it cannot stop its workers, and they would continue
unnoticed. So a worker checks whether its parent is still the same process. Unlike Linux's PR_SET_PDEATHSIG this lets
all ranks finish the same step and save it. A process that torchrun did not start does not check its parent, so that
`nohup python train.py` outlives its shell.
"""

import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# After one Ctrl-C a rank gets the terminal's SIGINT and, a moment later, torchrun's SIGINT and SIGTERM.
SECONDS_OF_ONE_REQUEST = 2.0


class StopRequest:
    """Handles signals as a context manager. `name` is that of the first signal, or "the death of torchrun", or None."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def name(self) -> str | None:
        if self._name is None and self._launcher is not None and os.getppid() != self._launcher:
            return "the death of torchrun"
        return self._name

    def __enter__(self) -> "StopRequest":
        self._before: dict[signal.Signals, Any] = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._name is None:
            self._name, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > SECONDS_OF_ONE_REQUEST:
            os._exit(128 + number)
