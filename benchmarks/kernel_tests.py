"""Runs tests and records how many passed, on which machine: python -m benchmarks.kernel_tests FILE ... --output FILE"""

import sys
from typing import Any

import pytest

from benchmarks.report import arguments, show


class Counter:
    """A pytest plugin that counts outcomes."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failures.append(report.nodeid)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    options = parser.parse_args()
    counter = Counter()
    status = pytest.main(["-q", "-n", "8", *options.files], plugins=[counter])
    show("Tests", [{"files": " ".join(options.files), **counter.counts}], options.output, failures=counter.failures)
    sys.exit(status)


if __name__ == "__main__":
    main()
