"""Writes a run's metrics to the console, `metrics.jsonl`, TensorBoard and a plot of the loss."""

import errno
import json
import logging
import math
import os
import resource
import socket
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from torchlmoe.config.settings import Metrics
from torchlmoe.files import failures_to_write, replacing

logger = logging.getLogger(__name__)
RESUMES = "what was saved before is whole, and the same command continues from it"


class MetricsLog:
    """The metrics of a run. Only the first rank writes; on the others every call does nothing.

    num_steps: of the whole run. active: whether this is the first rank.
    first_step: number of steps that were done before. A resumed run keeps the rows up to this step and removes later
        ones. A new run renames the metrics.jsonl of an earlier run to include its date.
    """

    def __init__(self, folder: Path, settings: Metrics, *, num_steps: int, active: bool, first_step: int = 0):
        self.folder, self.settings, self.num_steps, self.active = folder, settings, num_steps, active
        self.first_step = first_step
        self.records: list[dict[str, Any]] = []
        self._started = time.monotonic()
        if not active:
            return
        self.path = path = folder / "metrics.jsonl"
        if first_step:
            self.records = _keep_rows(path, first_step)
        elif path.exists():
            modified = datetime.fromtimestamp(path.stat().st_mtime)
            path.rename(folder / f"metrics.{modified:%Y-%m-%d_%H-%M-%S}.jsonl")
        self._file = path.open("a")
        self._folder = os.open(folder, os.O_RDONLY)  # to notice if another folder replaces it under the same name
        self._tensorboard = self._tensorboard_from(first_step + 1) if settings.tensorboard else None

    @property
    def last_step(self) -> int:
        """The last logged step, 0 if there is none; only the first rank knows it."""
        return self.records[-1]["step"] if self.records else 0

    def log(self, record: dict[str, Any]) -> None:
        """Write a record: `step` and figures by name.

        Lists are written to metrics.jsonl only. Floats that are not finite are dropped. Raises OSError, with the
        remedy, if the record cannot be written.
        """
        if not self.active:
            return
        record = {name: v for name, v in record.items() if not isinstance(v, float) or math.isfinite(v)}
        with failures_to_write(f"The figures of step {record['step']}", self.folder, RESUMES):
            self._restore()
            self._write([record])
            self._draw([record])
        self.records.append(record)
        self.say(self._line(record))

    def _restore(self) -> None:
        """Write removed files again. Raises OSError if the folder or metrics.jsonl was replaced during the run."""
        if not _is_open(self.path, self._file.fileno()):
            if self.path.exists() or not _is_open(self.folder, self._folder):
                raise FileNotFoundError(errno.ENOENT, f"{self.path} was removed or replaced during the run")
            logger.warning(f"{self.path} was removed during the run: it is written again.")
            self._file.close()
            self._file = self.path.open("a")
            self._write(self.records)
        if self._tensorboard is not None and not any(self.folder.glob("tensorboard/*")):
            logger.warning(f"{self.folder / 'tensorboard'} was removed during the run: it is written again.")
            with suppress(OSError):  # its file no longer exists
                self._tensorboard.close()
            self._tensorboard = self._tensorboard_from(1)
            self._draw(self.records)

    def _write(self, records: list[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(record) + "\n" for record in records))  # floats with all their digits
        self._file.flush()

    def _draw(self, records: list[dict[str, Any]]) -> None:
        if self._tensorboard is not None:
            for record in records:
                self._tensorboard.add(record)

    def _tensorboard_from(self, step: int) -> "_EventFile":
        return _EventFile(self.folder / "tensorboard", step)

    def say(self, text: str) -> None:
        """Print a line on the console."""
        if self.active:
            print(text, flush=True)

    def _line(self, record: dict[str, Any]) -> str:
        step = record["step"]
        width = len(str(self.num_steps))
        parts = [f"step {step:>{width}}/{self.num_steps}"]
        if "loss" in record:
            parts += [f"loss {record['loss']:.4f}", f"grad {record['grad_norm']:.3f}", f"lr {record['lr']:.2e}"]
            parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
            if "mfu" in record:
                parts.append(f"mfu {100 * record['mfu']:.1f}%")
            parts.append(f"{record['memory_gib']:.2f} GiB")
        if "val_loss" in record:
            names = [name for name in ("val_loss", "val_bits_per_byte") if name in record]
            parts += [f"{name} {record[name]:.4f}" for name in names]
        if step > self.first_step:
            seconds_per_step = (time.monotonic() - self._started) / (step - self.first_step)
            parts.append(f"eta {duration(seconds_per_step * (self.num_steps - step))}")
        return "  ".join(parts)

    def finish(self) -> None:
        """Check that all files exist, and plot the loss."""
        if not self.active:
            return
        with failures_to_write("The figures", self.folder, RESUMES):
            self._restore()
        if self.settings.plot and self.records:
            path = self.folder / "loss_curve.png"
            with failures_to_write("The picture", path, "make room, and the same command draws it again"):
                plot_loss(self.records, path)
            self.say(f"loss curve: {path}")

    def close(self) -> None:
        """Close the files. Errors are suppressed, since failed writes have already raised."""
        if not self.active:
            return
        os.close(self._folder)
        for file in (self._file, self._tensorboard):
            if file is not None:
                with suppress(OSError):
                    file.close()


