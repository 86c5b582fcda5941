"""A family of transformers models: conversion of its settings and weights in both directions.

    family = FAMILIES["qwen3_next"]                  # torchlmoe.interop.families
    tables = family.settings(config_json, place)     # [model] and [moe] of torchlmoe
    content = family.config(model)                   # the keys of config.json
    table = family.rules(model)                      # of weights

A family's file gives three functions. `read` takes the keys of a config.json and returns tables of settings, `write`
is its inverse on a model, and `block_rules` gives the rules of one block's weights. Models are on the meta device.
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
# Attributes that may differ between two modules which compute the same from tokens: how they are drawn, trained, run.
_WITHOUT_EFFECT = {
    "backend", "bias_update_rate", "capacity_factor", "counter_sizes", "init_std", "loss_chunk_size",
    "places_in_common", "training",
}  # fmt: skip


@dataclass(frozen=True)
class Names:
    """Names of a family for the parts around its layers. embedding_norm: None for a family that has none."""

    embedding: str = "model.embed_tokens.weight"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head.weight"
    embedding_norm: str | None = None


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers.

    architecture: transformers' class of the whole model. read: the keys of config.json -> tables of settings. write: a
    model -> keys of config.json. block_rules: one block's weights, by names within the layer (theirs) and
    within the block (ours); it also receives whether the experts are separate, as in most files, or stacked, as in
    transformers' modules, and then gives all names as modules have them. separate_experts: which transformers writes.
    left_out: beginnings of the names of tensors that have no place here, such as those of multi-token prediction;
    {num_layers} in them stands for the number of layers.
    other_names: parts of names, each with what some files have in its place, such as those of multimodal models.
    constants: a model -> tensors of files that follow from its settings, by name, each as a function that makes it.
    They are written, and left out where a file is read.
    module_names: names in transformers' modules, if those in files are others. file_mark: what some name has in files,
    and none in modules.
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
        """Tables `model` and `moe` for a config.json. Raises ValueError for a key that has no counterpart."""
        keys = Keys(content, place)
        tables = self.read(keys)
        keys.integer("vocab_size", least=2)
        keys.finish()
        return tables

    def config(self, model: Decoder) -> dict[str, Any]:
        """The keys of config.json for a model. Raises ValueError if it has a mixer that the family lacks."""
        frame = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "vocab_size": model.spec.vocab_size,
        }
        return frame | self.write(model)

    def rules(self, model: Decoder, separate_experts: bool | None = None) -> list[Rule]:
        """Rules for all weights of a model; separate_experts as transformers writes them if None."""
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
        """Those of the names in a file that have a place in the model."""
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
        """Rules for all weights of a model, by the names that files have for them, which may be the `other_names`."""
        present = set(names)

        def name_in_files(name: str) -> str:
            others = [name.replace(part, other, 1) for part, other in self.other_names]
            return next((other for other in [name, *others] if other in present), name)

        separate = any(self.file_mark in name for name in names)
        return [rule.renamed(name_in_files, str) for rule in self.rules(model, separate)]


def model_tables(kinds: Mapping[str, dict[str, Any]], letters: Sequence[str], **model: Any) -> dict[str, Any]:
    """Tables `model` and `moe`, from each letter's table and the letter of each layer.

    Where all layers of experts have the same options, these become the table `moe`.
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
    """Its blocks in order."""
    return list(model.blocks.values())


def first_feed_forward(model: Decoder, kind: type[L]) -> L | None:
    """The first feed-forward layer of a class, if the model has one."""
    return next((block.feed_forward for block in blocks_of(model) if isinstance(block.feed_forward, kind)), None)


def mixers_of(model: Decoder, model_type: str, *known: str) -> list[Any]:
    """The first mixer of each of the known kinds; None for a kind that the model lacks.

    Raises ValueError for a block whose mixer is of another kind.
    """
    kinds = [MIXERS[name] for name in known]
    first: dict[type, Any] = {}
    for index, block in model.blocks.items():
        kind = type(block.mixer)
        if block.mixer is not None and kind not in kinds:
            raise ValueError(
                f"Block {index} has the mixer {_name_of(kind)}; {model_type} has {' and '.join(known)} alone: choose "
                "another --format."
            )
        first.setdefault(kind, block.mixer)
    return [first.get(kind) for kind in kinds]


def required(mixer: Any, name: str, model_type: str) -> Any:
    """The mixer. Raises ValueError if it is None: a model without one has not all sizes that config.json must hold."""
    if mixer is None:
        raise ValueError(
            f"The model has no layer with the mixer {name}, whose sizes a config.json of {model_type} must hold: "
            "choose another --format."
        )
    return mixer


def all_mixers_of(model: Decoder, model_type: str, *known: str) -> list[Any]:
    """As `mixers_of`. Raises ValueError for a kind that the model lacks."""
    found = mixers_of(model, model_type, *known)
    return [required(mixer, name, model_type) for name, mixer in zip(known, found, strict=True)]


def feed_forward_of(model: Decoder, kind: type[L], model_type: str) -> L:
    """The first feed-forward layer of a class. Raises ValueError if there is none."""
    found = first_feed_forward(model, kind)
    if found is None:
        raise ValueError(
            f"The model has no {kind.__name__} layer among its feed-forward layers, as {model_type} has: choose "
            "another --format."
        )
    return found


def check_equal(model: Decoder, again: Decoder, model_type: str) -> None:
    """Checks that two models on the meta device compute the same. The second was made from the first's config.json.

    Raises ValueError naming the first part that config.json cannot hold.
    """
    ours, theirs = _description(model), _description(again)
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{name} is {_text(ours.get(name))}, for which {model_type} has no counterpart (it has "
                f"{_text(theirs.get(name))}): choose another --format."
            )


def _description(model: Decoder) -> dict[str, Any]:
    """Every class, plain attribute and parameter's shape by name, but for attributes without effect on the output."""
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
