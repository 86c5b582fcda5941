"""Mamba2 in transformers: Mamba2ForCausalLM. Bamba, GraniteMoeHybrid, Nemotron-H have its mixer under other names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torchlmoe.interop.family import Family, mixers_of, model_tables
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.mamba import NAMES, layer_rules, read_model, whole_multiple, write_model
from torchlmoe.interop.rules import Rule
from torchlmoe.interop.steps import Flatten, Split
from torchlmoe.mixers.mamba2 import Mamba2
from torchlmoe.model.decoder import Decoder

# Options of `mamba2` and their keys in config.json.
KEYS = {
    "num_heads": "num_heads",
    "head_dim": "head_dim",
    "state_dim": "state_size",
    "num_groups": "n_groups",
    "conv_size": "conv_kernel",
    "conv_bias": "use_conv_bias",
    "proj_bias": "use_bias",
    "expand": "expand",
}


def read_mamba2(keys: Keys, names: Mapping[str, str]) -> dict[str, Any]:
    """Return a letter's mixer with its options, without the limits of the step. names: keys, like `KEYS`."""
    sizes = {option: keys.integer(names[option]) for option in ("num_heads", "state_dim", "num_groups", "conv_size")}
    head_dim = keys.take(names["head_dim"], "auto", (int, str))
    if head_dim == "auto":
        head_dim = keys.integer(names["expand"]) * keys.integer("hidden_size") // sizes["num_heads"]
    keys.skip(names["expand"])
    return {
        "mixer": "mamba2",
        **sizes,
        "head_dim": head_dim,
        "expand_v": 1.0,
        "conv_bias": keys.flag(names["conv_bias"], True),
        "proj_bias": keys.flag(names["proj_bias"], False),
    }


def write_mamba2(mixer: Mamba2 | None, dim: int, names: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `read_mamba2`, without `expand`. If mixer is None, return any sizes that fit together."""
    values: dict[str, Any] = dict.fromkeys(("num_heads", "state_dim", "num_groups", "conv_size"), 1)
    values |= {"head_dim": 2 * dim, "conv_bias": True, "proj_bias": False}
    if mixer is not None:
        values = {
            "num_heads": mixer.num_heads,
            "state_dim": mixer.key_dim,
            "num_groups": mixer.num_key_heads,
            "conv_size": mixer.q_conv.weight.shape[-1],
            "head_dim": mixer.value_dim,
            "conv_bias": mixer.q_conv.bias is not None,
            "proj_bias": mixer.q_proj.bias is not None,
        }
    return {names[option]: value for option, value in values.items()}


def write_expand(written: Mapping[str, Any], dim: int, names: Mapping[str, str], model_type: str) -> dict[str, Any]:
    """Return the key of `expand`. written: the other keys of the mixer. Some families in transformers check it."""
    width = written[names["num_heads"]] * written[names["head_dim"]]
    return {names["expand"]: whole_multiple(width, dim, model_type)}


def read_step_limits(keys: Keys) -> dict[str, Any]:
    """Return options min_step and max_step. transformers writes infinity as {"__float__": "Infinity"}."""
    given = keys.take("time_step_limit", [0.0, math.inf], list)
    try:
        low, high = (float(each["__float__"] if isinstance(each, dict) else each) for each in given)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{keys.place} has time_step_limit = {given}, which must be two numbers.") from None
    return {"min_step": low, "max_step": None if high == math.inf else high}


def write_step_limits(mixer: Mamba2 | None) -> dict[str, Any]:
    """The inverse of `read_step_limits`."""
    low, high = (0.0, None) if mixer is None else mixer.decay.step_limits or (0.0, None)
    return {"time_step_limit": [low, {"__float__": "Infinity"} if high is None else high]}


def read(keys: Keys) -> dict[str, Any]:
    layer = {**read_mamba2(keys, KEYS), **read_step_limits(keys), "mlp": "none"}
    # Some files have norm_before_gate and rms_norm, which transformers ignores.
    keys.skip("chunk_size", "time_step_rank", "norm_before_gate", "rms_norm")
    return model_tables({"L": layer}, "L" * keys.integer("num_hidden_layers"), **read_model(keys, tied=False))


def write(model: Decoder) -> dict[str, Any]:
    (mixer,) = mixers_of(model, "mamba2", "mamba2")
    written = write_mamba2(mixer, model.spec.dim, KEYS)
    return {
        **write_model(model),
        **written,
        **write_expand(written, model.spec.dim, KEYS, "mamba2"),
        **write_step_limits(mixer),
    }


def mamba2_rules(
    *,
    num_heads: int,
    head_dim: int,
    state_dim: int,
    num_groups: int,
    conv_size: int,
    conv_bias: bool = True,
    proj_bias: bool = False,
) -> list[Rule]:
    """Return the rules between Mamba2Mixer and `mamba2`. head_dim: width of a value head."""
    value_width, key_width = num_heads * head_dim, num_groups * state_dim
    convolved = Split((value_width, key_width, key_width))  # called x, B and C there
    projected = Split((value_width, value_width, key_width, key_width, num_heads))
    projections, convolutions = ("gate_proj", "v_proj", "k_proj", "q_proj", "dt_proj"), ("v_conv", "k_conv", "q_conv")
    rules = [
        Rule("in_proj.weight", [f"{name}.weight" for name in projections], projected),
        Rule("conv1d.weight", [f"{name}.weight" for name in convolutions], Flatten((1, conv_size), dim=1), convolved),
        Rule("A_log", "decay.A_log"),
        Rule("dt_bias", "decay.dt_bias"),
        Rule("D", "D"),
        Rule("norm.weight", "norm.weight"),
        Rule("out_proj.weight", "o_proj.weight"),
    ]
    if conv_bias:
        rules.append(Rule("conv1d.bias", [f"{name}.bias" for name in convolutions], convolved))
    if proj_bias:
        rules.append(Rule("in_proj.bias", [f"{name}.bias" for name in projections], projected))
        rules.append(Rule("out_proj.bias", "o_proj.bias"))
    return rules


def rules_of(mixer: Mamba2) -> list[Rule]:
    """Return `mamba2_rules` with the sizes of a mixer."""
    return mamba2_rules(
        num_heads=mixer.num_heads,
        head_dim=mixer.value_dim,
        state_dim=mixer.key_dim,
        num_groups=mixer.num_key_heads,
        conv_size=mixer.q_conv.weight.shape[-1],
        conv_bias=mixer.q_conv.bias is not None,
        proj_bias=mixer.q_proj.bias is not None,
    )


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    return layer_rules(rules_of(block.mixer))


FAMILY = Family("mamba2", "Mamba2ForCausalLM", read, write, block_rules, NAMES)
