"""Explains failures among ranks in one sentence: a rank is lost, hangs, or could not write or read."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from torchlmoe.parallel.heartbeat import Heartbeat

# Messages of gloo's RuntimeErrors, in collectives and point-to-point operations, if another rank has ended.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Connection timed out",  # from TCP: a node no longer answers
    "Broken pipe",
    "No route to host",
    "Socket closed",
    "connectFullMesh failed",
)
# Messages if an operation timed out. The second is the message of any later operation with the same rank.
_TIMED_OUT = ("Timed out waiting", "Application timeout caused pair closure")
# Messages of the DistErrors of NCCL's watchdog and the store.
_TIMED_OUT_OF_TORCH = ("timeout", "timed out", "timing out")


@contextmanager
def collective_failures(heartbeat: Heartbeat, timeout_seconds: float) -> Iterator[None]:
    """Converts a failed collective within the context to a ConnectionError or TimeoutError with a one-sentence message.

    The sentence names the rank that is lost or late and its last operation, if its reports show them. Any other error
    is reported to the other ranks, which then fail and name this one.

    timeout_seconds: timeout of the process groups.
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
    """The error of the first rank that failed in a save or load."""
    cause, _ = error.failures[min(error.failures)]
    return cause if isinstance(cause, Exception) else RuntimeError(str(cause))


def _kind_of_failure(error: Exception) -> type[ConnectionError] | type[TimeoutError] | None:
    """Returns the type of error to raise; None if the error is not a failed collective."""
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
    """Unwraps an error of a pipeline stage: torch wraps it in a RuntimeError that prints all inputs of the stage."""
    while (
        type(error) is RuntimeError and "failed to run" in str(error).lower() and isinstance(error.__cause__, Exception)
    ):
        error = error.__cause__
    return error
