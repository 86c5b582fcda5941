"""A model as a folder for others: model.safetensors (or shards of it), config.json, tokenizer.json.

    model.safetensors               every parameter and persistent buffer by its name in the model; or, by size,
    model-00001-of-00003.safetensors, ...   and model.safetensors.index.json, which says what is where
    config.json                     vocab_size, end_token and the settings that build the model again
    tokenizer.json

The same weights give the same bytes, whatever ranks had saved them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict

import torchlmoe
from torchlmoe.checkpoint.state import model_state
from torchlmoe.config import Config
from torchlmoe.config_loader import config_from, to_dict
from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.model.decoder import Decoder

CONFIG = "config.json"
_ARCHITECTURE = "torchlmoe"


def is_exported(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and any(folder.glob("model*.safetensors"))


def write_exported(folder: Path, model: Decoder, config: Config, tokenizer: Tokenizer, *, max_shard_bytes: int) -> None:
    """Writes the folder, which must not exist yet; it appears when it is whole. OSError where it cannot be written."""
    if folder.exists():
        raise ValueError(f"{folder} is there already: give another --output, or remove it.")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in model_state(model, "").items()}
    save_torch_state_dict(state, partial, max_shard_size=max_shard_bytes)
    settings = to_dict(config)
    content = {
        "model_type": _ARCHITECTURE,
        "torchlmoe_version": torchlmoe.__version__,
        "vocab_size": model.embedding.num_embeddings,
        "end_token": tokenizer.end_token,
        "settings": {
            "model": settings["model"],
            "moe": settings["moe"],
            "training": {name: settings["training"][name] for name in ("seq_len", "dtype")},
        },
    }
    (partial / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    (partial / "tokenizer.json").write_bytes(tokenizer.content)
    for file in partial.iterdir():  # safetensors makes files that their owner alone can read
        file.chmod((partial / CONFIG).stat().st_mode)
    partial.rename(folder)


def read_exported(folder: Path) -> tuple[Config, Tokenizer, int]:
    """Settings, tokenizer and vocabulary size of a folder. Raises ValueError where a file is missing or not ours."""
    path = folder / CONFIG
    try:
        content: Any = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        if content.get("model_type") != _ARCHITECTURE:
            raise ValueError(f"model_type is {content.get('model_type')!r}, not {_ARCHITECTURE!r}")
        for key, kind in {"settings": dict, "end_token": str, "vocab_size": int}.items():
            if not isinstance(content[key], kind):
                raise ValueError(f"{key} is {content[key]!r}, not of type {kind.__name__}")
        if content["vocab_size"] < 2:
            raise ValueError(f"vocab_size = {content['vocab_size']} must be at least 2")
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: export the model again.") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}.") from error
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder / 'tokenizer.json'} is missing: export the model again.")
    tokenizer = Tokenizer(folder / "tokenizer.json", content["end_token"])
    return config_from([content["settings"]]), tokenizer, content["vocab_size"]
