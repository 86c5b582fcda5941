"""Checks that wheels fit the GPU machine: python -m benchmarks.wheels FOLDER

The check reads their metadata. Each wheel must be for Python 3.12 on x86-64 Linux, and each requirement must be met by
another wheel in the folder or by a package of the machine. Ends with 1 and a list if a wheel does not fit, or if all
together are larger than MOST_BYTES.
"""

import argparse
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

PYTHON = "3.12"
MOST_BYTES = 60_000_000
ENVIRONMENT = {
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.0",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "os_name": "posix",
    "extra": "",
}
# Packages of the machine (torch, transformers, pytest and their requirements), with their versions if known.
PRESENT = {"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.5.0"} | dict.fromkeys(
    "pandas pyarrow filelock fsspec huggingface-hub packaging pyyaml requests httpx tqdm xxhash cloudpickle "
    "markdown-it-py pygments".split()
)


def faults(folder: Path) -> list[str]:
    """Return a sentence for each wheel or requirement that does not fit."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        return [f"{folder} holds no wheels; bash benchmarks/gpu_wheels.sh {folder} fetches them."]
    found, parsed = [], {path: parse_wheel_filename(path.name) for path in wheels}
    versions = {name: version for name, version, _, _ in parsed.values()}
    if (size := sum(path.stat().st_size for path in wheels)) > MOST_BYTES:
        found.append(f"The wheels are {size:,} bytes together; {MOST_BYTES:,} are allowed.")
    for path, (_, _, _, tags) in parsed.items():
        interpreters = {f"cp{PYTHON.replace('.', '')}", f"py{PYTHON.replace('.', '')}", "py3"}
        if not any(
            (tag.interpreter in interpreters or tag.abi == "abi3")
            and (tag.platform == "any" or ("manylinux" in tag.platform and tag.platform.endswith("x86_64")))
            for tag in tags
        ):
            found.append(f"{path.name} is not for Python {PYTHON} on x86-64 Linux.")
        metadata = _metadata(path)
        if not SpecifierSet(metadata.get("Requires-Python", "")).contains(f"{PYTHON}.0"):
            found.append(f"{path.name} requires Python {metadata['Requires-Python']}.")
        for text in metadata.get_all("Requires-Dist", []):
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate(ENVIRONMENT):
                continue
            name = canonicalize_name(requirement.name)
            if name not in versions and name not in PRESENT:
                found.append(f"{path.name} requires {text}, which is neither in the folder nor on the machine.")
                continue
            place, version = ("folder", versions[name]) if name in versions else ("machine", PRESENT[name])
            if version is not None and not requirement.specifier.contains(version, prereleases=True):
                found.append(f"{path.name} requires {text}, and the {place} has {name} {version}.")
    return found


def _metadata(path: Path):
    with zipfile.ZipFile(path) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(wheel.read(name).decode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    found = faults(folder)
    print("\n".join(found) or f"{len(list(folder.glob('*.whl')))} wheels in {folder} fit Python {PYTHON}.")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
