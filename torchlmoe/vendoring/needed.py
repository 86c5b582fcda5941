"""Finds the files that a part needs, without kernels and parallel styles unless they are requested."""

import ast
from collections.abc import Iterable
from functools import cache

from torchlmoe.vendoring.sources import KERNELS, STYLES, imports_of, is_package, providers, text_of, tree_of

# Methods by which a module names its parallel styles.
STYLE_METHODS = ("context_parallel_style", "context_parallel_plan", "tensor_parallel_style")
LINE_LENGTH = 120


def needed(modules: Iterable[str], kernels: bool, styles: bool) -> tuple[dict[str, str], set[str]]:
    """Returns module -> text, for the modules and all modules of torchlmoe that they import; and imported packages.

    kernels: include kernels that modules import. styles: keep the methods that name parallel styles.
    """
    found: dict[str, str] = {}
    packages: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found[module] = text_of(module) if styles else without_styles(module)
        for imported in _imports_in(found[module], module):
            for provider in providers(*imported):
                if is_package(provider):
                    packages.add(provider)
                elif kernels or not provider.startswith(f"{KERNELS}."):
                    waiting.append(provider)
    return dict(sorted(found.items())), packages


parsed = cache(ast.parse)


@cache
def _imports_in(text: str, module: str) -> list[tuple[str, str | None]]:
    return list(imports_of(parsed(text), module))


@cache
def without_styles(module: str) -> str:
    """Returns a file's text without the methods that name a style, and without the imports that only those use."""
    tree, lines = tree_of(module), text_of(module).splitlines()
    if module.startswith(f"{STYLES}."):
        return text_of(module)
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in STYLE_METHODS]
    for method in sorted(methods, key=lambda method: -method.lineno):
        start = method.lineno - 1
        while not lines[start - 1].strip():
            start -= 1
        del lines[start : method.end_lineno]
    idle = _names(tree) - _names(ast.parse("\n".join(lines)))
    for node in reversed([node for node in tree.body if isinstance(node, ast.ImportFrom)]):
        kept = [ast.unparse(alias) for alias in node.names if (alias.asname or alias.name) not in idle]
        if len(kept) < len(node.names):
            lines[node.lineno - 1 : node.end_lineno] = [import_line(str(node.module), kept)] if kept else []
            if not kept and not lines[node.lineno - 2] and not lines[node.lineno - 1]:  # the last of its group
                del lines[node.lineno - 1]
    return "\n".join(lines) + "\n"


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def import_line(module: str, names: list[str]) -> str:
    """Returns an import statement, formatted like ruff does."""
    line = f"from {module} import {', '.join(names)}"
    return line if len(line) <= LINE_LENGTH else f"from {module} import (\n    " + ",\n    ".join(names) + ",\n)"
