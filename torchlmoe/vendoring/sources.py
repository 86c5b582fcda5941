"""Finds the files of torchlmoe and their imports with `ast`. Nothing is imported or run."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torchlmoe

PACKAGE = "torchlmoe"
KERNELS = "torchlmoe.kernels"
STYLES = "torchlmoe.styles"


@cache
def path_of(module: str) -> Path | None:
    """Returns the file of a module, or the __init__.py of a package; None if there is none."""
    for root in torchlmoe.__path__:
        place = Path(root, *module.split(".")[1:])
        for path in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if module.startswith(f"{PACKAGE}.") and path.is_file():
                return path
    return None


def text_of(module: str) -> str:
    """Returns the source of a module."""
    path = path_of(module)
    assert path is not None, module
    return path.read_text(encoding="utf-8")


@cache
def tree_of(module: str) -> ast.Module:
    """Returns the syntax tree of a module."""
    return ast.parse(text_of(module))


def modules_in(package: str) -> list[str]:
    """Returns the modules in the folder of a package, sorted."""
    folders = (Path(root, *package.split(".")[1:]) for root in torchlmoe.__path__)
    return sorted(f"{package}.{path.stem}" for folder in folders for path in folder.glob("[!_]*.py"))


def imports_of(tree: ast.AST, module: str) -> Iterator[tuple[str, str | None]]:
    """Yields all imports in a tree, also in functions: (module, name), or (module, None) for `import module`.

    module: the module of the tree, to which relative imports refer.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((source_of(node, module), alias.name) for alias in node.names)


def source_of(node: ast.ImportFrom, module: str) -> str:
    """Returns the absolute name of the module that `from ... import` refers to. module: the importing one."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")[: -node.level]
    return ".".join([*parts, node.module] if node.module else parts)


def is_package(module: str) -> bool:
    """Whether a module is a package of torchlmoe."""
    path = path_of(module)
    return path is not None and path.name == "__init__.py"


@cache
def providers(module: str, name: str | None) -> list[str]:
    """Returns the modules of torchlmoe that `from module import name` needs.

    For a package these are its __init__.py and the modules that it imports for the name. A name in the __init__.py
    takes precedence over a file of the same name.
    """
    if is_package(module):
        tree = tree_of(module)
        passed_on = [(origin, imported) for origin, imported in imports_of(tree, module) if imported == name]
        defined = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        if passed_on or name in defined:
            needed = passed_on or needed_by_definitions(tree, module)
            return [module, *(file for imported in needed for file in providers(*imported))]
    found = f"{module}.{name}"
    return [found] if name is not None and path_of(found) else [module] if path_of(module) else []


def needed_by_definitions(tree: ast.Module, module: str) -> list[tuple[str, str | None]]:
    """Returns the imports that an __init__.py uses itself, not those that it only lists in a table such as MIXERS."""
    listed = {id(value) for table in ast.walk(tree) if isinstance(table, ast.Dict) for value in table.values}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in listed}
    return [imported for imported in imports_of(tree, module) if imported[1] in used]


def foreign_imports(module: str, tree: ast.Module) -> set[str]:
    """Returns the top-level packages, without the standard library and torchlmoe, that importing the file needs."""
    statements = (node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    found = {name.split(".")[0] for node in statements for name, _ in imports_of(node, module)}
    return found - sys.stdlib_module_names - {PACKAGE}
