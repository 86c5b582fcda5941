"""Runs processes that tokenize pieces, one after another. They end with the process that started them.

python -m torchlmoe.data.workers     the program that they run: tasks on standard input, answers on standard output
"""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torchlmoe.data.progress import Task, TokenizationProgress
from torchlmoe.data.tokenizing import Job, Report, count_documents, tokenize_piece


def do_task(job: Job, task: Task, report: Report) -> None:
    """Runs a task in this process."""
    if task.only_count:
        count_documents(job, task.piece)
    else:
        tokenize_piece(job, task.piece, task.limit, report)


def do_tasks(job: Job, tasks: Iterator[Task], num_workers: int, progress: TokenizationProgress) -> None:
    """Runs all tasks in a number of processes. Raises the first ValueError or OSError of any task."""
    lock, errors = threading.Lock(), list[Exception]()
    workers = [_Worker(job) for _ in range(num_workers)]

    def next_task(done: Task | None) -> Task | None:
        with lock:
            if done is not None:
                progress.finish(done)
            return None if errors else next(tasks, None)

    def report(*more: int) -> None:
        with lock:
            progress.add(*more)

    def serve(worker: _Worker) -> None:
        task = None
        try:
            while (task := next_task(task)) is not None:
                worker.do(task, report)
        except Exception as error:
            with lock:
                errors.append(error)

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for worker in workers:
            worker.stop()
    if errors:
        raise errors[0]


class _Worker:
    """A process that runs tasks one after another."""

    def __init__(self, job: Job):
        # One thread per process, since there are as many processes as cores to use.
        environment = {
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torchlmoe.data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            start_new_session=True,  # Ctrl-C reaches only the parent, which ends this process
        )
        self._job: Job | None = job

    def do(self, task: Task, report: Report) -> None:
        try:
            self._send((self._job, task))
            self._job = None  # the process keeps it
            while (answer := self._receive()) is not None:
                if isinstance(answer, Exception):
                    raise answer
                report(*answer)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            raise OSError(
                f"A process that tokenized ended with exit code {code}: if memory is short, set a lower "
                "data.num_workers; finished parts are kept, and the same command continues from them."
            ) from None

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        return pickle.load(self._process.stdout)

    def stop(self) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()


def _serve() -> None:
    tasks, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with answers

    def answer(message: object) -> None:
        pickle.dump(message, answers)
        answers.flush()  # fails if the parent has ended, which ends this process too

    job: Job | None = None
    while True:
        try:
            new_job, task = pickle.load(tasks)
        except EOFError:
            return
        job = new_job or job
        assert job is not None
        try:
            do_task(job, task, lambda *more: answer(more))
        except BrokenPipeError:
            os._exit(1)
        except (ValueError, OSError) as error:
            answer(type(error)(str(error)) if isinstance(error, ValueError) else error)
        else:
            answer(None)


if __name__ == "__main__":
    _serve()
