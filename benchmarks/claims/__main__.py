"""Checks claims of the paper on a small scale: python -m benchmarks.claims NAME

If NAME is throughput, decoding, recall, loss or experts, the program measures what the claim's JSON file lacks, draws
its picture and writes docs/results.md. After a kill the same command resumes. `pictures` draws all pictures and `page`
writes the page; both read only the JSON files.
"""

import argparse
from pathlib import Path

from benchmarks.claims.page import CHECKS, draw, page
from benchmarks.claims.record import fill

PAGE = Path("docs/results.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=[*CHECKS, "pictures", "page"])
    parser.add_argument(
        "--processes", type=int, default=1, help="runs at the same time, for claims about trained models"
    )
    arguments = parser.parse_args()
    name, processes = arguments.name, arguments.processes
    if processes < 1:
        parser.error(f"--processes {processes} must be at least 1.")
    if processes > 1 and name in ("throughput", "decoding"):
        parser.error(f"{name} measures time: it takes --processes 1 only.")
    if name in CHECKS:
        fill(name, CHECKS[name].units(), CHECKS[name].measure, processes=processes)
    for drawn in CHECKS if name == "pictures" else [name] if name in CHECKS else []:
        draw(drawn)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
