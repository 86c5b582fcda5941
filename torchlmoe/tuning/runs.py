"""Starts or resumes the runs of a search as processes, and reads their results."""

import errno
import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue

import torch

from torchlmoe.checkpoint.companions import FOLDER
from torchlmoe.checkpoint.folders import partial_of, publish, published
from torchlmoe.config.settings import Config
from torchlmoe.files import failures_to_write
from torchlmoe.tuning.child import start
from torchlmoe.tuning.halving import Outcome
from torchlmoe.tuning.trials import Values


class Runs:
    """Starts runs of one recipe, each in a separate folder, at most `processes` at a time.

    arguments: the recipe's arguments for train.py. config: the recipe's settings. folder: of all runs. steps: of a run
    in the last round. `stop` ends all processes.
    """

    def __init__(self, arguments: list[str], config: Config, folder: Path, *, processes: int, steps: int):
        self.arguments, self.config, self.folder = arguments, config, folder
        self.processes, self.steps = processes, steps
        self._places: SimpleQueue[int] = SimpleQueue()
        for place in range(processes):
            self._places.put(place)
        self._running: set[BaseProcess] = set()
        self._lock, self._stopped = threading.Lock(), False

    def __call__(self, trial: int, round_: int, values: Values, steps: int) -> Outcome:
        """Start a run, or resume it if it was interrupted, and return its outcome.

        A run that has finished is only read. Raises ValueError if the run's process was ended from outside.
        """
        folder = self.folder / f"round-{round_}-trial-{trial}"
        place, begin = self._places.get(), time.monotonic()
        try:
            error = None if (folder / "finished").exists() else self._train(folder, values, steps, place)
        finally:
            self._places.put(place)
        val_loss = None
        if error is None:
            val_loss = _last_val_loss(folder, steps)
            if not math.isfinite(val_loss):
                val_loss, error = None, f"val_loss is {val_loss}"
        if steps < self.steps:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return Outcome(trial, round_, steps, values, val_loss, error, time.monotonic() - begin)

    def flags(self, folder: Path, values: Values, steps: int) -> list[str]:
        """The arguments of a run for train.py. If a setting occurs twice, the last one counts."""
        settings = {
            "job.dump_folder": folder,
            "training.steps": steps,
            "lr_scheduler.warmup_steps": math.ceil(self.config.lr_scheduler.warmup_steps * steps / self.steps),
            "checkpoint.enable": "true",
            "checkpoint.interval": max(1, steps // 4),
            "checkpoint.keep_latest_k": 1,
            "validation.interval": steps,
            "metrics.plot": "false",
            "metrics.tensorboard": "false",
            **values,
        }
        return [*self.arguments, *(f"--{name}={value}" for name, value in settings.items())]

    def stop(self) -> None:
        """End all processes, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()

    def _train(self, folder: Path, values: Values, steps: int, place: int) -> str | None:
        """Train in a process, and return the error message of a run that failed, or None."""
        folder.mkdir(parents=True, exist_ok=True)
        self._copy_imported(folder / "checkpoints")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        gpus = _gpus()
        printed = folder / "printed.txt"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchlmoe.tuning.child"])
        threads, gpu = max(1, cores // self.processes), gpus[place % len(gpus)] if gpus else None
        process = context.Process(target=start, args=(self.flags(folder, values, steps), str(printed), threads, gpu))
        with self._lock:
            if self._stopped:
                raise ValueError("The search was stopped; the same command resumes it.")
            process.start()
            self._running.add(process)
        process.join()
        with self._lock:
            self._running.discard(process)
        code = process.exitcode
        if code == 0 and (folder / "finished").exists():
            return None
        lines = printed.read_text(errors="replace").splitlines()
        error = next((line for line in reversed(lines) if line.startswith("error")), "error: none was printed")
        if code == 2 and not any(os.strerror(number) in error for number in (errno.ENOSPC, errno.EDQUOT)):
            return error
        why = f": {error.partition(': ')[2]}" if code == 2 else ", perhaps for lack of memory," if code == -9 else ""
        raise ValueError(
            f"A run ended with exit code {code}{why} before its last step; see {printed}. The same command resumes the "
            "search; fewer --processes need less memory."
        )

    def _copy_imported(self, root: Path) -> None:
        """Begin a run in `root` with the first checkpoint of an imported model, if the recipe starts from one."""
        source = Path(self.config.job.dump_folder)
        if not (source / FOLDER).is_dir() or published(root):
            return
        first = published(source / "checkpoints").get(0)
        if first is None:
            raise ValueError(
                f"{source} has no checkpoint of step 0 any more, from which runs would start; import the model again."
            )
        with failures_to_write("The imported model", root, "make room; the same command resumes the search"):
            shutil.rmtree(partial_of(root, 0), ignore_errors=True)
            shutil.copytree(first, partial_of(root, 0))
            publish(root, 0, keep_latest_k=1)


def _gpus() -> list[str]:
    """The GPUs for runs, as in CUDA_VISIBLE_DEVICES, if there are several."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    return names if len(names) > 1 else []


def _last_val_loss(folder: Path, steps: int) -> float:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(float(record["val_loss"]) for record in reversed(records) if record["step"] == steps)
