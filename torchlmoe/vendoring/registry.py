"""Reduces a package's __init__.py to the modules that were copied."""

import ast
from collections.abc import Container

from torchlmoe.vendoring.sources import is_package, providers, source_of, text_of, tree_of


def thinned(package: str, copied: Container[str]) -> str:
    """Returns the source of a package's __init__.py without imports of modules that are not in `copied`.

    Entries of __all__ and of tables such as MIXERS for these imports are removed too.
    """
    tree, lines = tree_of(package), text_of(package).splitlines()
    absent: set[str] = set()
    dropped: list[ast.stmt | ast.expr] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = source_of(node, package)
            files = {file for alias in node.names for file in providers(module, alias.name) if not is_package(file)}
            if any(file not in copied for file in files):
                absent |= {alias.asname or alias.name for alias in node.names}
                dropped.append(node)
    for table in ast.walk(tree):
        if isinstance(table, ast.Dict):
            dropped += [value for value in table.values if isinstance(value, ast.Name) and value.id in absent]
        elif isinstance(table, ast.List):
            dropped += [value for value in table.elts if isinstance(value, ast.Constant) and value.value in absent]
    gone = {number for node in dropped for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in gone) + "\n"
