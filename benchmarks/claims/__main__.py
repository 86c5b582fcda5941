"""The paper's claims, checked small: python -m benchmarks.claims NAME

NAME is throughput, decoding, recall, loss or experts: measures what is missing, draws the picture and writes
docs/results.md. Killed, the same command resumes. NAME pictures, or page, makes these from the JSON files alone.
"""

import argparse
from pathlib import Path

from benchmarks.claims.page import CHECKS, draw, page
from benchmarks.claims.record import fill

PAGE = Path("docs/results.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=[*CHECKS, "pictures", "page"])
    name = parser.parse_args().name
    if name in CHECKS:
        fill(name, CHECKS[name].units(), CHECKS[name].measure)
    for drawn in CHECKS if name == "pictures" else [name] if name in CHECKS else []:
        draw(drawn)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
