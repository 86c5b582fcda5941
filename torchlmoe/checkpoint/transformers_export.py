"""Writes a model as a folder of transformers, a few tensors at a time."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from torchlmoe.checkpoint.companions import CONFIG, GENERATION
from torchlmoe.checkpoint.open import SavedFolder
from torchlmoe.checkpoint.tensor_files import with_progress, write_shards
from torchlmoe.config.load import config_from
from torchlmoe.files import replacing
from torchlmoe.interop.families import FAMILIES
from torchlmoe.interop.family import Family, check_equal
from torchlmoe.interop.keys import WITHOUT_EFFECT
from torchlmoe.interop.rules import conversions
from torchlmoe.model.decoder import build_on_meta


def write_transformers(opened: SavedFolder, output: Path, model_type: str, *, max_shard_bytes: int) -> None:
    """Writes a model to folder `output` in the format of `model_type`. The folder appears when it is complete.

    max_shard_bytes: maximum size of a file, unless one tensor is larger.
    Raises ValueError if the folder exists or the family cannot represent the model, and OSError if the folder cannot be
    written.
    """
    if output.exists():
        raise ValueError(f"{output} exists already: give another --output, or remove it.")
    opened.check()
    companions = opened.companions()
    content = _config(opened, FAMILIES[model_type], json.loads(companions.get(CONFIG, b"{}")))
    table = conversions(opened.model.state_dict(), FAMILIES[model_type].rules(opened.model), reverse=True)
    saved, sizes = opened.meta(), dict[str, int]()
    for conversion in table:
        converted = conversion([saved[name] for name in conversion.sources])
        sizes |= {name: tensor.nbytes for name, tensor in converted.items()}
    constants = FAMILIES[model_type].constants(opened.model)
    with torch.device("meta"):
        sizes |= {name: make().to(opened.dtype).nbytes for name, make in constants.items()}
    tensors = chain(
        (conversion(opened.read(conversion.sources)) for conversion in table),
        ({name: make().to(opened.dtype)} for name, make in constants.items()),
    )
    files = {**companions, CONFIG: (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()}
    files.setdefault(GENERATION, json.dumps({"eos_token_id": content["eos_token_id"]}).encode())
    with replacing(output, "The model", "make room, or give another --output") as partial:
        partial.mkdir(parents=True)
        write_shards(partial, sizes, with_progress("Exporting", sizes, tensors), max_shard_bytes)
        for name, data in files.items():
            (partial / name).write_bytes(data)
        for file in partial.iterdir():  # safetensors makes files that only their owner can read
            file.chmod((partial / CONFIG).stat().st_mode)


def _config(opened: SavedFolder, family: Family, imported: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json.

    imported: the config.json of the folder that the model was imported from; {} if there is none. Its other keys are
        kept, since the import has checked that they do not change the model's outputs.
    """
    keys = family.config(opened.model)
    config = config_from([family.settings(keys, CONFIG)])
    check_equal(opened.model, build_on_meta(config, opened.vocab_size), family.model_type)
    is_same = imported.get("model_type") == family.model_type
    other_keys = {name: value for name, value in imported.items() if is_same or name in WITHOUT_EFFECT}
    return {
        "max_position_embeddings": opened.config.training.seq_len,
        "eos_token_id": opened.tokenizer.end_id,
        **other_keys,
        **keys,
        "dtype": str(opened.dtype).removeprefix("torch."),
    }
