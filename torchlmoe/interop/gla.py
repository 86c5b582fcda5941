"""Gated linear attention in flash-linear-attention: GLAForCausalLM."""

from __future__ import annotations

from typing import Any

from torchlmoe.interop import fla
from torchlmoe.interop.family import Family
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.rules import Rule
from torchlmoe.model.decoder import Decoder

OTHER_NAMES = (("g_norm_swish_gate.", "g_norm."),)  # name of the norm if fuse_norm = false


def read(keys: Keys) -> dict[str, Any]:
    heads = keys.integer("num_heads", 4)
    keys.only("num_kv_heads", heads)
    keys.only("use_short_conv", False)
    keys.only("use_output_gate", True)
    keys.only("elementwise_affine", True)
    keys.only("feature_map")
    keys.only("clamp_min")
    keys.skip("conv_size", "use_gk", "use_gv")  # flash-linear-attention does not pass these to the layer
    mixer = {
        "mixer": "gla",
        "num_heads": heads,
        "expand_k": keys.number("expand_k", 0.5),
        "expand_v": keys.number("expand_v", 1.0),
        "gate_rank": 16,
        "gate_normalizer": 16.0,
    }
    return fla.read_model(keys, mixer)


def write(model: Decoder) -> dict[str, Any]:
    mixer, around = fla.write_model(model, "gla")
    return {
        **around,
        "num_heads": mixer.num_heads,
        "expand_k": mixer.num_heads * mixer.key_dim / model.spec.dim,
        "expand_v": mixer.num_heads * mixer.value_dim / model.spec.dim,
        "fuse_norm": True,  # the name of a norm follows from it
    }


def gla_rules() -> list[Rule]:
    """Return the rules between GatedLinearAttention and `gla`."""
    return [
        *(Rule(f"{name}_proj.weight", f"{name}_proj.weight") for name in "qkv"),
        Rule("g_proj.weight", "gate_proj.weight"),
        Rule("gk_proj.0.weight", "decay_proj.down_proj.weight"),
        Rule("gk_proj.1.weight", "decay_proj.up_proj.weight"),
        Rule("gk_proj.1.bias", "decay.bias"),
        Rule("o_proj.weight", "o_proj.weight"),
        Rule("g_norm_swish_gate.weight", "norm.weight"),
    ]


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    return fla.layer_rules(block, gla_rules())


FAMILY = Family("gla", "GLAForCausalLM", read, write, block_rules, fla.NAMES, other_names=OTHER_NAMES)
