"""Reads and writes run.json: the progress of a run, and the settings that must not change when it resumes.

Fixed are the architecture, the tokenizer, and the settings that determine the order of data. Others may change: steps,
learning rate, intervals, backends, recompute, parallel degrees.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

import torchlmoe
from torchlmoe.config.settings import Config
from torchlmoe.data.order import RowOrder
from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.files import read_json, toml_value

# Settings that may change: they do not determine the weights. `layers` are compared letter by letter, resolved.
_FREE = {
    "model": {"flavor", "mixer", "layers", "backend", "init_std", "loss_chunk_size", "num_heads", "vocab_size"},
    "moe": {"aux_loss_weight", "z_loss_weight", "bias_update_rate"},
    "layers": {"backend", "init_std"},
}


# Figures that the console's line of a step shows.
_FIGURES = ("step", "loss", "grad_norm", "lr", "tokens_per_second", "memory_gib")


def _check_record(record: dict[str, Any]) -> dict[str, Any]:
    if record and not all(isinstance(record.get(name), (int, float)) for name in _FIGURES):
        raise ValueError(f"should hold numbers named {', '.join(_FIGURES)}")
    return record


@dataclass
class Progress:
    """The progress of a run.

    step: number of steps done, including skipped ones. skipped_steps: number of steps without an update, since the loss
        or a gradient was not finite.
    record: figures to log for the last step, without those of its validation; may be empty. A checkpoint is written
        before validation and logging, so that a resumed run can do both.
    """

    __pydantic_config__ = ConfigDict(strict=True)

    step: Annotated[int, Field(ge=0, lt=2**63)] = 0
    skipped_steps: Annotated[int, Field(ge=0, lt=2**63)] = 0
    record: Annotated[dict[str, int | float | list[int | float]], AfterValidator(_check_record)] = field(
        default_factory=dict
    )


class _Fixed(BaseModel):
    """The fixed settings that are needed to open a model."""

    model_config = ConfigDict(extra="allow", strict=True)
    end_token: str = Field(alias="data.end_token")
    vocab_size: int = Field(alias="model.vocab_size", ge=2, lt=2**63)


class _Run(BaseModel):
    progress: Progress
    fixed: _Fixed
    load_step: int | None = None


def fixed_of_model(config: Config, tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Returns the settings that the weights depend on: name -> resolved value, as JSON."""
    fixed: dict[str, Any] = {}
    pattern = (config.model.layer_pattern * config.model.num_layers)[: config.model.num_layers]
    for letter in sorted(set(pattern)):
        layer = config.model.layers[letter]
        options = {"mixer": layer["mixer"], "mlp": layer.get("mlp", "moe"), **config.block_spec(letter).mixer_options}
        fixed |= {f"model.layers.{letter}.{key}": v for key, v in options.items() if key not in _FREE["layers"]}
        of_mlp = {
            key: v for key, v in layer.get("mlp_options", {}).items() if key not in _FREE["moe"] | _FREE["layers"]
        }
        fixed |= {f"model.layers.{letter}.mlp_options.{key}": value for key, value in of_mlp.items()}
    for table in ("model", "moe"):
        settings = asdict(getattr(config, table))
        fixed |= {f"{table}.{key}": value for key, value in settings.items() if key not in _FREE[table]}
    return fixed | {
        "model.layer_pattern": pattern,
        "model.vocab_size": vocab_size,
        "data.tokenizer": f"sha256 {tokenizer.fingerprint}",
        "data.end_token": tokenizer.end_token,
    }


def fixed_of_run(config: Config, order: RowOrder) -> dict[str, Any]:
    """Returns the settings that the optimizer state and the order of data depend on, like `fixed_of_model`."""
    training = config.training
    # Masters are at least float32, so bfloat16 and float32 runs have the same tensors.
    masters = torch.promote_types(training.dtype_on("cpu"), torch.float32)
    stores = [source.store for source in order.sources]
    fixed: dict[str, Any] = {
        "training.dtype": "float64" if masters == torch.float64 else "float32 or bfloat16",
        "training.seed": training.seed,
        "training.seq_len": training.seq_len,
        "training.global_batch_size": order.global_batch_size,
        "optimizer.name": config.optimizer.name,
    }
    # Checked first, since its message names the revision that gives the same data.
    commits = [store.index.recipe["commit"] for store in stores if "commit" in store.index.recipe]
    if commits:
        fixed["data.dataset_revision"] = ", ".join(commits)
    fixed["data.num_tokens"] = order.num_tokens
    fixed["data.num_documents"] = sum(store.num_documents for store in stores)
    if len(stores) == 1:
        fixed["data.content"] = f"sha256 {stores[0].index.content}"
    else:
        fixed["data.mixture"] = [[source.weight, f"sha256 {source.store.index.content}"] for source in order.sources]
    return fixed


def write_run(progress: Progress, fixed: dict[str, Any], **facts: Any) -> bytes:
    """Returns the content of run.json. facts: further entries for information, such as the number of ranks."""
    versions = {"torch": torch.__version__, "torchlmoe": torchlmoe.__version__}
    return json.dumps({"progress": asdict(progress), "fixed": fixed, **facts, "versions": versions}, indent=1).encode()


def read_run(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """Returns progress and fixed settings of a checkpoint. Raises ValueError if run.json is missing or not valid."""
    run = read_json(folder / "run.json", TypeAdapter(_Run))
    return run.progress, run.fixed.model_dump(by_alias=True)


def load_step_of(folder: Path) -> int | None:
    """Returns checkpoint.load_step of the run that saved a checkpoint, or None if run.json is damaged."""
    try:
        return read_json(folder / "run.json", TypeAdapter(_Run)).load_step
    except (OSError, ValueError):
        return None


def differences(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the name and a clause for each fixed setting that differs from the checkpoint `folder`."""
    for name, value in current.items():
        if name in saved and saved[name] != value:
            was = toml_value(saved[name])
            yield name, f"{name} is {toml_value(value)}, but the run that saved {folder} had {was}"


def check_same(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """Raises ValueError naming the first fixed setting that differs from the checkpoint `folder`."""
    for name, clause in differences(saved, current, folder):
        # The order of data is not a setting.
        of_data = name in ("data.num_tokens", "data.num_documents", "data.content", "data.mixture")
        remedy = "give the same training data and data.max_tokens again" if of_data else "set it to that"
        raise ValueError(f"{clause}: {remedy}, or start a new run in another job.dump_folder.")
