"""What went wrong among the ranks, in a sentence: one is gone, one hangs, one failed to write or read."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

# What gloo says, in plain RuntimeErrors.
_TIMED_OUT = ("Timed out waiting", "timeout")
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


@contextmanager
def collective_failures(where: str, timeout_seconds: float) -> Iterator[None]:
    """Turns the failure of a collective within it into ConnectionError or TimeoutError, of one sentence each.

    where: what was going on, as "step 12". timeout_seconds: of the process groups.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        of_ranks = isinstance(error, dist.DistError)
        if any(part in text for part in _TIMED_OUT) and (of_ranks or "gloo" in text):
            raise TimeoutError(
                f"A collective operation of {where} did not end within parallelism.timeout_seconds = "
                f"{timeout_seconds:g}: a rank hangs or is far behind; what was saved before is whole, and the same "
                "command continues from it."
            ) from error
        if of_ranks or any(part in text for part in _LOST):
            raise ConnectionError(
                f"Another rank ended during {where}: its own message or the launcher's says why; what was saved before "
                "is whole, and the same command continues from it."
            ) from error
        raise


def cause_of(error: CheckpointException) -> Exception:
    """The first rank's own error behind a failed save or load."""
    cause, _ = error.failures[min(error.failures)]
    return cause if isinstance(cause, Exception) else RuntimeError(str(cause))
