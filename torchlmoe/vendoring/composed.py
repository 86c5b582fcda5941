"""Composes the test of a copy: the checks of its parts, concatenated in one file."""

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from torchlmoe.vendoring.names import CHECKS, Part
from torchlmoe.vendoring.needed import import_line
from torchlmoe.vendoring.sources import imports_of, text_of, tree_of

KINDS_LINE = "KINDS: list[type[Mixer]] = []"  # in the check of mixers; replaced by the copied mixers


def composed_test(parts: Iterable[Part]) -> str:
    """Returns the source of the test. It imports from torchlmoe, like the checks themselves."""
    parts = list(parts)
    checks: list[str] = []
    for part in parts:
        _add(part.check, checks)
    defined = Counter(name for check in checks for name in _definitions(check))
    twice = [name for name, count in defined.items() if count > 1]
    assert not twice, f"Checks that may be joined both define {twice}."
    statements: list[ast.stmt] = []
    bodies = []
    for check in checks:
        imports, body = _split(check)
        statements += imports
        bodies.append(body)
    mixers = [part for part in parts if part.kind == "mixer"]
    for part in mixers:
        statements += ast.parse(f"from {part.modules[0]} import {part.exported}").body
    kinds = KINDS_LINE.replace("[]", f"[{', '.join(str(part.exported) for part in mixers)}]")
    asked = dict.fromkeys(part.check for part in parts)
    docstring = '"""' + "\n".join(str(ast.get_docstring(tree_of(check))) for check in asked) + '"""'
    body = "\n\n\n".join(bodies).replace(KINDS_LINE, kinds)
    return f"{docstring}\n\n{_merged(statements)}\n\n{body}\n"


def _add(check: str, checks: list[str]) -> None:
    """Appends a check, if it is not in the list, after the checks that it imports."""
    if check in checks:
        return
    for module, _ in imports_of(tree_of(check), check):
        if module.startswith(f"{CHECKS}."):
            _add(module, checks)
    checks.append(check)


def _definitions(check: str) -> Iterator[str]:
    for node in tree_of(check).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name))


def _split(check: str) -> tuple[list[ast.stmt], str]:
    """The imports at the beginning of a file, without those of other checks, and the text after them."""
    tree = tree_of(check)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    kept = [x for x in imports if not (isinstance(x, ast.ImportFrom) and str(x.module).startswith(f"{CHECKS}."))]
    lines = text_of(check).splitlines()
    return list(kept), "\n".join(lines[imports[-1].end_lineno :]).strip("\n")


def _merged(statements: Iterable[ast.stmt]) -> str:
    """Merges imports: each name once, in the usual groups and order."""
    whole: set[str] = set()
    names: dict[str, set[str]] = defaultdict(set)
    for node in statements:
        if isinstance(node, ast.ImportFrom):
            names[str(node.module)] |= {ast.unparse(alias) for alias in node.names}
        elif isinstance(node, ast.Import):
            whole |= {ast.unparse(alias) for alias in node.names}
    written = [(name, f"import {name}") for name in whole]
    written += [(module, import_line(module, sorted(names[module]))) for module in names]
    groups: list[list[str]] = [[], [], []]
    for module, line in sorted(written, key=lambda entry: (entry[1].startswith("from"), entry[0])):
        first = module.split(".")[0]
        groups[0 if first in sys.stdlib_module_names else 2 if first == "torchlmoe" else 1].append(line)
    return "\n\n".join("\n".join(group) for group in groups if group)
