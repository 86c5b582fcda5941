"""Checks the options of mixers, feed-forward layers, losses, optimizers and readers.

A setting names each of them. Its options are the annotated keyword arguments of its constructor or function.
"""

import dataclasses
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from torchlmoe.config.errors import ConfigError, nearest, sentence
from torchlmoe.config.settings import FEED_FORWARD_WIDE, MODEL_WIDE, Config, Optimizer, fields, setting
from torchlmoe.data.readers import READERS
from torchlmoe.data.recall.store import RecallStore, recall_settings, recall_task
from torchlmoe.feed_forwards import FEED_FORWARDS, NONE
from torchlmoe.files import toml_value
from torchlmoe.layers.losses import LOSSES, OF_THE_HEAD
from torchlmoe.layers.rope_scaling import ROPE_SCALINGS
from torchlmoe.mixers import MIXERS
from torchlmoe.model.spec import Residual
from torchlmoe.optim import OPTIMIZERS
from torchlmoe.options import keyword_settings

_OF_LETTER = ("mixer", "mlp", "mlp_options")  # all other keys of a letter's table are options of its mixer


def check_layers(config: Config) -> None:
    """Check the table of each letter in `model.layers`, and that `model.layer_pattern` names no other letter."""
    for letter, table in config.model.layers.items():
        prefix = f"model.layers.{letter}"
        if len(letter) != 1 or not letter.isalpha():
            raise ConfigError(f"[{prefix}] must be named by one letter, as in layer_pattern.")
        mixer, mlp = table.get("mixer"), table.get("mlp", "moe")
        if mixer is None:
            raise ConfigError(f"{prefix}.mixer is missing; choose one of {', '.join(MIXERS)}.")
        if mixer not in [*MIXERS, NONE]:
            raise ConfigError(f"{prefix}.mixer = {toml_value(mixer)} is unknown{nearest(str(mixer), MIXERS)}.")
        if mlp not in [*FEED_FORWARDS, NONE]:
            raise ConfigError(
                f"{prefix}.mlp = {toml_value(mlp)} is unknown; choose from {', '.join([*FEED_FORWARDS, NONE])}."
            )
        if mixer == mlp == NONE:
            raise ConfigError(f"[{prefix}] has neither a mixer nor an mlp; give it one of the two.")
        of_block = {name: value for name, value in table.items() if name in Residual.settings()}
        _check_options(prefix, Residual.settings(), of_block)
        for part, kind in (("mixer", mixer), ("mlp", mlp)):
            if kind == NONE and (idle := [name for name in of_block if name.startswith(part)]):
                raise ConfigError(f"{prefix}.{idle[0]} has no effect with {part} = 'none'; leave it unset.")
        options = {name: value for name, value in table.items() if name not in {*_OF_LETTER, *of_block}}
        _check_mixer(config, prefix, mixer, options)
        _check_feed_forward(config, prefix, mlp, table.get("mlp_options", {}))
    for letter in config.model.layer_pattern:
        if letter not in config.model.layers:
            raise ConfigError(
                f"model.layer_pattern = {config.model.layer_pattern!r} names {letter!r}, which has no table; add "
                f"[model.layers.{letter}] with a mixer."
            )


def _check_mixer(config: Config, prefix: str, mixer: str, options: dict[str, Any]) -> None:
    types = {} if mixer == NONE else MIXERS[mixer].settings()
    given = {name: getattr(config.model, name) for name in MODEL_WIDE if name in types} | options
    checked = _check_options(prefix, types, given, (*_OF_LETTER, *Residual.settings()))
    _check_rope_scaling(prefix, options.get("rope_scaling"))
    if "inner_options" in types:  # the mixer has an inner mixer
        if checked.inner not in MIXERS:
            raise ConfigError(
                f"{prefix}.inner = {toml_value(checked.inner)} is unknown{nearest(checked.inner, MIXERS)}."
            )
        _check_mixer(config, f"{prefix}.inner_options", checked.inner, checked.inner_options or {})


def _check_rope_scaling(prefix: str, table: dict[str, Any] | None) -> None:
    if table is None:
        return
    kind = table.get("type")
    if kind not in [*ROPE_SCALINGS]:
        raise ConfigError(
            f"{prefix}.rope_scaling.type = {toml_value(kind)} is unknown{nearest(str(kind), ROPE_SCALINGS)}."
            if "type" in table
            else f"{prefix}.rope_scaling.type is missing; choose one of {', '.join(ROPE_SCALINGS)}."
        )
    numbers = {name: value for name, value in table.items() if name != "type"}
    _check_options(f"{prefix}.rope_scaling", keyword_settings(ROPE_SCALINGS[kind]), numbers)


def _check_feed_forward(config: Config, prefix: str, mlp: str, options: Any) -> None:
    if not isinstance(options, dict):
        raise ConfigError(f"{prefix}.mlp_options = {toml_value(options)} must be a table of settings.")
    types = {} if mlp == NONE else FEED_FORWARDS[mlp].settings()
    given = {name: getattr(config.model, name) for name in FEED_FORWARD_WIDE if name in types} | options
    _check_options(f"{prefix}.mlp_options", types, (dataclasses.asdict(config.moe) if mlp == "moe" else {}) | given)


def check_registered(config: Config) -> None:
    """Check that the loss, the optimizer, the rope scaling and the readers exist, and check their options."""
    _check_rope_scaling("model", config.model.rope_scaling)
    for name, registry in (("training.loss", LOSSES), ("optimizer.name", OPTIMIZERS)):
        value = setting(config, name)
        if value not in registry:
            raise ConfigError(f"{name} = {toml_value(value)} is unknown{nearest(value, registry)}.")
    loss = keyword_settings(LOSSES[config.training.loss])
    optimizer = keyword_settings(OPTIMIZERS[config.optimizer.name])
    for name in OF_THE_HEAD:
        loss.pop(name, None)
    _check_options("training.loss_options", loss, config.training.loss_options)
    of_table = fields(Optimizer)
    own = {name: option for name, option in optimizer.items() if name not in of_table}
    _check_options("optimizer.options", own, config.optimizer.options)
    _check_reader("data", config.data.dataset, config.data.reader_options)
    for number, source in enumerate(config.data.mixture):
        _check_reader(f"data.mixture.{number}", source.dataset, source.reader_options)


def _check_reader(prefix: str, dataset: str, options: dict[str, Any]) -> None:
    try:
        task = recall_task(dataset)
        reader = READERS.get(dataset)
        types = recall_settings(task) if task else keyword_settings(reader) if reader else {}
        _check_options(f"{prefix}.reader_options", types, options)
        if task:
            RecallStore(task, "train", **options)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}.dataset = {toml_value(dataset)}: {str(error).removesuffix('.')}.") from None


def _check_options(
    prefix: str, types: dict[str, tuple[Any, Any]], given: dict[str, Any], known: tuple[str, ...] = ()
) -> Any:
    """Check values against annotated keyword arguments, and return them as attributes of an object.

    types: name -> (annotation, default). given: name -> value. known: more names that a mistyped one may have meant.
    """
    model = create_model(prefix, __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **types)  # type: ignore[call-overload]
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise ConfigError(sentence(error, None, prefix, {**types, **dict.fromkeys(known)})) from None
