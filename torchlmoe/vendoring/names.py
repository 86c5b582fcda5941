"""Lists the parts that can be copied. They are found in the source, so a new mixer or operation needs no entry."""

import ast
import difflib
from dataclasses import dataclass
from functools import cache

from torchlmoe.vendoring.sources import KERNELS, STYLES, is_package, modules_in, path_of, providers, text_of, tree_of

STYLE_BASES = ("StateStyle", "Halo")  # base classes of styles, which are not styles themselves
CHECKS = "torchlmoe.vendoring.checks"
# What a name needs beyond what its files import: MIXERS of a copy holds what was copied, and this is `inner`'s default.
COMPANIONS = {"mom": ("gated_deltanet",)}


@dataclass(frozen=True)
class Part:
    """A part that can be copied.

    modules: those that define it. exported: its name in the first of them; None for a kernel, which the package must
    not
        import, since Triton decides at the import whether to interpret it.
    check: the module with its test. companions: names of parts that are copied with it.
    """

    name: str
    kind: str
    modules: tuple[str, ...]
    exported: str | None
    check: str
    companions: tuple[str, ...] = ()


@cache
def parts() -> dict[str, Part]:
    """Returns all parts by name, sorted by kind."""
    moe = providing("torchlmoe.feed_forwards", "MoE")
    found = [
        *(_mixer(name, kind) for name, kind in _mixers()),
        Part("moe", "mixture of experts", (moe,), "MoE", f"{CHECKS}.moe"),
        *_operations(),
        *_kernels(),
        *_styles(),
    ]
    return {part.name: part for part in found}


def part_of(name: str) -> Part:
    """Returns a part by name. Raises ValueError, with the nearest names, for an unknown name."""
    found = parts()
    if name in found:
        return found[name]
    lowered = {known.lower(): known for known in found}
    nearest = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, 3, 0.5)]
    near = f"; the nearest are {', '.join(nearest)}" if nearest else ""
    raise ValueError(
        f"{name!r} is not a mixer, operation, kernel or style of torchlmoe{near} (--list prints all names)."
    )


def providing(module: str, name: str) -> str:
    """Returns the module that defines the result of `from module import name`."""
    return next(provider for provider in providers(module, name) if not is_package(provider))


def _mixer(name: str, kind: str) -> Part:
    file = providing("torchlmoe.mixers", kind)
    return Part(name, "mixer", (file,), kind, f"{CHECKS}.mixers", COMPANIONS.get(name, ()))


def _mixers() -> list[tuple[str, str]]:
    """(name, class name) of every row of MIXERS."""
    for node in tree_of("torchlmoe.mixers").body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MIXERS":
            assert node.value is not None
            table = next(found for found in ast.walk(node.value) if isinstance(found, ast.Dict))
            rows = zip(table.keys, table.values, strict=True)
            return [(ast.literal_eval(key), ast.unparse(kind)) for key, kind in rows if key is not None]
    raise AssertionError("torchlmoe/mixers/__init__.py defines no MIXERS.")


def _operations() -> list[Part]:
    """The functions of torchlmoe.ops with the decorator `operation`."""
    return [
        Part(node.name, "operation", (module,), node.name, f"{CHECKS}.{node.name}")
        for module in modules_in("torchlmoe.ops")
        for node in tree_of(module).body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(x) == "operation" for x in node.decorator_list)
    ]


def _kernels() -> list[Part]:
    """One part per file that registers a custom operation, together with its backward in a separate file, if any."""
    files = modules_in(KERNELS)
    return [
        Part(
            f"kernel:{file.rpartition('.')[2]}",
            "kernel",
            (file, backward) if (backward := f"{file}_backward") in files else (file,),
            None,
            f"{CHECKS}.kernel_{file.rpartition('.')[2]}",
        )
        for file in files
        if not file.endswith("_backward") and "custom_op(" in text_of(file)
    ]


def _styles() -> list[Part]:
    """The classes that derive from torch's `ParallelStyle`, directly or not."""
    classes = {
        node.name: (module, [ast.unparse(base) for base in node.bases])
        for module in modules_in(STYLES)
        for node in tree_of(module).body
        if isinstance(node, ast.ClassDef)
    }

    def is_style(name: str) -> bool:
        return name == "ParallelStyle" or any(is_style(base) for base in classes.get(name, ("", []))[1])

    def check_of(name: str, module: str) -> str:
        """The check of this style, or that of all styles in its file."""
        own = f"{CHECKS}.{name}"
        return own if path_of(own) else f"{CHECKS}.{module.rpartition('.')[2]}"

    return [
        Part(name, "parallel style", (module,), name, check_of(name, module))
        for name, (module, _) in classes.items()
        if is_style(name) and name not in STYLE_BASES
    ]
