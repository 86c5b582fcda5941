"""The figures of a claim: one JSON file, to which a row is added whenever a unit of work is done."""

import json
import math
import multiprocessing
import statistics
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.claims.table import CLAIMS
from benchmarks.report import machine

RESULTS = Path(__file__).parent.parent / "results"
Unit = dict[str, Any]


def path_of(name: str, folder: Path = RESULTS) -> Path:
    return folder / f"claim_{name}.json"


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Return the record of a claim, without rows if there is no file.

    Raises ValueError if the file was measured at other sizes than those of the table.
    """
    path, sizes = path_of(name, folder), json.loads(json.dumps(CLAIMS[name].sizes))
    if not path.exists():
        return {"sizes": sizes, "rows": []}
    record = json.loads(path.read_text())
    if record["sizes"] != sizes:
        raise ValueError(f"{path} was measured at other sizes than those of benchmarks/claims/table.py: remove it.")
    return record


def fill(
    name: str,
    units: list[Unit],
    measure: Callable[[Unit], dict[str, Any]],
    folder: Path = RESULTS,
    processes: int = 1,
) -> None:
    """Measure the units that the file lacks, in order. After a kill, the next call resumes with the first of them.

    processes: how many units are measured at the same time, each in a thread that waits for its own processes.
    """
    record, writing = read(name, folder), threading.Lock()
    done = [row["unit"] for row in record["rows"]]

    def add(number: int, unit: Unit) -> None:
        print(f"{name}, {number + 1} of {len(units)}: {unit}", flush=True)
        row = {"unit": unit, "machine": machine(), **measure(unit)}
        with writing:
            record["rows"].append(row)
            path = path_of(name, folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(".partial")
            beside.write_text(json.dumps(record, indent=1) + "\n")
            beside.replace(path)

    left = [(number, unit) for number, unit in enumerate(units) if unit not in done]
    if processes == 1:
        for number, unit in left:
            add(number, unit)
        return
    with ThreadPoolExecutor(processes) as pool:
        running = [pool.submit(add, number, unit) for number, unit in left]
        try:
            for each in as_completed(running):
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def in_a_process(function: Callable[[Unit], Any], unit: Unit) -> Any:
    """Return function(unit), run in a new process, so that its memory is that of this unit only."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (unit,))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and two of its standard errors, which are infinite for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, float("inf")
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, 2 * (variance / len(values)) ** 0.5


def median_and_error(values: list[float]) -> tuple[float, float]:
    """Return the median and half of its 95% range, which is given by two order statistics.

    Used for times, since other work on the machine slows some of them.
    """
    ordered, number = sorted(values), len(values)
    low = max(0, math.floor(number / 2 - number**0.5))
    return statistics.median(ordered), (ordered[number - 1 - low] - ordered[low]) / 2


def paired_ratio_and_error(above: list[float], below: list[float]) -> tuple[float, float]:
    """Return the median ratio of times that were measured in turn, so that a slow spell of the machine cancels."""
    return median_and_error([top / bottom for top, bottom in zip(above, below, strict=True)])


def ratio_and_error(above: list[float], below: list[float]) -> tuple[float, float]:
    """Return the ratio of two medians and its error, to first order in their errors."""
    (top, top_error), (bottom, bottom_error) = median_and_error(above), median_and_error(below)
    return top / bottom, top / bottom * ((top_error / top) ** 2 + (bottom_error / bottom) ** 2) ** 0.5


def of(rows: list[dict[str, Any]], **unit: Any) -> list[dict[str, Any]]:
    """Return the rows whose unit has these values."""
    return [row for row in rows if all(row["unit"].get(key) == value for key, value in unit.items())]
