"""Functions that all benchmarks use: timing in turn, a description of the machine, a table and a JSON file."""

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def interleaved_seconds(
    cases: dict[str, Callable[[], object]], *, repeats: int, warmups: int = 2
) -> dict[str, list[float]]:
    """Return the seconds of each repeat of each case. Cases run in turn, so that a slow minute affects all of them."""
    for _ in range(warmups):
        for run in cases.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            _synchronize()
            begin = time.perf_counter()
            run()
            _synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Return the seconds of one run, measured by CUDA events or, on a CPU, by the wall clock."""
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3


def attempt(notes: list[str], measure: Callable[..., Any], *args: Any) -> Any:
    """Return measure(*args). If it fails, return None and add a note."""
    try:
        return measure(*args)
    except Exception as failure:  # of another library, or out of memory: it becomes a row of the table
        text = " ".join(str(failure).split())
        note = f"{type(failure).__name__}: {text[:160]}"
        if note not in notes:
            notes.append(note)
        return None
    finally:
        if "torch._dynamo" in sys.modules:  # not imported here, since that takes seconds
            torch.compiler.reset()  # otherwise nothing is compiled after the eighth graph
        if torch.cuda.is_available():
            # After an illegal access this raises too, and earlier measurements would be lost.
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


class Worker:
    """A case in a separate process, so that settings of one library, such as those of the allocator, affect no other.

    make: a picklable function that returns the case to run. args: its arguments. Calling the worker runs the case once.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *args: object):
        context = mp.get_context("spawn")
        self._pipe, pipe = context.Pipe()
        self._process = context.Process(target=_serve, args=(pipe, make, args), daemon=True)
        self._process.start()
        pipe.close()  # otherwise the end of the process would not end `recv`
        self()

    def __call__(self) -> None:
        try:
            self._pipe.send("run")
            self._pipe.recv()
        except (EOFError, OSError):  # which of them depends on when it ended
            raise RuntimeError("A benchmark's process ended before it answered; its error is above.") from None

    def close(self) -> None:
        self._pipe.send("stop")
        self._process.join()


def _serve(pipe: Connection, make: Callable[..., Callable[[], object]], args: tuple[object, ...]) -> None:
    run = make(*args)
    while pipe.recv() == "run":
        run()
        _synchronize()
        pipe.send(None)


def matmul_rate(dtype: torch.dtype, device: str = "cpu", size: int = 1024, repeats: int = 7) -> float:
    """Return the FLOP/s of a square matrix product, the median of `repeats`."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = interleaved_seconds({"matmul": lambda: a @ b}, repeats=repeats)["matmul"]
    return 2 * size**3 / statistics.median(seconds)


def machine() -> dict[str, Any]:
    """Return a description of the hardware and the versions."""
    cpu = next(
        (line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("transformers", "triton", "flash-linear-attention")},
        "ptxas": _ptxas_versions(),
        "cuda": torch.version.cuda,
        "driver": _driver_version(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _ptxas_versions() -> dict[str, str]:
    """Return the versions of Triton's copies of ptxas. Which one compiles for Hopper depends on Triton's version."""
    versions = {}
    for name in ("ptxas", "ptxas_blackwell"):
        # Triton, or one of the two, may be missing.
        with contextlib.suppress(ImportError, AttributeError, RuntimeError):
            from triton import knobs

            versions[name] = getattr(knobs.nvidia, name).version
    return versions


def _driver_version() -> str | None:
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flag --output."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, help="write figures, hardware and versions to this JSON file")
    return parser


def show(title: str, rows: list[dict[str, Any]], output: Path | None, **facts: Any) -> None:
    """Print `rows` as a table and write them, with the machine and `facts`, to `output`."""
    from rich.console import Console  # imported here, since programs that only time do not need it
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=max(Console().width, 150)).print(table)  # wide enough for a log file too
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        record = {"title": title, "machine": machine(), **facts, "rows": rows}
        output.write_text(json.dumps(record, indent=2) + "\n")
        print(f"written to {output}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
