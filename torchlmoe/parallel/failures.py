"""Explains failures among ranks in one sentence: a rank is lost, hangs, or failed to write or read."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from torchlmoe.parallel.heartbeat import Heartbeat

# What gloo says in plain RuntimeErrors, of collectives and of what goes from one rank to another.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Connection timed out",  # by TCP: a node no longer answers
    "Broken pipe",
    "No route to host",
    "Socket closed",
    "connectFullMesh failed",
)
# The second is that of any operation after one with the same rank that timed out.
_TIMED_OUT = ("Timed out waiting", "Application timeout caused pair closure")
# What NCCL's watchdog and the store say, as DistError.
_TIMED_OUT_OF_TORCH = ("timeout", "timed out", "timing out")


@contextmanager
def collective_failures(heartbeat: Heartbeat, timeout_seconds: float) -> Iterator[None]:
    """Convert a failed collective in its body to a ConnectionError or TimeoutError with a message of one sentence.

    The sentence names the rank that is lost or late and its last operation, if its reports show them. Any other
    error is reported to the other ranks, which then fail and name this one.

    timeout_seconds: of the process groups.
    """
    try:
        yield
    except Exception as error:
        own = _without_wrapping(error)
        if (kind := _kind_of_failure(own)) is None:
            heartbeat.end(own)
            if own is error:
                raise
            raise own from None
        cause = heartbeat.cause() or "which rank it was is unknown, see the messages of the ranks or the launcher"
        happened = (
            f"A collective operation of {heartbeat.where} did not end within parallelism.timeout_seconds = "
            f"{timeout_seconds:g}"
            if kind is TimeoutError
            else f"Another rank ended during {heartbeat.where}"
        )
        raise kind(
            f"{happened}: {cause}; earlier checkpoints are whole, and the same command resumes from the latest."
        ) from error


def cause_of(error: CheckpointException) -> Exception:
    """The first rank's own error behind a failed save or load."""
    cause, _ = error.failures[min(error.failures)]
    return cause if isinstance(cause, Exception) else RuntimeError(str(cause))


def _kind_of_failure(error: Exception) -> type[ConnectionError] | type[TimeoutError] | None:
    """Return the type of error to raise; None if the error is not a failed collective."""
    text, of_torch = str(error), isinstance(error, dist.DistError)
    if not isinstance(error, RuntimeError):
        return None
    if any(part in text for part in _LOST):
        return ConnectionError
    if any(part in text for part in _TIMED_OUT):
        return TimeoutError
    if of_torch and any(part in text.lower() for part in _TIMED_OUT_OF_TORCH):
        return TimeoutError
    return ConnectionError if of_torch else None


def _without_wrapping(error: Exception) -> Exception:
    """Unwrap an error of a pipeline stage: torch wraps it in a RuntimeError that prints all inputs of the stage."""
    while (
        type(error) is RuntimeError and "failed to run" in str(error).lower() and isinstance(error.__cause__, Exception)
    ):
        error = error.__cause__
    return error
