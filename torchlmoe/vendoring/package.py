"""Makes a separate package of some parts of torchlmoe: its files and their content."""

import keyword
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torchlmoe
from torchlmoe.files import read_toml
from torchlmoe.vendoring.composed import composed_test
from torchlmoe.vendoring.names import Part, part_of
from torchlmoe.vendoring.names import parts as all_parts
from torchlmoe.vendoring.needed import needed, parsed
from torchlmoe.vendoring.registry import thinned
from torchlmoe.vendoring.sources import PACKAGE, foreign_imports, path_of

CHECKOUT = Path(torchlmoe.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Package:
    """The package. files: path in its folder -> text. requirements: such as "torch>=2.11"."""

    files: dict[str, str]
    requirements: list[str]

    def num_lines(self) -> dict[str, int]:
        """Path of each Python file -> its number of lines."""
        return {path: text.count("\n") for path, text in self.files.items() if path.endswith(".py")}

    def write(self, folder: Path) -> None:
        """Write all files to a folder."""
        for path, text in self.files.items():
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")


def package_of(
    names: Sequence[str], folder: Path, kernels_of_all: bool = False, styles_of_all: bool = False
) -> Package:
    """Returns the package for `folder`. Raises ValueError for an unknown name, and for a folder that cannot be one.

    kernels_of_all, styles_of_all: include the kernels of the parts, or their parallel styles, with their tests.
    If `names` has a kernel or a style, the kernels or styles of other parts are included too.
    """
    parts = _with_companions(names)
    with_kernels = kernels_of_all or any(part.kind == "kernel" for part in parts)
    with_styles = styles_of_all or any(part.kind == "parallel style" for part in parts)
    texts, packages = needed([module for part in parts for module in part.modules], with_kernels, with_styles)
    requirements = sorted({name for module, text in texts.items() for name in foreign_imports(module, parsed(text))})
    name = _package_name(folder, requirements)

    files = {"__init__.py": _init(parts)}
    for module, text in texts.items():
        path = module.split(".")[1:]
        for depth in range(1, len(path)):
            parent = ".".join([PACKAGE, *path[:depth]])
            files["/".join([*path[:depth], "__init__.py"])] = thinned(parent, texts) if parent in packages else ""
        files["/".join(path) + ".py"] = text
    brought = [kind for kind, there in {"kernel": with_kernels, "parallel style": styles_of_all}.items() if there]
    others = [part for part in all_parts().values() if part.kind in brought and part.modules[0] in texts]
    files[f"test_{folder.name}.py"] = composed_test(dict.fromkeys([*parts, *others]))
    files = {path: renamed(text, name) for path, text in sorted(files.items())}
    minimum = _minimum_versions()
    package = Package(files, [minimum.get(requirement, requirement) for requirement in requirements])
    left_out = [room for room, there in {"kernels": with_kernels, "styles": with_styles}.items() if not there]
    files["README.md"] = _readme(package, parts, source_version(list(texts)), name, minimum["pytest"], left_out)
    files["LICENSE"] = _license()
    return package


def renamed(text: str, name: str) -> str:
    """Replaces torchlmoe by package `name`, in imports and in names of torch's custom operations.

    Two packages in one process must not register the same operations.
    """
    namespace = name.replace(".", "_")
    text = re.sub(r"\btorchlmoe(?=::)|(?<=torch\.ops\.)torchlmoe\b", namespace, text)
    return re.sub(r"\btorchlmoe(?=\.\w)|(?<=^import )torchlmoe\b", name, text, flags=re.MULTILINE)


def _with_companions(names: Sequence[str]) -> list[Part]:
    found: dict[str, Part] = {}
    for name in names:
        part = part_of(name)
        for each in (part, *map(part_of, part.companions)):
            found.setdefault(each.name, each)
    return list(found.values())


def _package_name(folder: Path, requirements: list[str]) -> str:
    """The full name of the package in `folder`, with the packages that contain it. Raises ValueError if it has none."""
    name = folder.name
    taken = {PACKAGE, "pytest", *requirements, *sys.stdlib_module_names}
    if not name.isidentifier() or keyword.iskeyword(name) or name in taken:
        reason = "is the name of another package" if name in taken else "is not a name that Python can import"
        raise ValueError(f"--output {folder}: {name!r} {reason}; choose another for the folder.")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"--output {folder} exists and is not an empty folder; choose another.")
    parents: list[str] = []
    for parent in folder.parents:
        if not (parent / "__init__.py").is_file():
            break
        parents.insert(0, parent.name)
    return ".".join([*parents, name])


