"""Finds which rank is lost or late if a collective fails: each rank reports its operation to the launch's store.

A thread of each rank writes one short report every second, without a collective and without access to the device.
Reports are read only after a failure, all of them in one request. Reports are counted, so clocks need not agree.
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
BEATS_TO_WAIT = 3.5  # in which a rank that is not lost reports again
_SECONDS_OF_A_REQUEST = 5.0  # and twice as many until a store that answers nothing is given up

_VERDICT = "verdict"
# Heartbeats of this process so far: the n-th of one rank belongs to the n-th of the others, and not to one before.
_number = itertools.count()


@dataclass
class _Pause:
    """In which the rank begins nothing new. before: the reports of all ranks at a beat of it."""

    moves: int
    since: float
    first_beat: int = 0
    before: list[Report | None] = field(default_factory=list)
    is_told: bool = False


class Heartbeat:
    """A rank's own reports, and what it concludes from those of all ranks when a collective has failed.

    `at` says what the rank does now; every rank calls it alike. As a context manager it reports how the rank ended.
    A single process reports nothing.
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
        """Begins to report. Raises RuntimeError where the store does not answer.

        store: of all ranks. It is cloned, since a request of the process group may wait in it for minutes.
        patience: seconds after which this rank, if it has begun nothing new, logs which other is lost or late. For
        NCCL: a collective that hangs there raises nothing, and when it times out the watchdog aborts the process.
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
        """operation: what begins now. step: of training, if it is part of one."""
        self._where = operation if step is None else f"step {step} ({operation})"
        self._moves += 1

    @property
    def where(self) -> str:
        """The step and the operation of this rank."""
        return self._where + self.beside()

    def end(self, error: BaseException) -> None:
        """Report to the others that this rank ends by an error. Raises nothing."""
        if self._store is None or self._is_gone or self._state != RUNNING:
            return
        text = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
        self._state = ENDED
        try:
            self._write()
            self._publish(f"rank {self.rank} ended in {self.where}: {text[:500]}")
        except RuntimeError:  # the store has gone before
            return
        self._let_others_read()

    def cause(self) -> str | None:
        """Return a clause that names the rank which made a collective fail; None if it is unknown.

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
        """Ends the reports."""
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
            with suppress(RuntimeError):  # the store has gone before
                self._write()
        self.stop()

    def _connect(self) -> None:
        clone = self._original.clone()
        clone.set_timeout(timedelta(seconds=_SECONDS_OF_A_REQUEST))
        self._store = dist.PrefixStore(self._prefix, clone)

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL):
            try:
                if self._is_late:  # A late answer would be taken for that of the next request.
                    self._ask(self._connect)
                    self._is_late = False
                self._write()
                self._look()
                self._watch()
            except dist.DistStoreError:
                self._is_late = True
            except RuntimeError:  # The store is gone, which a collective that fails will tell.
                self._is_gone = True
                return

    def _ask(self, request: Callable[[], T]) -> T:
        """request() of the store. Raises DistStoreError where the store does not answer in time.

        The time limit of a store is none where its host is cut off or its process stands still: some requests have no
        limit, and after one that has torch asks to be let go, and waits for that answer without a limit.
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
        """Keeps what another rank has concluded, which outlasts the store."""
        if self._verdict is None and self._ask(lambda: self._store.check([_VERDICT])):
            self._verdict = self._ask(lambda: self._store.get(_VERDICT)).decode()

    def _watch(self) -> None:
        if self._watched is None or self._watched.moves != self._moves:
            self._watched = _Pause(self._moves, time.monotonic())
        pause = self._watched
        seconds = time.monotonic() - pause.since
        if self._patience is None or seconds < self._patience or pause.is_told or self._state != RUNNING:
            return
        if not pause.before:
            pause.first_beat, pause.before = self._beat, self._read()
        elif self._verdict is not None or self._beat > pause.first_beat + BEATS_TO_WAIT:
            verdict = self._verdict or judge(self.rank, pause.before, self._read())
            if verdict is None:  # something long, such as a validation: looks again when as much time has passed
                self._watched = None
                return
            pause.is_told = True
            self._publish(verdict)
            logger.error(f"rank {self.rank} has been in {self.where} for {seconds:.0f} seconds: {self._verdict}.")

    def _publish(self, verdict: str) -> None:
        """Takes the first rank's verdict for all."""
        self._verdict = self._ask(lambda: self._store.compare_set(_VERDICT, "", verdict)).decode()

    def _let_others_read(self) -> None:
        """Keeps the store that this process serves until the threads of all ranks have looked."""
        if self.rank == 0 and not self._is_launchers:
            time.sleep(2 * INTERVAL)

    def _wait_and_judge(self) -> str | None:
        before = self._read()
        # One after another, so that most of a thousand ranks find the verdict instead of reading all reports.
        end = time.monotonic() + INTERVAL * (BEATS_TO_WAIT + self.rank / self.world_size)
        while time.monotonic() < end:
            time.sleep(INTERVAL / 4)
            self._look()
            if self._verdict is not None:
                return self._verdict
        return judge(self.rank, before, self._read())

    def _read(self) -> list[Report | None]:
        """The reports of all ranks; None of a rank that has written none."""
        return self._ask(self._read_at_once)

    def _read_at_once(self) -> list[Report | None]:
        keys = [f"{rank}" for rank in range(self.world_size)]
        if not self._store.check(keys):  # some rank has not started
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
