"""The files of torchlmoe and what they import, read with `ast`: nothing is imported or run."""

import ast
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torchlmoe

PACKAGE = "torchlmoe"
KERNELS = "torchlmoe.kernels"


def path_of(module: str) -> Path | None:
    """The file of `module`, of a package its __init__.py; None if there is none."""
    for root in torchlmoe.__path__:
        place = Path(root, *module.split(".")[1:])
        for path in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if module.startswith(f"{PACKAGE}.") and path.is_file():
                return path
    return None


def text_of(module: str) -> str:
    path = path_of(module)
    assert path is not None, module
    return path.read_text(encoding="utf-8")


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(text_of(module))


def modules_in(package: str) -> list[str]:
    """The modules that lie in the folder of a package, sorted."""
    folders = (Path(root, *package.split(".")[1:]) for root in torchlmoe.__path__)
    return sorted(f"{package}.{path.stem}" for folder in folders for path in folder.glob("[!_]*.py"))


@cache
def imports_of(module: str) -> tuple[tuple[str, str | None], ...]:
    """Every import anywhere in the file, in functions too: (module, name), of `import module` (module, None)."""
    return tuple(imported for node in ast.walk(tree_of(module)) for imported in imported_by(node, module))


def imported_by(node: ast.AST, module: str) -> Iterator[tuple[str, str | None]]:
    """What a statement of `module` imports; nothing where it is no import."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from ((source_of(node, module), alias.name) for alias in node.names)


def source_of(node: ast.ImportFrom, module: str) -> str:
    """The module that is imported from, by its whole name."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")[: -node.level]
    return ".".join([*parts, node.module] if node.module else parts)


def is_package(module: str) -> bool:
    path = path_of(module)
    return path is not None and path.name == "__init__.py"


def providers(module: str, name: str | None) -> Iterator[str]:
    """The files of ours that `from module import name` takes it from: a package's __init__.py only stands for others,
    unless it defines the name itself."""
    if name is not None and path_of(f"{module}.{name}"):
        yield f"{module}.{name}"
    elif path_of(module):
        yield module
        if is_package(module):
            for origin, imported in imports_of(module):
                if imported == name:
                    yield from providers(origin, imported)


def closure(modules: Iterable[str], with_kernels: bool) -> tuple[list[str], set[str]]:
    """The modules and all of ours that they import, sorted, without packages; and the names of packages from which a
    name is imported. Kernels that are named are taken; those that others import, only `with_kernels`.
    """
    found: set[str] = set()
    packages: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        for imported in imports_of(module):
            for provider in providers(*imported):
                of_kernels = provider.startswith(f"{KERNELS}.")
                if is_package(provider):
                    packages.add(provider)
                elif not of_kernels or with_kernels or module.startswith(f"{KERNELS}."):
                    waiting.append(provider)
    return sorted(found), packages


def foreign_imports(modules: Iterable[str]) -> set[str]:
    """The top-level packages of others, beyond the standard library, without which the modules cannot be imported."""
    found = {
        name.split(".")[0]
        for module in modules
        for node in tree_of(module).body
        for name, _ in imported_by(node, module)
    }
    return found - sys.stdlib_module_names - {PACKAGE}
