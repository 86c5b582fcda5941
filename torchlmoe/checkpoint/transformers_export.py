"""Writes a model as a folder of transformers, a few tensors at a time."""

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from torchlmoe.checkpoint.companions import CONFIG, GENERATION
from torchlmoe.checkpoint.manifest import sync_folder
from torchlmoe.checkpoint.open import SavedFolder
from torchlmoe.checkpoint.tensor_files import with_progress, write_shards
from torchlmoe.config.load import config_from
from torchlmoe.files import failures_to_write
from torchlmoe.interop.families import FAMILIES
from torchlmoe.interop.family import Family, check_equal
from torchlmoe.interop.keys import WITHOUT_EFFECT
from torchlmoe.interop.rules import conversions
from torchlmoe.model.decoder import build_on_meta


def write_transformers(opened: SavedFolder, output: Path, model_type: str, *, max_shard_bytes: int) -> None:
    """Writes the folder `output`, which must not exist yet; it appears when it is whole.

    Raises ValueError for a model that the family cannot hold, and OSError where the folder cannot be written.
    """
    if output.exists():
        raise ValueError(f"{output} is there already: give another --output, or remove it.")
    opened.check()
    companions = opened.companions()
    content = _config(opened, FAMILIES[model_type], json.loads(companions.get(CONFIG, b"{}")))
    table = conversions(opened.model.state_dict(), FAMILIES[model_type].rules(opened.model), reverse=True)
    saved, sizes = opened.meta(), dict[str, int]()
    for conversion in table:
        made = conversion([saved[name] for name in conversion.sources])
        sizes |= {name: tensor.nbytes for name, tensor in made.items()}
    constants = FAMILIES[model_type].constants(opened.model)
    with torch.device("meta"):
        sizes |= {name: make().to(opened.dtype).nbytes for name, make in constants.items()}
    tensors = chain(
        (conversion(opened.read(conversion.sources)) for conversion in table),
        ({name: make().to(opened.dtype)} for name, make in constants.items()),
    )
    files = {**companions, CONFIG: (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()}
    files.setdefault(GENERATION, json.dumps({"eos_token_id": content["eos_token_id"]}).encode())
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with failures_to_write("The model", output, "make room, or give another --output"):
            partial.mkdir(parents=True)
            write_shards(partial, sizes, with_progress("Exporting", sizes, tensors), max_shard_bytes)
            for name, data in files.items():
                (partial / name).write_bytes(data)
            for file in partial.iterdir():  # safetensors makes files that their owner alone can read
                file.chmod((partial / CONFIG).stat().st_mode)
            partial.rename(output)
            sync_folder(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config(opened: SavedFolder, family: Family, before: dict[str, Any]) -> dict[str, Any]:
    """config.json. before: that of the folder which the model was imported from, whose further keys are kept: all of
    them were found to have no effect on what the model computes."""
    written = family.config(opened.model)
    again = config_from([family.settings(written, CONFIG)])
    check_equal(opened.model, build_on_meta(again, opened.vocab_size), family.model_type)
    same = before.get("model_type") == family.model_type
    kept = {name: value for name, value in before.items() if same or name in WITHOUT_EFFECT}
    return {
        "max_position_embeddings": opened.config.training.seq_len,
        "eos_token_id": opened.tokenizer.end_id,
        **kept,
        **written,
        "dtype": str(opened.dtype).removeprefix("torch."),
    }
