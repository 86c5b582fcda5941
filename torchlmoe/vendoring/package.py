"""A package of one's own with some parts of torchlmoe: which files it has, and what is in them."""

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
    """files: text by path in the folder. requirements: packages of others, such as "torch>=2.11"."""

    files: dict[str, str]
    requirements: list[str]

    def num_lines(self) -> dict[str, int]:
        """Of every Python file."""
        return {path: text.count("\n") for path, text in self.files.items() if path.endswith(".py")}

    def write(self, folder: Path) -> None:
        for path, text in self.files.items():
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")


def package_of(
    names: Sequence[str], folder: Path, kernels_of_all: bool = False, styles_of_all: bool = False
) -> Package:
    """What `folder` is to hold. Raises ValueError for an unknown name and a folder that cannot be.

    kernels_of_all, styles_of_all: whether the kernels that serve the parts, or their styles, come with their tests.
    If a kernel or a style is named, those of the other parts come too, since existing files will be imported.
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
    """The text with another package in the place of torchlmoe: in imports and in names of torch's operations, which two
    packages in one process must not share."""
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
    """By which the folder is imported, inside the packages that it lies in."""
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
    """What tests a copy, on a CPU too: Triton decides whether to interpret kernels when anything first imports it."""
    interpreted = any(path.startswith("kernels/") for path in package.files)
    return f"{'TRITON_INTERPRET=1 ' * interpreted}python -m pytest {place}"


def source_version(modules: list[str]) -> str:
    """The version of torchlmoe and, from a checkout, its commit and whether the files have changed since."""
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
    """By package, what pyproject.toml asks of it, such as "torch>=2.11"."""
    if (CHECKOUT / "pyproject.toml").is_file():
        project = read_toml(CHECKOUT / "pyproject.toml")["project"]
        requirements = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    else:
        requirements = metadata.requires(PACKAGE) or []
    found = (re.match(r"([\w-]+)[^;\s]*", requirement) for requirement in requirements)
    return {match[1]: match[0] for match in found if match}


def _license() -> str:
    """Of the checkout, or of the installed package."""
    path = CHECKOUT / "LICENSE"
    if not path.is_file():
        (path,) = (Path(str(file.locate())) for file in metadata.files(PACKAGE) or [] if file.name == "LICENSE")
    return path.read_text(encoding="utf-8")
