"""Starts or resumes the runs of a search as processes, and reads their results."""

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

from torchlmoe.config.settings import Config
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
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        gpus = 0 if "CUDA_VISIBLE_DEVICES" in os.environ else torch.cuda.device_count()
        printed = folder / "printed.txt"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchlmoe.tuning.child"])
        threads, gpu = max(1, cores // self.processes), place % gpus if gpus > 1 else None
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
        if code == 2:
            return next((line for line in reversed(lines) if line.startswith("error")), "error: none was printed")
        raise ValueError(
            f"A run ended with exit code {code} before its last step; see {printed}. The same command resumes the "
            "search."
        )


def _last_val_loss(folder: Path, steps: int) -> float:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(float(record["val_loss"]) for record in reversed(records) if record["step"] == steps)
