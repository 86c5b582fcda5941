"""Checks settings that are valid alone but contradict each other or have no effect together.

Settings of a feature that is off are not errors: `idle.py` finds those.
"""

import logging
import os
from typing import Any

from torchlmoe.config.errors import ConfigError
from torchlmoe.config.recall import recall_data
from torchlmoe.config.settings import Config, Optimizer, Training, fields, setting
from torchlmoe.data.order import check_weights
from torchlmoe.data.recall.store import RecallStore
from torchlmoe.files import toml_value
from torchlmoe.optim import OPTIMIZERS
from torchlmoe.options import keyword_settings

logger = logging.getLogger(__name__)

# Settings that have no effect without another one: name -> (the other one, the value that it needs).
# A pattern must contain the letter, and a number must be at least as large.
NEEDS: dict[str, tuple[str, Any]] = {
    "model.mixer": ("model.layer_pattern", "L"),
    "model.zero_centered_norm": ("model.norm", "rms"),
    "model.norm_bias": ("model.norm", "layer"),
    "moe.aux_loss_weight": ("moe.balance", "aux_loss"),
    "moe.aux_loss_scope": ("moe.balance", "aux_loss"),
    "moe.bias_update_rate": ("moe.balance", "loss_free"),
    "moe.group_score": ("moe.num_expert_groups", 2),
    "moe.num_limited_groups": ("moe.num_expert_groups", 2),
    "lr_scheduler.decay_fraction": ("lr_scheduler.decay", "wsd"),
    "float8.recipe": ("float8.enable", True),
    "profiling.first_step": ("profiling.enable", True),
    "profiling.num_steps": ("profiling.enable", True),
    "profiling.interval": ("profiling.enable", True),
    "profiling.memory_snapshot": ("profiling.enable", True),
    "checkpoint.load_step": ("checkpoint.enable", True),
    "data.writer": ("data.num_writers", 2),
    "data.writer_timeout_seconds": ("data.num_writers", 2),
    "parallelism.lsm_context_parallel": ("parallelism.context_parallel_degree", 2),
    "parallelism.attention_context_parallel": ("parallelism.context_parallel_degree", 2),
    "parallelism.pipeline_parallel_schedule": ("parallelism.pipeline_parallel_degree", 2),
    "parallelism.pipeline_parallel_split": ("parallelism.pipeline_parallel_degree", 2),
}


def check_consistency(config: Config) -> None:
    """Check settings that must fit together, whatever their source."""
    default = Config()
    _check_mixture(config)
    _check_recall(config)
    profiling, training = config.profiling, config.training
    if 0 < training.max_norm < 1e-9:
        raise ConfigError(
            f"training.max_norm = {training.max_norm} would clip every gradient to zero; 0 is for no clipping."
        )
    if profiling.num_steps >= profiling.interval:
        raise ConfigError(
            f"profiling.num_steps = {profiling.num_steps} must be less than profiling.interval = {profiling.interval}; "
            "a step between two traces warms the profiler up."
        )
    for key in ("enable", "experts"):
        value = getattr(config.float8, key)
        if value != getattr(default.float8, key) and training.dtype == "float64":
            raise ConfigError(
                f"float8.{key} = {toml_value(value)} needs training.dtype = 'bfloat16' or 'float32'; it is 'float64'."
            )
    if config.lr_scheduler.warmup_steps > config.training.steps:
        raise ConfigError(
            f"lr_scheduler.warmup_steps = {config.lr_scheduler.warmup_steps} is more than training.steps = "
            f"{config.training.steps}; warm up for fewer."
        )