def _init(parts: list[Part]) -> str:
    exports = {str(part.exported): part.modules[0] for part in parts if part.exported is not None}
    lines = [f'"""Parts of torchlmoe, copied: {", ".join(part.name for part in parts)}. README.md says from where."""']
    if exports:
        imports = sorted(f"from {module} import {export}" for export, module in exports.items())
        lines += ["", *imports, "", f"__all__ = {sorted(exports)}".replace("'", '"')]
    return "\n".join(lines) + "\n"


def _readme(package: Package, parts: list[Part], version: str, name: str, pytest: str, left_out: list[str]) -> str:
    lines = package.num_lines()
    title = name.rpartition(".")[2]
    without = {
        "kernels": 'Triton kernels were left out (--kernels): backend = "triton" raises an error.',
        "styles": "Parallel styles were left out (--styles), and the methods that name them.",
    }
    table = "\n".join(f"| `{path}` | {count} |" for path, count in lines.items())
    return f"""# {title}

{", ".join(f"`{part.name}`" for part in parts)}, copied from torchlmoe {version} by `python -m torchlmoe.vendor`.
Nothing here imports torchlmoe.

Needs Python 3.10 or later and {", ".join(package.requirements)}; the test also {pytest}:

    {test_command(package, f"test_{title}.py")}

The files are as they are in torchlmoe, but that they import each other from `{name}` and that operations are registered
with torch under that name. {" ".join(without[room] for room in left_out)}

Licence: Apache-2.0 (`LICENSE`).

| file | lines |
|---|---|
{table}
| together | {sum(lines.values())} |
"""


def test_command(package: Package, place: str) -> str:
    """Returns the shell command that tests a copy. TRITON_INTERPRET runs its kernels without a GPU."""
    interpreted = any(path.startswith("kernels/") for path in package.files)
    return f"{'TRITON_INTERPRET=1 ' * interpreted}python -m pytest {place}"


def source_version(modules: list[str]) -> str:
    """Returns the version of torchlmoe and, in a checkout, its commit and whether the files have changed since."""
    version = torchlmoe.__version__
    try:
        commit = _git("rev-parse", "HEAD")
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != CHECKOUT:
            return version
        changed = _git("status", "--porcelain", "--", *(str(path_of(module)) for module in modules))
    except (OSError, subprocess.CalledProcessError):
        return version
    return f"{version}, commit {commit}{' with changes' if changed else ''},"


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def _minimum_versions() -> dict[str, str]:
    """Package -> its requirement in pyproject.toml, such as "torch>=2.11"."""
    if (CHECKOUT / "pyproject.toml").is_file():
        project = read_toml(CHECKOUT / "pyproject.toml")["project"]
        requirements = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    else:
        requirements = metadata.requires(PACKAGE) or []
    found = (re.match(r"([\w-]+)[^;\s]*", requirement) for requirement in requirements)
    return {match[1]: match[0] for match in found if match}


def _license() -> str:
    """The text of the license, from the checkout or the installed package."""
    path = CHECKOUT / "LICENSE"
    if not path.is_file():
        (path,) = (Path(str(file.locate())) for file in metadata.files(PACKAGE) or [] if file.name == "LICENSE")
    return path.read_text(encoding="utf-8")
