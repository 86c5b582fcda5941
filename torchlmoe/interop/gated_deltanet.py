"""Gated DeltaNet in flash-linear-attention: GatedDeltaNetForCausalLM."""

from __future__ import annotations

from typing import Any

from torchlmoe.interop import fla
from torchlmoe.interop.family import Family
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.rules import Rule
from torchlmoe.interop.steps import Flatten
from torchlmoe.mixers.attention import Attention
from torchlmoe.model.decoder import Decoder


def read(keys: Keys) -> dict[str, Any]:
    keys.only("use_gate", True)
    keys.only("output_gate_activation", "swish", "silu")
    keys.only("use_short_conv", True)
    key_heads = keys.integer("num_heads", 6)
    mixer = {
        "mixer": "gated_deltanet",
        "num_heads": keys.integer("num_v_heads", key_heads),
        "num_key_heads": key_heads,
        "head_dim": keys.integer("head_dim", 256),
        "expand_v": keys.number("expand_v", 2.0),
        "negative_eigenvalues": keys.flag("allow_neg_eigval", False),
        "conv_size": keys.integer("conv_size", 4),
    }
    return fla.read_model(keys, mixer)


def write(model: Decoder) -> dict[str, Any]:
    mixer, around = fla.write_model(model, "gated_deltanet")
    return {
        **around,
        "num_heads": mixer.num_key_heads,
        "num_v_heads": mixer.num_heads,
        "head_dim": mixer.key_dim,
        "expand_v": mixer.value_dim / mixer.key_dim,
        "allow_neg_eigval": mixer.max_beta == 2,
        "conv_size": mixer.q_conv.weight.shape[-1],
    }


def gated_deltanet_rules(convolutions: list[Rule]) -> list[Rule]:
    """Return the rules between GatedDeltaNet and `gated_deltanet`. convolutions: the rules of the convolutions."""
    return [
        *(Rule(f"{name}_proj.weight", f"{name}_proj.weight") for name in "qkvab"),
        Rule("A_log", "decay.A_log"),
        Rule("dt_bias", "decay.dt_bias"),
        *convolutions,
        Rule("g_proj.weight", "gate_proj.weight"),
        Rule("o_norm.weight", "norm.weight"),
        Rule("o_proj.weight", "o_proj.weight"),
    ]


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    if isinstance(block.mixer, Attention):
        return fla.layer_rules(block, [])
    squeeze = Flatten((1, block.mixer.q_conv.weight.shape[-1]), dim=1)
    convolutions = [Rule(f"{name}_conv1d.weight", f"{name}_conv.weight", squeeze) for name in "qkv"]
    return fla.layer_rules(block, gated_deltanet_rules(convolutions))


FAMILY = Family("gated_deltanet", "GatedDeltaNetForCausalLM", read, write, block_rules, fla.NAMES)
