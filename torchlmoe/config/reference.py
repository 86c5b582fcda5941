"""Every setting with its type, limits, default and meaning, made from the code: for --help and docs/settings.md.

python -m torchlmoe.settings_reference > docs/settings.md
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_origin, get_type_hints

from torchlmoe.config.settings import MODEL_WIDE, Config, Optimizer
from torchlmoe.data.readers import READERS
from torchlmoe.data.recall.store import PREFIX, recall_settings
from torchlmoe.data.recall.tasks import TASKS
from torchlmoe.feed_forwards import FEED_FORWARDS
from torchlmoe.files import toml_value
from torchlmoe.layers.losses import LOSSES, OF_THE_HEAD
from torchlmoe.layers.rope_scaling import ROPE_SCALINGS
from torchlmoe.mixers import MIXERS
from torchlmoe.model.spec import Residual
from torchlmoe.optim import OPTIMIZERS
from torchlmoe.options import keyword_settings

USAGE = "train.py --job.config_file FILE [--table.key value | --table.key=value ...]"
ORDER = "The command line overrides the TOML file, which overrides the flavor."
LETTERS = (
    f"The table of a letter may override these settings of [model]: {', '.join(MODEL_WIDE)}. Its mlp_options override "
    "those of [moe]."
)


@dataclass(frozen=True)
class Setting:
    """name: dotted. kind: type and limits in words. default: as in TOML, None where unset."""

    name: str
    kind: str
    default: str | None
    meaning: str


def sections() -> Iterator[tuple[str, list[Setting]]]:
    """Yield the tables of settings in order, then the options of mixers and of all other registered parts."""
    default = Config()
    for name in get_type_hints(Config):
        table = getattr(default, name)
        hints = get_type_hints(type(table), include_extras=True)
        yield f"[{name}]", [_setting(f"{name}.{key}", hint, getattr(table, key)) for key, hint in hints.items()]
    letter = "model.layers.<letter>"
    yield f"[{letter}] with any mixer and mlp", _options(letter, Residual.settings(), ())
    for mixer, kind in MIXERS.items():
        yield f"[{letter}] with mixer = {mixer!r}", _options(letter, kind.settings(), MODEL_WIDE)
    for mlp, layer in FEED_FORWARDS.items():
        if mlp != "moe":  # whose settings are those of [moe]
            settings = _options(f"{letter}.mlp_options", layer.settings(), ("norm_eps", "init_std"))
            yield f"[{letter}.mlp_options] with mlp = {mlp!r}", settings
    for name, scaling in ROPE_SCALINGS.items():
        if name != "default":
            numbers = _options("model.rope_scaling", keyword_settings(scaling), ())
            yield f"[model.rope_scaling] with type = {name!r}", numbers
    for table, key, registry, known in (
        ("training.loss_options", "training.loss", LOSSES, OF_THE_HEAD),
        ("optimizer.options", "optimizer.name", OPTIMIZERS, tuple(get_type_hints(Optimizer))),
        ("data.reader_options", "data.dataset", READERS, ()),
    ):
        for name, entry in registry.items():
            if name not in ("cross_entropy", "adamw", "muon"):
                yield f"[{table}] with {key} = {name!r}", _options(table, keyword_settings(entry), known)
    for task in TASKS:
        yield (
            f"[data.reader_options] with data.dataset = '{PREFIX}{task}'",
            _options("data.reader_options", recall_settings(task), ()),
        )


def _options(table: str, settings: dict[str, tuple[Any, Any]], known: tuple[str, ...]) -> list[Setting]:
    """Return the settings of a table. known: settings that another table has."""
    return [_setting(f"{table}.{key}", *setting) for key, setting in settings.items() if key not in known]


def _setting(name: str, annotation: Any, default: Any) -> Setting:
    inner, field = annotation.__origin__, annotation.__metadata__[0]
    if get_origin(inner) in (Union, UnionType) and get_origin(inner.__args__[0]) is Literal:
        inner = inner.__args__[0]  # may be unset
    if get_origin(inner) is Literal:
        kind = " | ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in inner.__args__)
    elif get_origin(inner) is list and is_dataclass(inner.__args__[0]):
        kind = "list of tables"
    else:
        kind = str(inner.__name__ if isinstance(inner, type) else inner).replace(" | None", "").replace("typing.", "")
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [
        f"{sign} {getattr(item, name)}"
        for item in field.metadata
        for name, sign in signs.items()
        if getattr(item, name, None) is not None
    ]
    shown = None if default in (None, {}, [], ...) else toml_value(default)
    return Setting(name, " ".join([kind, ", ".join(limits)]).strip(), shown, field.description)


def help_text() -> str:
    lines = [f"usage: {USAGE}", ORDER]
    for title, settings in sections():
        lines += ["", title]
        for setting in settings:
            default = "" if setting.default is None else f"  default {setting.default}"
            lines += [f"  --{setting.name}  <{setting.kind}>{default}", f"      {setting.meaning}"]
    return "\n".join([*lines, "", LETTERS])


def markdown() -> str:
    lines = ["# Settings", "", f"Generated by `python -m torchlmoe.settings_reference`. {ORDER} {LETTERS}"]
    for title, settings in sections():
        lines += ["", f"## {_as_markdown(title)}", ""]
        if not settings:
            lines.append("No settings.")
            continue
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for setting in settings:
            kind, meaning = _as_markdown(setting.kind), _as_markdown(setting.meaning)
            default = f"`{setting.default}`" if setting.default else ""
            lines.append(f"| `{setting.name}` | {kind} | {default} | {meaning} |")
    return "\n".join(lines)


def _as_markdown(text: str) -> str:
    """Escape text outside of code: a bar would end a table's cell, and <letter> would be an HTML tag."""
    return re.sub(r"<(?=[a-z])", "&lt;", text.replace("|", "\\|"))
