"""Exports a model as a folder:

    model.safetensors               every parameter and persistent buffer by its name in the model; a large model has
    model-00001-of-00003.safetensors, ...   and model.safetensors.index.json, which maps names to files
    config.json                     vocab_size, end_token and the settings that build the model
    tokenizer.json
    manifest.json                   the checksums of all other files

Equal weights give equal bytes; the number of ranks that saved them does not matter.
"""

import json
import logging
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub import save_torch_state_dict
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

import torchlmoe
from torchlmoe.checkpoint.manifest import NAME, describe, verify, write_manifest
from torchlmoe.checkpoint.state import model_state
from torchlmoe.checkpoint.transformers_folder import is_transformers
from torchlmoe.config.load import ConfigError, config_from, to_dict
from torchlmoe.config.settings import Config
from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.files import MAX_JSON_BYTES, open_regular, read_json, replacing
from torchlmoe.model.decoder import Decoder

CONFIG = "config.json"
logger = logging.getLogger(__name__)


class _Content(BaseModel):
    """The keys of config.json that torchlmoe reads."""

    model_config = ConfigDict(strict=True, protected_namespaces=())
    model_type: Literal["torchlmoe"]
    settings: dict[str, Any]
    end_token: str
    vocab_size: Annotated[int, Field(ge=2, lt=2**63)]


def is_exported(folder: Path) -> bool:
    """Whether a folder is an export of torchlmoe."""
    return (folder / CONFIG).is_file() and any(folder.glob("model*.safetensors")) and not is_transformers(folder)


def write_exported(folder: Path, model: Decoder, config: Config, tokenizer: Tokenizer, *, max_shard_bytes: int) -> None:
    """Writes an export to `folder`, which appears when it is complete.

    max_shard_bytes: maximum size of a file, unless one tensor is larger. Raises ValueError if the folder exists, and
    OSError if it cannot be written; then nothing remains.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already: give another --output, or remove it.")
    with replacing(folder, "The model", "make room, or give another --output") as partial:
        _write(partial, model, config, tokenizer, max_shard_bytes)


def _write(partial: Path, model: Decoder, config: Config, tokenizer: Tokenizer, max_shard_bytes: int) -> None:
    partial.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in model_state(model, "").items()}
    save_torch_state_dict(state, partial, max_shard_size=max_shard_bytes)
    settings = to_dict(config)
    content = {
        "model_type": "torchlmoe",
        "torchlmoe_version": torchlmoe.__version__,
        "vocab_size": model.embedding.num_embeddings,
        "end_token": tokenizer.end_token,
        "settings": {
            "model": settings["model"],
            "moe": settings["moe"],
            "training": {name: settings["training"][name] for name in ("seq_len", "dtype")},
            **({"job": {"custom_modules": config.job.custom_modules}} if config.job.custom_modules else {}),
        },
    }
    (partial / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    (partial / "tokenizer.json").write_bytes(tokenizer.content)
    for file in partial.iterdir():  # safetensors makes files that only their owner can read
        file.chmod((partial / CONFIG).stat().st_mode)
    write_manifest(partial, {file.name: describe(file) for file in partial.iterdir()})


def read_exported(folder: Path) -> tuple[Config, Tokenizer, int]:
    """Returns settings, tokenizer and vocabulary size of an export.

    Other files in the folder, such as a README.md, are ignored, except for files of tensors.
    Raises ValueError if a file is missing, damaged, or not of an export of torchlmoe.
    """
    try:
        if (folder / NAME).exists():
            verify(folder, only=".safetensors")
        else:
            logger.warning(
                f"{folder} has no {NAME}, like exports of earlier versions: its files are not checked for damage."
            )
        content = read_json(folder / CONFIG, TypeAdapter(_Content))
        with open_regular(folder / "tokenizer.json") as file:
            if file.seek(0, 2) > MAX_JSON_BYTES:
                raise ValueError(f"{file.name} has more than {MAX_JSON_BYTES:,} bytes")
    except ValueError as error:
        raise ValueError(f"{error}; export the model again.") from error
    tokenizer = Tokenizer(folder / "tokenizer.json", content.end_token)
    return config_of_file(folder / CONFIG, content.settings), tokenizer, content.vocab_size


def config_of_file(path: Path, settings: dict[str, Any]) -> Config:
    """Checks the settings of a file. Raises ValueError, which names the file, if they are not valid."""
    try:
        return config_from([settings], path.parent)
    except ConfigError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
