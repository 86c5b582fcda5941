"""Finds settings of features that are off in a run. They have no effect, which is logged, not an error.

A setting that contradicts another one is an error when settings are loaded (`combinations.py`).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchlmoe.config.load import config_from
from torchlmoe.config.settings import Config, MoE, setting
from torchlmoe.data.local_files import TOKENS
from torchlmoe.data.recall.store import PREFIX
from torchlmoe.feed_forwards import NONE
from torchlmoe.mixers import MIXERS

Need = tuple[str, Callable[[Config], bool]]  # a description, and a test of whether it is met


def _blocks_with(mlp: str) -> Need:
    return f"a block with mlp = {mlp!r}", lambda config: any(
        table.get("mlp", "moe") == mlp for table in _in_use(config)
    )


def _mixer_with(option: str) -> Need:
    return f"a block whose mixer has {option}", lambda config: any(
        option in MIXERS[table["mixer"]].settings() for table in _in_use(config) if table["mixer"] != NONE
    )


def _in_use(config: Config) -> list[dict[str, Any]]:
    """Return the tables of the letters that the model uses."""
    pattern, num_layers = config.model.layer_pattern, config.model.num_layers
    return [config.model.layers[letter] for letter in pattern[:num_layers]]


def _enabled(table: str) -> Need:
    return f"{table}.enable = true", lambda config: getattr(config, table).enable


def _datasets(config: Config) -> list[str]:
    data = config.data
    return [data.dataset, *filter(None, [data.validation_dataset]), *(source.dataset for source in data.mixture)]


def _reads_hub(config: Config) -> bool:
    return any(
        name != "embedded" and not name.startswith(PREFIX) and not Path(name).expanduser().exists()
        for name in _datasets(config)
    )


def _reads_text(config: Config) -> bool:
    return not all(name.startswith(PREFIX) for name in _datasets(config)[bool(config.data.mixture) :])


def _reads_tokens(config: Config) -> bool:
    paths = [Path(name).expanduser() for name in _datasets(config)]
    return any(file.suffix in TOKENS for path in paths for file in (path, *path.rglob("*")))


NEEDS: dict[str, Need] = {
    "model.mlp_dim": _blocks_with("dense"),
    **{f"model.{option}": _mixer_with(option) for option in ("num_heads", "rope_base", "rope_scaling", "backend")},
    "parallelism.expert_parallel_degree": _blocks_with("moe"),
    **{f"moe.{field.name}": _blocks_with("moe") for field in dataclasses.fields(MoE)},
    **{f"data.{key}": ("a dataset of the hub", _reads_hub) for key in ("dataset_config", "dataset_revision")},
    "data.token_dtype": ("files of tokens (.bin or .npy)", _reads_tokens),
    "data.validation_fraction": ("no data.validation_dataset", lambda config: config.data.validation_dataset is None),
    **{
        f"data.{key}": ("data other than recall tasks", _reads_text)
        for key in ("tokenizer", "end_token", "max_tokens", "cache_dir", "num_workers", "num_writers")
    },
    **{f"data.{key}": _enabled("validation") for key in ("validation_dataset", "validation_max_tokens")},
    **{f"validation.{key}": _enabled("validation") for key in ("interval", "max_batches", "local_batch_size")},
    **{f"checkpoint.{key}": _enabled("checkpoint") for key in ("interval", "keep_latest_k", "async_mode")},
}


def idle_settings(config: Config) -> dict[str, str]:
    """Return settings that differ from the default (or the flavor) but have no effect, with what each needs."""
    unset = config_from([{"model": {"flavor": config.model.flavor}}])
    return {
        name: words
        for name, (words, is_met) in NEEDS.items()
        if setting(config, name) != setting(unset, name) and not is_met(config)
    }
