"""Copies parts into your own package: python -m torchlmoe.vendor NAME ... --output FOLDER [--kernels] [--styles]

NAME is a mixer, `moe`, an operation, a kernel or a parallel style; --list prints all names. FOLDER becomes a package
that does not import torchlmoe. It has exactly the files that NAME needs, and a test.
"""

from itertools import groupby
from pathlib import Path

from torchlmoe.command import FlagParser, run
from torchlmoe.vendoring.names import parts
from torchlmoe.vendoring.package import package_of, test_command


def main(arguments: list[str]) -> None:
    parser = FlagParser(prog="python -m torchlmoe.vendor", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help="a part to copy, such as gated_deltanet")
    parser.add_path("--output", metavar="FOLDER", help="the package to write; a new or an empty folder")
    parser.add_argument("--kernels", action="store_true", help="include the Triton kernels of the part")
    parser.add_argument("--styles", action="store_true", help="include the parallel styles that split it over ranks")
    parser.add_argument("--list", action="store_true", help="print all names and end")
    options = parser.parse_args(arguments)
    if options.list:
        print(listing())
        return
    if not options.names or options.output is None:
        raise ValueError("Give a NAME, or several, and --output FOLDER; --list prints all names.")
    folder = Path(options.output).resolve()
    package = package_of(options.names, folder, options.kernels, options.styles)
    package.write(folder)
    lines = package.num_lines()
    for path, count in lines.items():
        print(f"{count:6,}  {path}")
    print(
        f"{sum(lines.values()):6,}  lines of Python in {options.output}, which needs {', '.join(package.requirements)}"
    )
    print(f"        test it with: {test_command(package, options.output)}")


def listing() -> str:
    """Returns all names, one line per kind of part."""
    kinds = groupby(parts().values(), key=lambda part: part.kind)
    return "\n".join(f"{kind}: {' '.join(part.name for part in group)}" for kind, group in kinds)


if __name__ == "__main__":
    run(main)