def _is_open(path: Path, descriptor: int) -> bool:
    """Whether `path` is the file or folder that is open as `descriptor`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


class _EventFile:
    """A TensorBoard file, written synchronously: the thread of torch's SummaryWriter prints a traceback on a full disk.

    first_step: TensorBoard hides records of earlier files from this step on.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("wb"))
        self._write(Event(step=first_step, file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        self.close = self._records.close

    def add(self, record: dict[str, Any]) -> None:
        scalars = {name: value for name, value in record.items() if name != "step" and not isinstance(value, list)}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(step=record["step"], summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()


def _keep_rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Removes rows after `last_step` from metrics.jsonl, and returns the others. Warns of invalid lines."""
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], start=1):
        try:
            record = json.loads(line)
            past = record["step"] > last_step
        except (ValueError, TypeError, KeyError, RecursionError):  # cut off when the run was killed, or edited
            logger.warning(f"Ignored: line {number} of {path} is not a record of a step.")
            continue
        if past:
            break
        records.append(record)
    with replacing(path, "The figures of earlier steps", "make room; none is lost") as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def load_figures(counts_E: torch.Tensor) -> dict[str, Any]:
    """Returns how evenly experts are loaded. counts_E: [E], choices per expert.

    load_max_over_mean: 1 if loads are equal. load_entropy: relative to that of equal loads; 1 if they are equal, 0 if
    one expert has all. load: the counts.
    """
    counts = counts_E.double()
    share = counts / counts.sum()
    entropy = torch.special.entr(share).sum().item() / max(math.log(len(counts)), 1e-12)
    return {
        "load_max_over_mean": (counts.max() / counts.mean()).item(),
        "load_entropy": entropy if len(counts) > 1 else 1.0,
        "load": counts_E.long().tolist(),
    }


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the allocator on CUDA, of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def duration(seconds: float) -> str:
    """Formats seconds as 1h 02m, 3m 04s or 5s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


def plot_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Plots training and validation loss over steps (nats per token), with the last validation bits per byte."""
    import matplotlib  # imported here, so that a run does not start a second later

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(record["step"], record[name]) for record in records if name in record]
        return [step for step, _ in points], [value for _, value in points]

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    steps, losses = series("loss")
    axis.plot(steps, losses, color="tab:blue", linewidth=1, alpha=0.35, label="training loss, single steps")
    axis.plot(steps, _smoothed(losses), color="tab:blue", label="training loss, running mean")
    steps, losses = series("val_loss")
    if steps:
        axis.plot(steps, losses, "o-", color="tab:orange", label="validation loss")
        bits_per_byte = series("val_bits_per_byte")[1]
        text = f"{bits_per_byte[-1]:.3f} bits per byte" if bits_per_byte else f"{losses[-1]:.3f} nats"
        axis.annotate(text, (steps[-1], losses[-1]), (0, -22), textcoords="offset points", ha="right", weight="bold")
    axis.set(xlabel="step", ylabel="loss, nats per token")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smoothed(values: list[float], keep: float = 0.8) -> list[float]:
    """A running mean in which a value has the weight keep^age."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means
