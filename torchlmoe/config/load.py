"""Reads settings from a flavor, a TOML file and the command line, merges and checks them, and prints them as TOML.

A value that cannot be used raises a `ConfigError`: one sentence that names the value and the remedy. Types and limits
are in `settings.py`. Options of mixers and other parts are checked in `part_options.py`, combinations in
`combinations.py`.
"""

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import tomli
import tomli_w
from pydantic import TypeAdapter, ValidationError

from torchlmoe.config.combinations import check_consistency, check_needs, shorten_warmup
from torchlmoe.config.custom import import_modules
from torchlmoe.config.errors import ConfigError, nearest, sentence
from torchlmoe.config.flavors import FLAVORS
from torchlmoe.config.part_options import check_layers, check_registered
from torchlmoe.config.settings import Config, fields
from torchlmoe.files import expanded, is_unicode, read_toml, toml_value

DEFAULT_LAYERS = {"L": {"mixer": "gated_deltanet", "mlp": "moe"}, "N": {"mixer": "attention", "mlp": "moe"}}


def load_config(arguments: list[str]) -> Config:
    """Return the settings of a command line.

    arguments: the command line after the program's name, `--table.key value` or `--table.key=value`. If a setting is
    given twice, the last value is used.

    Raises:
        ConfigError: unknown, mistyped, out-of-range or contradictory settings, or a file that cannot be read.
    """
    return config_from(_sources(arguments))


def import_custom_modules(arguments: list[str]) -> None:
    """Import the modules of `job.custom_modules`, without checks of other settings. See `load_config`."""
    for source in _sources(arguments):
        _check_table_shape(source)
        _import_custom_modules(source, None)


def _sources(arguments: list[str]) -> list[dict[str, Any]]:
    from_command_line = _parse_command_line(arguments)
    config_file = from_command_line.get("job", {}).get("config_file")
    # Values that are not text raise an error later, with the other settings.
    from_file = _read_toml(config_file) if isinstance(config_file, str) else {}
    return [from_file, from_command_line]


