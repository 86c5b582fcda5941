"""Finds the rank that is lost or late if a collective fails: each rank reports its operation to the launch's store.

A thread of each rank writes one short report every second, without a collective and without access to the device.
Ranks read reports only after a failure, all in one request. Reports are counted, so clocks need not agree.
"""

import atexit
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from torchlmoe.parallel.mesh import is_store_of_launcher
from torchlmoe.parallel.verdict import ENDED, FAILED, RUNNING, Report, judge

logger = logging.getLogger(__name__)
T = TypeVar("T")

INTERVAL = 1.0  # seconds between two reports of a rank
BEATS_TO_WAIT = 3.5  # intervals within which a rank that is not lost reports again
_SECONDS_OF_A_REQUEST = 5.0  # the store's timeout; after twice as long a store without any answer counts as lost

_VERDICT = "verdict"
# Number of heartbeats of this process: the n-th of one rank reads only reports of the n-th of the others.
_number = itertools.count()


@dataclass
class _Pause:
    """A time in which this rank begins no operation.

    moves: the rank's operations so far. since: when it began. before: the reports of all ranks at this rank's beat
    `first_beat`. is_reported: whether a verdict was logged.
    """

    moves: int
    since: float
    first_beat: int = 0
    before: list[Report | None] = field(default_factory=list)
    is_reported: bool = False


