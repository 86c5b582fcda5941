"""Imports have one direction: each folder of the package is a room, and no file imports from a room above its own."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up. Rooms of one row do not import each other.
ROOMS = [
    ["kernels", "assets", "files", "options", "registry", "styles"],
    ["ops"],
    ["layers"],
    ["routing"],
    ["feed_forwards", "mixers"],
    ["model", "moe"],
    ["data", "interop", "optim"],
    ["config"],
    ["parallel"],
    ["checkpoint", "inference"],
    ["evaluation"],
    ["training"],
    ["planning"],
    ["command", "config_loader", "settings_reference", "vendoring"],
    ["tuning"],
    ["evaluate", "export", "generate", "import_model", "plan", "prepare", "tune", "vendor"],
]
# Rooms that need no other package, and no other room.
TORCH_ALONE = ("styles", "kernels")


def modules() -> dict[str, Path]:
    """Every module by its dotted name; kernels and assets lie beside the package."""
    found = {}
    for folder, package in (("torchlmoe", "torchlmoe"), ("kernels", "torchlmoe.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(module: str, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """What a module imports, and whether that happens as the file is loaded rather than inside a function."""
    tree = ast.parse(known[module].read_text())
    inside = {
        id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # kernels, which are copied alone
                base = ".".join([*module.split(".")[: -node.level], base])
            submodules = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in known else base for name in submodules]
        else:
            continue
        for name in names:
            yield name, id(node) not in inside


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.fixture(scope="module")
def known():
    return modules()


def test_no_import_goes_up(known):
    level = {name: index for index, row in enumerate(ROOMS) for name in row}
    missing = {room(module) for module in known if "." in module} - level.keys()
    assert not missing, f"give {missing} a place in ROOMS"
    for module in known:
        for other, _ in imports(module, known):
            if "." not in module or not other.startswith("torchlmoe.") or room(other) == room(module):
                continue
            assert level[room(other)] < level[room(module)], f"{module} imports {other}, which is not below it"


def test_no_circle_of_files(known):
    graph = {
        module: {other for other, at_load in imports(module, known) if at_load and other in known and other != module}
        for module in known
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_styles_and_kernels_need_torch_and_triton_alone(known):
    for module in known:
        if "." in module and room(module) in TORCH_ALONE:
            others = {name.partition(".")[0] for name, _ in imports(module, known)}
            for other in others - {"torchlmoe"}:
                standard = other in sys.stdlib_module_names
                assert standard or other in ("torch", "triton"), f"{module} imports {other}"
            inside = {name for name, _ in imports(module, known) if name.startswith("torchlmoe.")}
            assert {room(name) for name in inside} <= {room(module)}, f"{module} imports {inside}"