def check_needs(config: Config, sources: list[dict[str, Any]]) -> None:
    """Check that each setting that differs from its default has an effect.

    If a later source than the setting's own changed the value that it needs, the setting is reset instead: a command
    line may choose another optimizer than the file whose settings it uses.
    """

    def last_source(name: str) -> int:
        table, _, key = name.partition(".")
        return max((index for index, source in enumerate(sources) if key in source.get(table, {})), default=-1)

    for name, (other, needed) in (NEEDS | _needs_of_optimizer(config)).items():
        given, unset, actual = setting(config, name), setting(Config(), name), setting(config, other)
        if given == unset or (needed in actual if isinstance(actual, str) else needed <= actual):
            continue
        table, _, key = name.partition(".")
        if last_source(other) <= last_source(name):
            raise ConfigError(
                f"{name} = {toml_value(given)} has no effect with {other} = {toml_value(actual)}: it needs "
                f"{toml_value(needed)}{' or more' * (type(needed) is int)}; set that, or leave {key} unset."
            )
        setattr(getattr(config, table), key, unset)


def _needs_of_optimizer(config: Config) -> dict[str, tuple[str, Any]]:
    """Return the settings of [optimizer] that the chosen optimizer does not have, with the first one that has each."""
    takers = {name: keyword_settings(builder) for name, builder in OPTIMIZERS.items()}
    idle = [key for key in fields(Optimizer) if key not in ("name", "options", *takers[config.optimizer.name])]
    return {
        f"optimizer.{key}": ("optimizer.name", next(name for name, taken in takers.items() if key in taken))
        for key in idle
    }


def shorten_warmup(config: Config, sources: list[dict[str, Any]]) -> None:
    """Shorten the warm-up in proportion if a later source than its own gives fewer training steps than it has."""
    steps, warmup = config.training.steps, config.lr_scheduler.warmup_steps
    places = [index for index, source in enumerate(sources) if "steps" in source.get("training", {})]
    earlier = sources[: places[-1]] if places else []
    if warmup <= steps or not any("warmup_steps" in source.get("lr_scheduler", {}) for source in earlier):
        return
    if any("warmup_steps" in source.get("lr_scheduler", {}) for source in sources[places[-1] :]):
        return
    before = sources[places[-2]]["training"]["steps"] if len(places) > 1 else Training().steps
    if type(before) is int and warmup <= before:
        shorter = config.lr_scheduler.warmup_steps = max(1, round(warmup * steps / before))
        if os.environ.get("RANK", "0") == "0":
            logger.warning(
                f"lr_scheduler.warmup_steps is {shorter} in place of {warmup}, in proportion to training.steps = "
                f"{steps} in place of {before}."
            )


def _check_mixture(config: Config) -> None:
    data, unset = config.data, Config().data
    if not data.mixture:
        return
    try:
        check_weights([source.weight for source in data.mixture])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if data.dataset != unset.dataset or data.reader_options:
        raise ConfigError(
            f"data.dataset = {toml_value(data.dataset)} and its data.reader_options have no effect with data.mixture: "
            "put them there, or leave them unset."
        )
    if config.validation.enable and data.validation_dataset is None:
        raise ConfigError("data.mixture needs a data.validation_dataset, or validation.enable = false.")
    labels = [source.label for source in data.mixture]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"data.mixture has two sources named {label!r}: give one of them another name.")


def _check_recall(config: Config) -> None:
    """Check that recall tasks, which have their own vocabulary, are not mixed with text, and that rows hold whole
    documents."""
    data, seq_len = config.data, config.training.seq_len
    given = recall_data(data, with_validation=config.validation.enable)
    if not any(task for task, _, _ in given):
        return
    for task, options, dataset in given:
        if task is None:
            raise ConfigError(
                f"{toml_value(dataset)} cannot be combined with a recall task, which has its own vocabulary; give "
                'recall tasks only ("recall:mqar"), for validation too.'
            )
        length = RecallStore(task, "train", **options).length
        if seq_len % length:
            raise ConfigError(
                f"training.seq_len = {seq_len} does not hold whole documents of {toml_value(dataset)}; give a multiple "
                f"of its reader_options.length = {length}."
            )
