"""A family of transformers models: conversion of its settings and weights in both directions.

    family = FAMILIES["qwen3_next"]                  # torchlmoe.interop.families
    tables = family.settings(config_json, place)     # [model] and [moe] of torchlmoe
    content = family.config(model)                   # the keys of config.json
    table = family.rules(model)                      # rules for all weights

The file of a family has three functions. `read` returns the tables of settings for the keys of a config.json. `write`
returns the keys for a model. `block_rules` returns the rules for the weights of one block. Models are on the meta
device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn

from torchlmoe.feed_forwards.base import FeedForward
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.rules import Rule, prefixed
from torchlmoe.layers.rope_scaling import RopeScaling
from torchlmoe.mixers import MIXERS
from torchlmoe.model.decoder import Decoder
from torchlmoe.model.spec import Residual

L = TypeVar("L", bound=FeedForward)
_PLAIN = (bool, int, float, str, tuple, list, dict, type(None), FunctionType, Residual, RopeScaling)
# Attributes that do not change the outputs of a module: initial values, options of training, choice of backend.
_WITHOUT_EFFECT = {
    "backend", "bias_update_rate", "capacity_factor", "counter_sizes", "init_std", "loss_chunk_size",
    "places_in_common", "training",
}  # fmt: skip


@dataclass(frozen=True)
class Names:
    """Names of the weights outside of the layers, of the norms there, and of the list of layers.

    embedding_norm: None for a family without one.
    """

    embedding: str = "model.embed_tokens.weight"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head.weight"
    embedding_norm: str | None = None


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers.

    Transformers renames tensors when it saves a model, so a rule may have two forms: one for the names in files, where
    most families have separate matrices for each expert, and one for the names in transformers' modules, where experts
    are stacked.

    architecture: name of transformers' class of the whole model.
    read: returns the tables of settings for the keys of a config.json.
    write: returns the keys of config.json for a model.
    block_rules: takes a block and whether names are those of files (True) or of modules (False). Returns the rules
        for its weights, by their names within the layer of transformers and within our block.
    separate_experts: whether transformers writes files with separate experts.
    left_out: prefixes of tensors that have no place in torchlmoe, such as those of multi-token prediction.
        {num_layers} in a prefix is replaced by the number of layers.
    other_names: pairs of a part of a name and its replacement in some files, such as those of multimodal models.
    constants: returns, for a model, tensors of files that are computed from its settings: name -> function without
        arguments. An export writes them, and an import ignores them.
    module_names: names in transformers' modules if they differ from those in files.
    file_mark: a part of names that occurs in files only, never in modules.
    """

    model_type: str
    architecture: str
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[Decoder], dict[str, Any]]
    block_rules: Callable[[Any, bool], list[Rule]]
    names: Names = Names()
    separate_experts: bool = True
    left_out: tuple[str, ...] = ()
    other_names: tuple[tuple[str, str], ...] = ()
    constants: Callable[[Decoder], dict[str, Callable[[], Tensor]]] = lambda model: {}
    module_names: Names | None = None
    file_mark: str = ".experts.0."

    def settings(self, content: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Return the tables `model` and `moe` for a config.json. Raises ValueError for a key without a counterpart."""
        keys = Keys(content, place)
        tables = self.read(keys)
        keys.integer("vocab_size", least=2)
        keys.finish()
        return tables

    def config(self, model: Decoder) -> dict[str, Any]:
        """Return the keys of config.json for a model. Raises ValueError if it has a mixer that the family lacks."""
        frame = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "vocab_size": model.spec.vocab_size,
        }
        return frame | self.write(model)

    def rules(self, model: Decoder, separate_experts: bool | None = None) -> list[Rule]:
        """Return the rules for all weights of a model.

        separate_experts: names of files (True) or of modules (False); if None, names as transformers writes them.
        """
        separate = self.separate_experts if separate_experts is None else separate_experts
        names = self.names if separate or self.module_names is None else self.module_names
        table = [Rule(names.embedding, "embedding.weight"), *norm_rules(model.head.norm, names.norm, "head.norm")]
        if model.embedding_norm is not None:
            assert names.embedding_norm is not None  # `check_equal` has refused other families
            table += norm_rules(model.embedding_norm, names.embedding_norm, "embedding_norm")
        if model.head.projection is not None:
            table.append(Rule(names.head, "head.projection.weight"))
        for index, block in model.blocks.items():
            table += prefixed(self.block_rules(block, separate), f"{names.layers}.{index}.", f"blocks.{index}.")
        return table

    def places(self, model: Decoder, names: Collection[str]) -> list[str]:
        """Return those names of a file's tensors that belong to the model."""
        beginnings = [beginning.format(num_layers=len(model.blocks)) for beginning in self.left_out]
        if model.head.projection is None:
            beginnings.append(self.names.head)
        constants = self.constants(model)
        return [
            name
            for name in names
            if not name.startswith(tuple(beginnings)) and not name.endswith(".inv_freq") and name not in constants
        ]

    def rules_of_files(self, model: Decoder, names: Collection[str]) -> list[Rule]:
        """Return the rules for all weights of a model, by the given names of a file, which may use `other_names`."""
        present = set(names)

        def name_in_files(name: str) -> str:
            others = [name.replace(part, other, 1) for part, other in self.other_names]
            return next((other for other in [name, *others] if other in present), name)

        separate = any(self.file_mark in name for name in names)
        return [rule.renamed(name_in_files, str) for rule in self.rules(model, separate)]


def model_tables(kinds: Mapping[str, dict[str, Any]], letters: Sequence[str], **model: Any) -> dict[str, Any]:
    """Return the tables `model` and `moe`.

    kinds: the table of each letter. letters: the letter of each layer. model: other settings of `[model]`.
    If all layers with experts have the same options, these become the table `moe`.
    """
    period = next(p for p in range(1, len(letters) + 1) if all(x == letters[i % p] for i, x in enumerate(letters)))
    used = {letter: dict(kinds[letter]) for letter in dict.fromkeys(letters)}
    experts = [table for table in used.values() if table.get("mlp", "moe") == "moe"]
    moe = experts[0].get("mlp_options", {}) if experts else {}
    if all(table.get("mlp_options", {}) == moe for table in experts):
        for table in experts:
            table.pop("mlp_options", None)
    else:
        moe = {}
    pattern = "".join(letters[:period])
    return {"model": {"layer_pattern": pattern, "num_layers": len(letters), "layers": used, **model}, "moe": moe}


def norm_rules(norm: nn.Module, theirs: str, ours: str) -> list[Rule]:
    """A norm's weight and, if it has one, bias. theirs, ours: its name in both models."""
    return [Rule(f"{theirs}.{name}", f"{ours}.{name}") for name, _ in norm.named_parameters()]


def blocks_of(model: Decoder) -> list[Any]:
    """Return the blocks of a model, in order."""
    return list(model.blocks.values())


def first_feed_forward(model: Decoder, kind: type[L]) -> L | None:
    """Return the first feed-forward layer of a class, or None."""
    return next((block.feed_forward for block in blocks_of(model) if isinstance(block.feed_forward, kind)), None)


def mixers_of(model: Decoder, model_type: str, *known: str) -> list[Any]:
    """Return the first mixer of each of the known kinds, or None for a kind that the model lacks.

    Raises ValueError for a block whose mixer has another kind.
    """
    kinds = [MIXERS[name] for name in known]
    first: dict[type, Any] = {}
    for index, block in model.blocks.items():
        kind = type(block.mixer)
        if block.mixer is not None and kind not in kinds:
            raise ValueError(
                f"Block {index} has the mixer {_name_of(kind)}; {model_type} has only {' and '.join(known)}: choose "
                "another --format."
            )
        first.setdefault(kind, block.mixer)
    return [first.get(kind) for kind in kinds]


def required(mixer: Any, name: str, model_type: str) -> Any:
    """Return the mixer. Raises ValueError if it is None: config.json must have its sizes."""
    if mixer is None:
        raise ValueError(
            f"The model has no layer with the mixer {name}, whose sizes a config.json of {model_type} must have: "
            "choose another --format."
        )
    return mixer


def all_mixers_of(model: Decoder, model_type: str, *known: str) -> list[Any]:
    """Return the first mixer of each kind, like `mixers_of`. Raises ValueError for a kind that the model lacks."""
    found = mixers_of(model, model_type, *known)
    return [required(mixer, name, model_type) for name, mixer in zip(known, found, strict=True)]


def feed_forward_of(model: Decoder, kind: type[L], model_type: str) -> L:
    """Return the first feed-forward layer of a class. Raises ValueError if there is none."""
    found = first_feed_forward(model, kind)
    if found is None:
        raise ValueError(
            f"The model has no feed-forward layer of class {kind.__name__}, but {model_type} needs one: choose "
            "another --format."
        )
    return found


def check_equal(model: Decoder, again: Decoder, model_type: str) -> None:
    """Check that two models on the meta device compute the same function.

    model: the model to export. again: the model that its config.json describes.
    Raises ValueError that names the first part that config.json cannot describe.
    """
    ours, theirs = _description(model), _description(again)
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{name} is {_text(ours.get(name))}, for which {model_type} has no counterpart (it has "
                f"{_text(theirs.get(name))}): choose another --format."
            )


def _description(model: Decoder) -> dict[str, Any]:
    """Return classes, plain attributes and shapes of parameters by name, without attributes that change no output."""
    found: dict[str, Any] = {"model.embedding_multiplier": model.spec.embedding_multiplier}
    for path, module in model.named_modules():
        if path.endswith("load_balance"):
            continue
        found[path or "The model"] = type(module)
        for name, value in vars(module).items():
            if isinstance(value, _PLAIN) and not name.startswith("_") and name not in _WITHOUT_EFFECT:
                found[f"{path}.{name}"] = value
    return found | {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def _text(value: Any) -> str:
    return _name_of(value) if isinstance(value, type) else str(value)


def _name_of(kind: type) -> str:
    names = [name for name, mixer in MIXERS.items() if mixer is kind]
    return names[0] if names else kind.__name__
