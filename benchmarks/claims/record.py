"""The figures of a claim: one JSON file, to which each unit of work is added as soon as it is done."""

import json
import math
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.claims.table import CLAIMS
from benchmarks.report import machine

RESULTS = Path(__file__).parent.parent / "results"
Unit = dict[str, Any]


def path_of(name: str, folder: Path = RESULTS) -> Path:
    return folder / f"claim_{name}.json"


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """What was measured at the sizes of the table; nothing, if there is no file.

    Raises ValueError for a file of other sizes.
    """
    path, sizes = path_of(name, folder), json.loads(json.dumps(CLAIMS[name].sizes))
    if not path.exists():
        return {"sizes": sizes, "rows": []}
    record = json.loads(path.read_text())
    if record["sizes"] != sizes:
        raise ValueError(f"{path} was measured at other sizes than those of benchmarks/claims/table.py: remove it.")
    return record


def fill(name: str, units: list[Unit], measure: Callable[[Unit], dict[str, Any]], folder: Path = RESULTS) -> None:
    """Measures the units that the file lacks, in order. Killed, it resumes with the unit that was not done."""
    record = read(name, folder)
    done = [row["unit"] for row in record["rows"]]
    for number, unit in enumerate(units):
        if unit in done:
            continue
        print(f"{name}, {number + 1} of {len(units)}: {unit}", flush=True)
        record["rows"].append({"unit": unit, "machine": machine(), **measure(unit)})
        path = path_of(name, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(record, indent=1) + "\n")
        beside.replace(path)


def in_a_process(function: Callable[[Unit], Any], unit: Unit) -> Any:
    """function(unit) in a fresh process, whose memory is that of the unit alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (unit,))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and two standard errors of it; an infinite error of a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, float("inf")
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, 2 * (variance / len(values)) ** 0.5


def median_and_error(values: list[float]) -> tuple[float, float]:
    """The median, and half of the range between the order statistics that hold it with 95%.

    Of times, on which other work on the machine falls now and then.
    """
    ordered, number = sorted(values), len(values)
    low = max(0, math.floor(number / 2 - number**0.5))
    return statistics.median(ordered), (ordered[number - 1 - low] - ordered[low]) / 2


def ratio_and_error(above: list[float], below: list[float]) -> tuple[float, float]:
    """Of two medians, to first order in their errors."""
    (top, top_error), (bottom, bottom_error) = median_and_error(above), median_and_error(below)
    return top / bottom, top / bottom * ((top_error / top) ** 2 + (bottom_error / bottom) ** 2) ** 0.5


def of(rows: list[dict[str, Any]], **unit: Any) -> list[dict[str, Any]]:
    """The rows whose unit has these values."""
    return [row for row in rows if all(row["unit"].get(key) == value for key, value in unit.items())]
