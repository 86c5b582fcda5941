"""The files of torchlmoe and what they import, read with `ast`: nothing is imported or run."""

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


def imports_of(tree: ast.AST, module: str) -> Iterator[tuple[str, str | None]]:
    """Every import anywhere in the tree, in functions too: (module, name), of `import module` (module, None).

    module: the one that the tree is of, from which relative imports start.
    """
    for node in ast.walk(tree):
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


@cache
def providers(module: str, name: str | None) -> list[str]:
    """The files of ours that `from module import name` takes it from: a package's __init__.py with what that imports
    for the name, which comes before a file of the same name."""
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
    """The imports that an __init__.py itself uses, other than to list them in a table such as MIXERS."""
    listed = {id(value) for table in ast.walk(tree) if isinstance(table, ast.Dict) for value in table.values}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in listed}
    return [imported for imported in imports_of(tree, module) if imported[1] in used]


def foreign_imports(module: str, tree: ast.Module) -> set[str]:
    """The top-level packages of others, beyond the standard library, without which the file cannot be imported."""
    statements = (node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    found = {name.split(".")[0] for node in statements for name, _ in imports_of(node, module)}
    return found - sys.stdlib_module_names - {PACKAGE}
