"""Settings from a flavor, a TOML file and the command line: merged, checked, printed.

Whatever does not fit is a `ConfigError`: one sentence that names the value and the remedy.
"""

import copy
import dataclasses
import difflib
import json
import logging
import os
from pathlib import Path
from typing import Any, get_type_hints

import tomli
import tomli_w
from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model

from torchlmoe.config.custom import import_modules
from torchlmoe.config.flavors import FLAVORS
from torchlmoe.config.recall import recall_data
from torchlmoe.config.settings import FEED_FORWARD_WIDE, MODEL_WIDE, Config, Optimizer, Training
from torchlmoe.data.order import check_weights
from torchlmoe.data.readers import READERS
from torchlmoe.data.recall.store import RecallStore, recall_settings, recall_task
from torchlmoe.feed_forwards import FEED_FORWARDS, NONE
from torchlmoe.files import complaint, expanded, is_unicode, read_toml, toml_value
from torchlmoe.layers.losses import LOSSES, OF_THE_HEAD
from torchlmoe.layers.rope_scaling import ROPE_SCALINGS
from torchlmoe.mixers import MIXERS
from torchlmoe.model.spec import Residual
from torchlmoe.optim import OPTIMIZERS
from torchlmoe.options import keyword_settings

logger = logging.getLogger(__name__)

_OF_LETTER = ("mixer", "mlp", "mlp_options")  # the others in a letter's table are its mixer's settings
DEFAULT_LAYERS = {"L": {"mixer": "gated_deltanet", "mlp": "moe"}, "N": {"mixer": "attention", "mlp": "moe"}}