class Heartbeat:
    """Writes a rank's reports, and judges those of all ranks when a collective has failed.

    Every rank calls `at` with the same sequence of operations. As a context manager it reports how the rank ended. A
    single process reports nothing.
    """

    def __init__(self) -> None:
        self.beside: Callable[[], str] = lambda: ""  # describes work in the background, appended to `where`
        self._moves, self._where, self._state = 0, "start-up", RUNNING
        self._original: Any = None
        self._store: Any = None
        self._thread: threading.Thread | None = None
        self._verdict: str | None = None
        self._beat, self._is_late, self._is_gone = 0, False, False
        self._patience: float | None = None
        self._watched: _Pause | None = None
        self._writing, self._stopped = threading.Lock(), threading.Event()

    def start(self, store: dist.Store, rank: int, world_size: int, patience: float | None = None) -> None:
        """Begin to report. Raises RuntimeError if the store does not answer.

        store: shared by all ranks. It is cloned, since a request of the process group may wait in it for minutes.
        patience: seconds without a new operation after which this rank logs which other is lost or late. NCCL needs it:
            a collective that hangs raises no error there, and when it times out the watchdog aborts the process.
        """
        if world_size == 1:
            return
        self.rank, self.world_size = rank, world_size
        self._is_launchers = is_store_of_launcher()  # otherwise rank 0 has it in its process
        self._patience = patience
        self._original, self._prefix = store, f"heartbeat/{next(_number)}"
        self._connect()
        self._write()
        # Daemon threads that are in C++ while the interpreter shuts down abort the process.
        atexit.register(self.stop)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def at(self, operation: str, step: int | None = None) -> None:
        """Report that an operation begins. step: number of the training step, if the operation is part of one."""
        self._where = operation if step is None else f"step {step} ({operation})"
        self._moves += 1

    @property
    def where(self) -> str:
        """This rank's current step and operation."""
        return self._where + self.beside()

    def end(self, error: BaseException) -> None:
        """Report to the other ranks that this rank ends with an error. Never raises."""
        if self._store is None or self._is_gone or self._state != RUNNING:
            return
        text = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
        self._state = ENDED
        try:
            self._write()
            self._publish(f"rank {self.rank} ended in {self.where}: {text[:500]}")
        except RuntimeError:  # the store no longer exists
            return
        self._let_others_read()

    def cause(self) -> str | None:
        """Return a clause that names the rank that made a collective fail; None if it is unknown.

        Takes a few seconds: a rank that does not report in the meantime is lost.
        """
        if self._store is None:
            return None
        self._state = FAILED
        if self._is_gone:
            return self._verdict or self._without_store()
        try:
            self._write()
            if self._verdict is None and (verdict := self._wait_and_judge()) is not None:
                self._publish(verdict)
        except RuntimeError:
            return self._verdict or self._without_store()
        self._let_others_read()
        return self._verdict

    def stop(self) -> None:
        """Stop reporting."""
        atexit.unregister(self.stop)
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_SECONDS_OF_A_REQUEST)

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.end(error)
        elif self._store is not None and not self._is_gone:
            self._state = ENDED
            with suppress(RuntimeError):  # the store no longer exists
                self._write()
        self.stop()

    def _connect(self) -> None:
        clone = self._original.clone()
        clone.set_timeout(timedelta(seconds=_SECONDS_OF_A_REQUEST))
        self._store = dist.PrefixStore(self._prefix, clone)

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL):
            try:
                if self._is_late:  # On the same connection a late answer would be read as that of the next request.
                    self._ask(self._connect)
                    self._is_late = False
                self._write()
                self._look()
                self._watch()
            except dist.DistStoreError:
                self._is_late = True
            except RuntimeError:  # The store is gone. The next collective fails and reports it.
                self._is_gone = True
                return

    def _ask(self, request: Callable[[], T]) -> T:
        """Run a request to the store in a thread. Raises DistStoreError if the store does not answer in time.

        The store's timeout does not suffice if its host is cut off or its process is stopped. Some requests have no
        timeout. After one that has, torch asks the store to cancel, and waits for that answer without a timeout.
        """
        answer = Future[T]()

        def ask() -> None:
            try:
                answer.set_result(request())
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=ask, name="heartbeat request", daemon=True).start()
        try:
            return answer.result(2 * _SECONDS_OF_A_REQUEST)
        except FutureTimeoutError:
            raise dist.DistStoreError("The store does not answer.") from None

    def _write(self) -> None:
        with self._writing:
            self._beat += 1
            report = Report(self._beat, self._moves, self.where, self._state)
            self._ask(lambda: self._store.set(f"{self.rank}", json.dumps(report)))

    def _look(self) -> None:
        """Read the verdict of another rank, if any, and keep it, since the store may end."""
        if self._verdict is None and self._ask(lambda: self._store.check([_VERDICT])):
            self._verdict = self._ask(lambda: self._store.get(_VERDICT)).decode()

    def _watch(self) -> None:
        if self._watched is None or self._watched.moves != self._moves:
            self._watched = _Pause(self._moves, time.monotonic())
        pause = self._watched
        seconds = time.monotonic() - pause.since
        if self._patience is None or seconds < self._patience or pause.is_reported or self._state != RUNNING:
            return
        if not pause.before:
            pause.first_beat, pause.before = self._beat, self._read()
        elif self._verdict is not None or self._beat > pause.first_beat + BEATS_TO_WAIT:
            verdict = self._verdict or judge(self.rank, pause.before, self._read())
            if verdict is None:  # a long operation, such as a validation: judge again after the same time
                self._watched = None
                return
            pause.is_reported = True
            self._publish(verdict)
            logger.error(f"rank {self.rank} has been in {self.where} for {seconds:.0f} seconds: {self._verdict}.")

    def _publish(self, verdict: str) -> None:
        """Publish a verdict. The first one that a rank publishes holds for all ranks."""
        self._verdict = self._ask(lambda: self._store.compare_set(_VERDICT, "", verdict)).decode()

    def _let_others_read(self) -> None:
        """If this process serves the store, wait until the threads of all ranks have read the verdict."""
        if self.rank == 0 and not self._is_launchers:
            time.sleep(2 * INTERVAL)

    def _wait_and_judge(self) -> str | None:
        before = self._read()
        # Ranks judge one after another, so that most of a thousand find a verdict instead of reading all reports.
        end = time.monotonic() + INTERVAL * (BEATS_TO_WAIT + self.rank / self.world_size)
        while time.monotonic() < end:
            time.sleep(INTERVAL / 4)
            self._look()
            if self._verdict is not None:
                return self._verdict
        return judge(self.rank, before, self._read())

    def _read(self) -> list[Report | None]:
        """The reports of all ranks; None for a rank that has not reported."""
        return self._ask(self._read_at_once)

    def _read_at_once(self) -> list[Report | None]:
        keys = [f"{rank}" for rank in range(self.world_size)]
        if not self._store.check(keys):  # a rank has not started
            keys = [key for key in keys if self._store.check([key])]
        if self._store.has_extended_api():
            values = self._store.multi_get(keys)
        else:
            values = [self._store.get(key) for key in keys]
        reports: list[Report | None] = [None] * self.world_size
        for key, value in zip(keys, values, strict=True):
            reports[int(key)] = Report(*json.loads(value))
        return reports

    def _without_store(self) -> str:
        who = "the launcher of the first node" if self._is_launchers else "rank 0"
        serves = f"{who}, whose process serves the store in which ranks report"
        return f"{serves}, ended, hangs or is cut off; this rank was in {self.where}"
