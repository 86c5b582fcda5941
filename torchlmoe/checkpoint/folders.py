"""The folders of a run's checkpoints: their names, and how one appears or goes in a single step.

    step-00000200              published, whole
    step-00000300.partial      being written
    step-00000100.removing     being removed
    step-00000400.abandoned    later than the one that `checkpoint.load_step` went back to; .abandoned-2 the next time

Whatever a killed process was doing, only whole checkpoints have a plain name.
"""

import os
import re
import shutil
from itertools import chain, count
from pathlib import Path

from torchlmoe.checkpoint.manifest import sync_folder

_PUBLISHED = re.compile(r"step-(\d{8,})")


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def is_published(folder: Path) -> bool:
    return folder.is_dir() and _PUBLISHED.fullmatch(folder.resolve().name) is not None


def published(root: Path) -> dict[int, Path]:
    """Return the checkpoints by step, in ascending order."""
    if not root.is_dir():
        return {}
    # Kinds as of the listing: a folder looked at later may be gone, and one published since is not listed.
    with os.scandir(root) as entries:
        matches = [(_PUBLISHED.fullmatch(entry.name), root / entry.name) for entry in entries if entry.is_dir()]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def partial_of(root: Path, step: int) -> Path:
    return root / f"{name_of(step)}.partial"


def publish(root: Path, step: int, keep_latest_k: int) -> None:
    """Rename the complete partial folder, replacing one with that name, and remove all but the latest k checkpoints."""
    folder = root / name_of(step)
    if folder.exists():
        _remove(folder)
    partial_of(root, step).rename(folder)
    sync_folder(root)
    for old in list(published(root).values())[:-keep_latest_k]:
        _remove(old)


def abandon_after(root: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step` to `.abandoned`. Returns their new paths."""
    later = [path for other, path in published(root).items() if other > step]
    return [path.rename(_free(path.with_name(f"{path.name}.abandoned"))) for path in later]


def _free(path: Path) -> Path:
    """`path`, or if it exists `path` with the first free number from 2 on."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(candidate for candidate in chain([path], numbered) if not candidate.exists())


def clean(root: Path) -> None:
    """Remove folders that a killed run left partly written or partly removed."""
    for pattern in ("step-*.partial", "step-*.removing"):
        for path in root.glob(pattern):
            shutil.rmtree(path)


def _remove(folder: Path) -> None:
    leaving = folder.with_name(f"{folder.name}.removing")
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving)
