"""Imports the modules of `job.custom_modules`, which register mixers, losses and other parts of your own."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path


def import_modules(names: list[str], forbidden: Path | None = None) -> None:
    """Import each module, also from the working directory.

    forbidden: a folder of weights and settings. Its files are data, so a module in it is not imported.
    Raises ValueError for such a module, and for one that cannot be imported.
    """
    for name in names:
        if name in sys.modules:
            continue
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        if forbidden is not None and _lies_in(name, forbidden):
            raise ValueError(
                f"job.custom_modules names {name!r}, which lies in {forbidden}: code that comes with weights is never "
                "run; install the module elsewhere if you trust it."
            )
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ValueError(
                f"job.custom_modules names {name!r}, which cannot be imported: {type(error).__name__}: {error}; "
                "install it, or put its folder on PYTHONPATH."
            ) from error


def _lies_in(name: str, folder: Path) -> bool:
    try:
        spec = importlib.util.find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    places = [*(spec.submodule_search_locations or []), *([spec.origin] if spec.origin else [])]
    return any(Path(place).resolve().is_relative_to(folder.resolve()) for place in places)