# Settings that do nothing but with others: name -> (the other one, its value, a letter in it or its least number).
_NEEDS: dict[str, tuple[str, Any]] = {
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


class ConfigError(ValueError):
    """A setting that cannot be used."""


def load_config(arguments: list[str]) -> Config:
    """arguments: the command line after the program's name, `--table.key value` or `--table.key=value`; of
    a setting given twice the last one counts.

    Raises:
        ConfigError: unknown, mistyped, out-of-range or contradictory settings, or a file that cannot be read.
    """
    return config_from(_sources(arguments))


def import_custom_modules(arguments: list[str]) -> None:
    """Imports what the settings name, without looking at the others. arguments and errors: of `load_config`."""
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
    """Checked settings from tables of them, of which the later ones count. Raises ConfigError as `load_config` does.

    folder: of weights, if the settings come from there; modules in it are not imported.
    """
    flavor = "debug"
    for source in sources:
        _check_values(source)
        _check_table_shape(source)
        _import_custom_modules(source, folder)
        flavor = source.get("model", {}).get("flavor", flavor)
    if flavor not in [*FLAVORS]:  # a list, because what was given may have no hash
        raise ConfigError(f"model.flavor = {toml_value(flavor)} is unknown{_nearest(str(flavor), FLAVORS)}.")
    merged: dict[str, Any] = {}
    for source in [{"model": {"layers": DEFAULT_LAYERS}}, FLAVORS[flavor], *sources]:
        _merge(merged, _with_mixer_in_its_letter(source))
    if merged["model"].get("mixer") is not None:  # a later source may have named the letter's alone
        merged["model"]["mixer"] = merged["model"]["layers"]["L"]["mixer"]
    try:
        # As JSON, where a strict dataclass may come from a table.
        config = TypeAdapter(Config).validate_json(json.dumps(merged, default=str))
    except ValidationError as error:
        raise ConfigError(_sentence(error, Config)) from None
    _check_layers(config)
    _check_registered(config)
    _shorten_warmup(config, sources)
    _check_needs(config, sources)
    _check_consistency(config)
    return config


def setting(config: Config, name: str) -> Any:
    """The value of a `table.key`."""
    table, _, key = name.partition(".")
    return getattr(getattr(config, table), key)


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved settings, unset ones left out."""

    def given(value: Any) -> Any:
        if isinstance(value, list):
            return [given(item) for item in value]
        if isinstance(value, dict):
            return {key: given(item) for key, item in value.items() if item is not None}
        return value

    return given(dataclasses.asdict(config))


def to_toml(config: Config) -> str:
    """The resolved settings as a TOML file that gives them again."""
    settings = to_dict(config)
    for name in ("config_file", "print_config", "debug"):
        settings["job"].pop(name, None)
    settings["checkpoint"].pop("load_step", None)  # for one start of a run, not for the next
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


def _fields(table: type) -> dict[str, Any]:
    return get_type_hints(table, include_extras=True)


def _annotation(name: str) -> Any:
    """The type of a `table.key`, or None where there is no such setting."""
    table, _, key = name.partition(".")
    return _fields(_fields(Config)[table]).get(key) if table in _fields(Config) else None


def _is_boolean(name: str) -> bool:
    return getattr(_annotation(name), "__origin__", None) is bool


def _value(name: str, text: str) -> Any:
    """A command-line value as TOML would read it; as it stands where the setting is a string, or TOML reads nothing."""
    inner = getattr(_annotation(name), "__origin__", None)
    if inner is str or inner == str | None:
        return text
    if inner == list[str] and not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    if inner == list[int] | None and not text.lstrip().startswith("["):
        text = f"[{text}]"
    try:
        # Closed behind it: of a text that only begins with a value, the rest must not be lost.
        read = tomli.loads(f"table = {{ value = {text.strip()} }}")
    except (ValueError, RecursionError):  # ValueError also where Python's limit of a number's digits is passed
        return text
    is_all = read.keys() == {"table"} and read["table"].keys() == {"value"} and not text.strip().endswith(",")
    return read["table"]["value"] if is_all else text


def _check_values(value: Any, name: str = "", levels: int = 10) -> None:
    """Refuses what no setting holds and much of Python fails on: tables in more levels, larger integers, odd text."""
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
    """First of all, since what they register are values that settings may have."""
    names = source.get("job", {}).get("custom_modules", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"job.custom_modules = {toml_value(names)} must be a list of names of Python modules.")
    try:
        import_modules(names, folder)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_table_shape(source: dict[str, Any]) -> None:
    """Only what merging needs: tables are tables, and a letter's settings are one too."""
    for name, table in source.items():
        if name not in _fields(Config):
            raise ConfigError(f"[{name}] is not a table of settings{_nearest(name, _fields(Config))}.")
        if not isinstance(table, dict):
            raise ConfigError(f"{name} = {toml_value(table)} must be a table, [{name}].")
    layers = source.get("model", {}).get("layers", {})
    for letter, table in layers.items() if isinstance(layers, dict) else [("layers", layers)]:
        if not isinstance(table, dict):
            raise ConfigError(
                f"model.layers.{letter} = {toml_value(table)} must be a table with the settings of a letter's blocks."
            )


def _with_mixer_in_its_letter(source: dict[str, Any]) -> dict[str, Any]:
    """`model.mixer` is short for `model.layers.L.mixer`."""
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


def _check_layers(config: Config) -> None:
    for letter, table in config.model.layers.items():
        prefix = f"model.layers.{letter}"
        if len(letter) != 1 or not letter.isalpha():
            raise ConfigError(f"[{prefix}] must be named by one letter, as in layer_pattern.")
        mixer, mlp = table.get("mixer"), table.get("mlp", "moe")
        if mixer is None:
            raise ConfigError(f"{prefix}.mixer is missing; choose one of {', '.join(MIXERS)}.")
        if mixer not in [*MIXERS, NONE]:
            raise ConfigError(f"{prefix}.mixer = {toml_value(mixer)} is unknown{_nearest(str(mixer), MIXERS)}.")
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
    if "inner_options" in types:  # the mixer holds another one
        if checked.inner not in MIXERS:
            raise ConfigError(
                f"{prefix}.inner = {toml_value(checked.inner)} is unknown{_nearest(checked.inner, MIXERS)}."
            )
        _check_mixer(config, f"{prefix}.inner_options", checked.inner, checked.inner_options or {})


def _check_rope_scaling(prefix: str, table: dict[str, Any] | None) -> None:
    if table is None:
        return
    kind = table.get("type")
    if kind not in [*ROPE_SCALINGS]:
        raise ConfigError(
            f"{prefix}.rope_scaling.type = {toml_value(kind)} is unknown{_nearest(str(kind), ROPE_SCALINGS)}."
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


def _check_registered(config: Config) -> None:
    """What is named by a registry's entry, and the options of that entry."""
    _check_rope_scaling("model", config.model.rope_scaling)
    for name, registry in (("training.loss", LOSSES), ("optimizer.name", OPTIMIZERS)):
        value = setting(config, name)
        if value not in registry:
            raise ConfigError(f"{name} = {toml_value(value)} is unknown{_nearest(value, registry)}.")
    loss = keyword_settings(LOSSES[config.training.loss])
    optimizer = keyword_settings(OPTIMIZERS[config.optimizer.name])
    for name in OF_THE_HEAD:
        loss.pop(name, None)
    _check_options("training.loss_options", loss, config.training.loss_options)
    of_table = _fields(Optimizer)
    own = {name: setting for name, setting in optimizer.items() if name not in of_table}
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


def _check_options(
    prefix: str, types: dict[str, tuple[Any, Any]], given: dict[str, Any], known: tuple[str, ...] = ()
) -> Any:
    """given, held against annotated keyword arguments. known: names that a mistyped one may have meant, too."""
    model = create_model(prefix, __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **types)  # type: ignore[call-overload]
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise ConfigError(_sentence(error, None, prefix, {**types, **dict.fromkeys(known)})) from None


def _check_needs(config: Config, sources: list[dict[str, Any]]) -> None:
    """Refuses what would do nothing; but where a later source than its own changed what it needs, it is left out."""

    def last_source(name: str) -> int:
        table, _, key = name.partition(".")
        return max((index for index, source in enumerate(sources) if key in source.get(table, {})), default=-1)

    for name, (other, needed) in (_NEEDS | _needs_of_optimizer(config)).items():
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
    """What of [optimizer] the chosen one does not take, and the first that does."""
    takers = {name: keyword_settings(builder) for name, builder in OPTIMIZERS.items()}
    idle = [key for key in _fields(Optimizer) if key not in ("name", "options", *takers[config.optimizer.name])]
    return {
        f"optimizer.{key}": ("optimizer.name", next(name for name, taken in takers.items() if key in taken))
        for key in idle
    }


def _shorten_warmup(config: Config, sources: list[dict[str, Any]]) -> None:
    """Keeps the warm-up's share of the steps where a later source than its own gives fewer steps than it has."""
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


def _check_consistency(config: Config) -> None:
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


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; the nearest is {close[0]}" if close else f"; choose one of {', '.join(known)}"


def _known_settings(root: Any, path: list[str]) -> dict[str, Any]:
    """The fields of the table that holds the last name of a path; places in a list are part of it."""
    for part in path[:-1]:
        root = _fields(root)[part] if not part.isdigit() else root
        root = getattr(root, "__origin__", root)  # out of Annotated
        root = root.__args__[0] if getattr(root, "__origin__", None) is list else root
    return _fields(root)


def _sentence(error: ValidationError, root: type | None, prefix: str = "", known: Any = ()) -> str:
    """pydantic's first complaint in our words."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    name = ".".join([*([prefix] if prefix else []), *path])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if root is not None:
            known = _known_settings(root, path)
        return f"{name} is not a setting{_nearest(path[-1], known)}."
    return f"{complaint(error, prefix)}{'; give it a value' * (first['type'] == 'missing')}."
