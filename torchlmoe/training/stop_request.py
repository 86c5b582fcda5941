"""SIGTERM and SIGINT request a stop: the step is finished and saved first. A second request stops at once.

The death of torchrun asks for an end too. If torchrun is killed by SIGKILL it cannot stop its workers, and they would
train on unseen. A worker notices that its parent is another process. Unlike Linux's PR_SET_PDEATHSIG this lets all
ranks finish the same step and save it. A process that torchrun did not start does not look at its parent, so that
`nohup python train.py` outlives its shell.
"""

import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# On one Ctrl-C a rank gets the terminal's SIGINT, and torchrun's SIGINT and SIGTERM a moment later.
SECONDS_OF_ONE_REQUEST = 2.0


class StopRequest:
    """Within its `with`, `name` is that of the first signal, or says that torchrun died; None before either."""

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