def config_from(sources: list[dict[str, Any]], folder: Path | None = None) -> Config:
    """Merge and check settings. Raises ConfigError like `load_config`.

    sources: nested dicts of settings; a later one overrides the earlier ones.
    folder: folder of weights that the settings were read from, if any. Modules in it are not imported.
    """
    flavor = "debug"
    for source in sources:
        _check_values(source)
        _check_table_shape(source)
        _import_custom_modules(source, folder)
        flavor = source.get("model", {}).get("flavor", flavor)
    if flavor not in [*FLAVORS]:  # a list, since the value may have no hash
        raise ConfigError(f"model.flavor = {toml_value(flavor)} is unknown{nearest(str(flavor), FLAVORS)}.")
    merged: dict[str, Any] = {}
    for source in [{"model": {"layers": DEFAULT_LAYERS}}, FLAVORS[flavor], *sources]:
        _merge(merged, _with_mixer_in_its_letter(source))
    if merged["model"].get("mixer") is not None:  # a later source may have set only the letter's mixer
        merged["model"]["mixer"] = merged["model"]["layers"]["L"]["mixer"]
    try:
        # As JSON, since only there pydantic makes a strict dataclass from a dict.
        config = TypeAdapter(Config).validate_json(json.dumps(merged, default=str))
    except ValidationError as error:
        raise ConfigError(sentence(error, Config)) from None
    check_layers(config)
    check_registered(config)
    shorten_warmup(config, sources)
    check_needs(config, sources)
    check_consistency(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Return the resolved settings as nested dicts, without those that are None."""

    def given(value: Any) -> Any:
        if isinstance(value, list):
            return [given(item) for item in value]
        if isinstance(value, dict):
            return {key: given(item) for key, item in value.items() if item is not None}
        return value

    return given(dataclasses.asdict(config))


def to_toml(config: Config) -> str:
    """Return the resolved settings as TOML; reading it gives the same settings."""
    settings = to_dict(config)
    for name in ("config_file", "print_config", "debug"):
        settings["job"].pop(name, None)
    settings["checkpoint"].pop("load_step", None)  # applies to one start of a run only
    return tomli_w.dumps(settings)


def _read_toml(path: str) -> dict[str, Any]:
    try:
        path = expanded(path)
    except ValueError as error:
        raise ConfigError(f"job.config_file = {toml_value(path)} is not valid: it {error}.") from None
    if not os.path.exists(path):
        raise ConfigError(f"job.config_file = {toml_value(path)} does not exist; see train_configs/ for recipes.")
    try:
        return read_toml(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"job.config_file cannot be used: {error}.") from None


def _parse_command_line(arguments: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or "." not in name:
            raise ConfigError(f"{argument!r} is not a setting; write --table.key value (see --help).")
        if not equals:
            if not rest or rest[0].startswith("--"):
                if _is_boolean(name):
                    text = "true"
                else:
                    raise ConfigError(f"--{name} needs a value.")
            else:
                text = rest.pop(0)
        table = settings
        *path, key = name.split(".")
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--{name} is a key of {part}, which was given a value; remove one of the two.")
        table[key] = _value(name, text)
    return settings


def _annotation(name: str) -> Any:
    """Return the annotated type of a setting, `table.key`, or None if the setting does not exist."""
    table, _, key = name.partition(".")
    return fields(fields(Config)[table]).get(key) if table in fields(Config) else None


def _is_boolean(name: str) -> bool:
    return getattr(_annotation(name), "__origin__", None) is bool


def _value(name: str, text: str) -> Any:
    """Read a command-line value as TOML. If the setting is a string, or the text is not TOML, return the text."""
    inner = getattr(_annotation(name), "__origin__", None)
    if inner is str or inner == str | None:
        return text
    if inner == list[str] and not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    if inner == list[int] | None and not text.lstrip().startswith("["):
        text = f"[{text}]"
    try:
        # In an inline table, since a text that only begins with a value must not be cut to that value.
        read = tomli.loads(f"table = {{ value = {text.strip()} }}")
    except (ValueError, RecursionError):  # ValueError also for a number with more digits than Python's limit
        return text
    is_all = read.keys() == {"table"} and read["table"].keys() == {"value"} and not text.strip().endswith(",")
    return read["table"]["value"] if is_all else text


def _check_values(value: Any, name: str = "", levels: int = 10) -> None:
    """Raise ConfigError for deep tables, large integers and text that is not UTF-8: no setting needs them."""
    if isinstance(value, (dict, list)):
        if levels == 0:
            raise ConfigError(f"{name} = {{...}} is nested too deeply; no setting has so many levels.")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_values(key, "The name of a setting")
            _check_values(item, f"{name}.{key}" if name else str(key), levels - 1)
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise ConfigError(f"{name} does not fit in 64 bits; give a smaller number.")
    elif isinstance(value, str) and ("\0" in value or not is_unicode(value)):
        raise ConfigError(f"{name} = {toml_value(value)} is not valid: it should be UTF-8 without NUL.")


def _import_custom_modules(source: dict[str, Any], folder: Path | None) -> None:
    """Import custom modules before anything is checked: the names that they register are valid values of settings."""
    names = source.get("job", {}).get("custom_modules", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"job.custom_modules = {toml_value(names)} must be a list of names of Python modules.")
    try:
        import_modules(names, folder)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_table_shape(source: dict[str, Any]) -> None:
    """Check as much as merging needs: that each table, and each letter's table, is a dict."""
    for name, table in source.items():
        if name not in fields(Config):
            raise ConfigError(f"[{name}] is not a table of settings{nearest(name, fields(Config))}.")
        if not isinstance(table, dict):
            raise ConfigError(f"{name} = {toml_value(table)} must be a table, [{name}].")
    layers = source.get("model", {}).get("layers", {})
    for letter, table in layers.items() if isinstance(layers, dict) else [("layers", layers)]:
        if not isinstance(table, dict):
            raise ConfigError(
                f"model.layers.{letter} = {toml_value(table)} must be a table with the settings of a letter's blocks."
            )


def _with_mixer_in_its_letter(source: dict[str, Any]) -> dict[str, Any]:
    """Move `model.mixer`, a shorthand, to `model.layers.L.mixer`."""
    source = copy.deepcopy(source)
    mixer = source.get("model", {}).get("mixer")
    if mixer is not None:
        letter = source["model"].setdefault("layers", {}).setdefault("L", {})
        if letter.setdefault("mixer", mixer) != mixer:
            raise ConfigError(
                f"model.mixer = {toml_value(mixer)} contradicts model.layers.L.mixer = "
                f"{toml_value(letter['mixer'])}; give one of the two."
            )
    return source


def _merge(into: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)
