"""Qwen3-Next in transformers: Qwen3NextForCausalLM. Its feed-forward layers are those of Qwen2-MoE."""

from __future__ import annotations

from typing import Any

from torchlmoe.interop.family import Family, all_mixers_of, model_tables
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.layer_types import DENSE, LAYERS, write_layer_types
from torchlmoe.interop.qwen2_moe import feed_forward_rules, read_feed_forwards, write_shared_feed_forwards
from torchlmoe.interop.rules import Rule
from torchlmoe.interop.softmax import layer_rules, read_attention, read_model, write_attention, write_model
from torchlmoe.interop.steps import Flatten, Split
from torchlmoe.mixers.attention import Attention
from torchlmoe.mixers.gated_deltanet import GatedDeltaNet
from torchlmoe.model.decoder import Decoder


def read_deltanet(keys: Keys) -> dict[str, Any]:
    """Return a letter's mixer with its options."""
    key_dim, value_dim = keys.integer("linear_key_head_dim"), keys.integer("linear_value_head_dim")
    return {
        "mixer": "gated_deltanet",
        "num_heads": keys.integer("linear_num_value_heads"),
        "num_key_heads": keys.integer("linear_num_key_heads"),
        "head_dim": key_dim,
        "expand_v": value_dim / key_dim,
        "conv_size": keys.integer("linear_conv_kernel_dim"),
    }


def write_deltanet(mixer: GatedDeltaNet) -> dict[str, Any]:
    """The inverse of `read_deltanet`."""
    return {
        "linear_num_value_heads": mixer.num_heads,
        "linear_num_key_heads": mixer.num_key_heads,
        "linear_key_head_dim": mixer.key_dim,
        "linear_value_head_dim": mixer.value_dim,
        "linear_conv_kernel_dim": mixer.q_conv.weight.shape[-1],
    }


def read_mixers(keys: Keys) -> dict[str, dict[str, Any]]:
    """Return the mixers of the letters L and N with their options."""
    keys.only("attention_bias", False)
    for name in ("head_dim", "num_key_value_heads"):  # required, since their defaults differ from other families'
        keys.integer(name)
    attention = read_attention(keys, fraction=0.25, qk_norm=True, output_gate=True)
    return {"L": read_deltanet(keys), "N": attention}


def write_mixers(model: Decoder, model_type: str) -> dict[str, Any]:
    """The inverse of `read_mixers` and `read_layer_types`."""
    deltanet, attention = all_mixers_of(model, model_type, "gated_deltanet", "attention")
    return {
        **write_layer_types(model),
        **write_deltanet(deltanet),
        **write_attention(attention, fraction=True),
    }


def read_layer_types(keys: Keys, num_layers: int) -> list[str]:
    """Return a letter for each layer: L for Gated DeltaNet, N for attention."""
    every = keys.integer("full_attention_interval", 4)
    default = ["linear_attention" if (index + 1) % every else "full_attention" for index in range(num_layers)]
    return keys.choices("layer_types", num_layers, LAYERS, default)


def read(keys: Keys) -> dict[str, Any]:
    keys.integer("shared_expert_intermediate_size")  # required here, unlike in Qwen3-MoE
    sparse, experts, dense = read_feed_forwards(keys, normalize=True)
    mixers = read_mixers(keys)
    kinds = {letter: {**mixer, **experts} for letter, mixer in mixers.items()}
    kinds |= {DENSE[letter]: {**mixer, **dense} for letter, mixer in mixers.items()}
    letters = read_layer_types(keys, len(sparse))
    letters = [letter if is_sparse else DENSE[letter] for letter, is_sparse in zip(letters, sparse, strict=True)]
    return model_tables(kinds, letters, zero_centered_norm=True, **read_model(keys))


def write(model: Decoder) -> dict[str, Any]:
    return {
        **write_model(model),
        **write_shared_feed_forwards(model, "qwen3_next"),
        **write_mixers(model, "qwen3_next"),
    }


def convolution_rule(query_width: int, key_width: int, value_width: int, conv_size: int) -> Rule:
    """Return the rule between one convolution over the channels of q, k and v, and three convolutions."""
    names = ["q_conv.weight", "k_conv.weight", "v_conv.weight"]
    return Rule("conv1d.weight", names, Flatten((1, conv_size), dim=1), Split((query_width, key_width, value_width)))


def gated_deltanet_rules(
    *, num_heads: int, num_key_heads: int, key_dim: int, value_dim: int, conv_size: int
) -> list[Rule]:
    """Return the rules between Qwen3NextGatedDeltaNet and `gated_deltanet`. key_dim, value_dim: widths of one head."""
    shared = num_heads // num_key_heads  # value heads for each key head
    key_width, value_width = num_key_heads * key_dim, num_heads * value_dim
    return [
        # One matrix has, for each key head, the rows of q, k, v and z of that head, where v and z have several value
        # heads. Another matrix has the rows of b and a.
        Rule(
            "in_proj_qkvz.weight",
            ["q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight"],
            Split((key_dim, key_dim, shared * value_dim, shared * value_dim), groups=num_key_heads),
        ),
        Rule("in_proj_ba.weight", ["b_proj.weight", "a_proj.weight"], Split((shared, shared), groups=num_key_heads)),
        convolution_rule(key_width, key_width, value_width, conv_size),
        Rule("A_log", "decay.A_log"),
        Rule("dt_bias", "decay.dt_bias"),
        Rule("norm.weight", "norm.weight"),
        Rule("out_proj.weight", "o_proj.weight"),
    ]


def gated_attention_rules(*, num_heads: int, head_dim: int) -> list[Rule]:
    """Return the rules between Qwen3NextAttention and `attention` with qk_norm, output_gate, zero_centered_norm."""
    return [
        # Their q_proj has, for each head, the rows of q and then those of its gate.
        Rule("q_proj.weight", ["q_proj.weight", "gate_proj.weight"], Split((head_dim, head_dim), groups=num_heads)),
        Rule("k_proj.weight", "k_proj.weight"),
        Rule("v_proj.weight", "v_proj.weight"),
        Rule("o_proj.weight", "o_proj.weight"),
        Rule("q_norm.weight", "q_norm.weight"),
        Rule("k_norm.weight", "k_norm.weight"),
    ]


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    feed_forward, mixer = feed_forward_rules(block.feed_forward, separate_experts), block.mixer
    if isinstance(mixer, Attention):
        table = gated_attention_rules(num_heads=mixer.num_heads, head_dim=mixer.head_dim)
        return layer_rules(table, feed_forward)
    assert isinstance(mixer, GatedDeltaNet)
    sizes = dict(num_heads=mixer.num_heads, num_key_heads=mixer.num_key_heads, key_dim=mixer.key_dim)
    conv_size = mixer.q_conv.weight.shape[-1]
    table = gated_deltanet_rules(**sizes, value_dim=mixer.value_dim, conv_size=conv_size)
    return layer_rules(table, feed_forward, mixer_name="linear_attn")


FAMILY = Family("qwen3_next", "Qwen3NextForCausalLM", read, write, block_rules, left_out=("mtp.",))
