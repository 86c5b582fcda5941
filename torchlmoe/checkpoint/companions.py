"""Keeps the files beside an imported model's weights, unchanged, in a folder of the run that starts from it."""

from collections.abc import Mapping
from pathlib import Path

from torchlmoe.files import MAX_JSON_BYTES, failures_to_write, read_small

FOLDER = "import"
CONFIG, GENERATION = "config.json", "generation_config.json"
NAMES = (
    CONFIG, GENERATION, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


def find_companions(folder: Path) -> dict[str, bytes]:
    """Returns the companion files in a folder: name -> content."""
    return {name: read_small(folder / name, MAX_JSON_BYTES) for name in NAMES if (folder / name).is_file()}


def read_companions(run: Path) -> dict[str, bytes]:
    """Returns the companion files of a run's folder. A run whose model was not imported has none."""
    return find_companions(run / FOLDER)


def write_companions(run: Path, files: Mapping[str, bytes]) -> None:
    """Writes companion files to a run's folder. Raises OSError if they cannot be written."""
    folder = run / FOLDER
    with failures_to_write("The files beside the weights", folder, "make room, or give another --output"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
