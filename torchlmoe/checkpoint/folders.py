"""Names the folders of a run's checkpoints. A checkpoint appears and disappears by one rename.

    step-00000200              published, complete
    step-00000300.partial      being written
    step-00000100.removing     being removed
    step-00000400.abandoned    later than the checkpoint of `checkpoint.load_step`; .abandoned-2 the next time

If a process is killed at any time, only complete checkpoints have a plain name.
"""

import os
import re
import shutil
from itertools import chain, count
from pathlib import Path

from torchlmoe.files import sync_folder

_PUBLISHED = re.compile(r"step-(\d{8,})")


def name_of(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def is_published(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint, by its name."""
    return folder.is_dir() and _PUBLISHED.fullmatch(folder.resolve().name) is not None


def published(root: Path) -> dict[int, Path]:
    """Returns the checkpoints: step -> folder, in ascending order."""
    if not root.is_dir():
        return {}
    # The listing also knows which entries are folders. A later check would miss folders that are removed meanwhile.
    with os.scandir(root) as entries:
        matches = [(_PUBLISHED.fullmatch(entry.name), root / entry.name) for entry in entries if entry.is_dir()]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def partial_of(root: Path, step: int) -> Path:
    """The folder in which a checkpoint is written."""
    return root / f"{name_of(step)}.partial"


def publish(root: Path, step: int, keep_latest_k: int) -> None:
    """Renames the complete partial folder, replacing an older one, and removes all but the latest k checkpoints."""
    folder = root / name_of(step)
    if folder.exists():
        _remove(folder)
    partial_of(root, step).rename(folder)
    sync_folder(root)
    for old in list(published(root).values())[:-keep_latest_k]:
        _remove(old)


def abandon_after(root: Path, step: int) -> list[Path]:
    """Renames the checkpoints after `step` to `.abandoned`. Returns their new paths."""
    later = [path for other, path in published(root).items() if other > step]
    return [path.rename(_free(path.with_name(f"{path.name}.abandoned"))) for path in later]


def _free(path: Path) -> Path:
    """`path` or, if it exists, `path` with the lowest free number from 2."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(candidate for candidate in chain([path], numbered) if not candidate.exists())


def clean(root: Path) -> None:
    """Removes folders that a killed run left partly written or partly removed."""
    for pattern in ("step-*.partial", "step-*.removing"):
        for path in root.glob(pattern):
            shutil.rmtree(path)


def _remove(folder: Path) -> None:
    leaving = folder.with_name(f"{folder.name}.removing")
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving)
