"""Bamba in transformers: BambaForCausalLM."""

from __future__ import annotations

from typing import Any

from torchlmoe.feed_forwards.dense import Dense
from torchlmoe.interop import mamba2
from torchlmoe.interop.family import Family, Names, blocks_of, feed_forward_of, mixers_of, model_tables
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.rules import Rule
from torchlmoe.interop.softmax import (
    attention_rules,
    layer_rules,
    mlp_rules,
    read_attention,
    read_model,
    write_attention,
    write_model,
)
from torchlmoe.mixers.attention import Attention
from torchlmoe.mixers.mamba2 import Mamba2
from torchlmoe.model.decoder import Decoder

# Options of `mamba2` and their keys in config.json, also in that of GraniteMoeHybrid.
MAMBA2_KEYS = {
    "num_heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "state_dim": "mamba_d_state",
    "num_groups": "mamba_n_groups",
    "conv_size": "mamba_d_conv",
    "conv_bias": "mamba_conv_bias",
    "proj_bias": "mamba_proj_bias",
    "expand": "mamba_expand",
}


def read_mixers(keys: Keys, *, fraction: float = 1.0, **attention: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the mixers of Mamba layers and of attention layers, with their options.

    fraction: default of rotary_fraction. attention: more options of attention.
    """
    bias = keys.flag("attention_bias", False)
    keys.skip("mamba_chunk_size")
    return (
        {**mamba2.read_mamba2(keys, MAMBA2_KEYS), **mamba2.read_step_limits(keys)},
        {**read_attention(keys, fraction=fraction, qkv_bias=bias, output_bias=bias), **attention},
    )


def write_mixers(model: Decoder, model_type: str, *, fraction: bool = False) -> dict[str, Any]:
    """The inverse of `read_mixers`. If the model lacks one of the mixers, its keys get any valid sizes."""
    mamba, attention = mixers_of(model, model_type, "mamba2", "attention")
    written = mamba2.write_mamba2(mamba, model.spec.dim, MAMBA2_KEYS)
    heads = {"num_attention_heads": 1} if attention is None else write_attention(attention, fraction=fraction)
    return {
        **written,
        **mamba2.write_expand(written, model.spec.dim, MAMBA2_KEYS, model_type),
        **mamba2.write_step_limits(mamba),
        **heads,
        "attention_bias": attention is not None and attention.q_proj.bias is not None,
    }


def mixer_rules(mixer: Any) -> tuple[str, list[Rule]]:
    """Return the name of a layer's mixer and its rules."""
    return ("mamba", mamba2.rules_of(mixer)) if isinstance(mixer, Mamba2) else ("self_attn", attention_rules(mixer))


def read(keys: Keys) -> dict[str, Any]:
    num_layers, attention_layers = keys.integer("num_hidden_layers"), keys.take("attn_layer_indices", [], list)
    mamba, attention = read_mixers(keys, fraction=0.5)
    keys.only("mlp_bias", False)
    # In older files, attn_rotary_emb is half of the width of a head.
    keys.skip("num_logits_to_keep", "z_loss_coefficient", "attn_rotary_emb")
    dense = {"mlp": "dense", "mlp_options": {"mlp_dim": keys.integer("intermediate_size")}}
    letters = ["N" if index in attention_layers else "L" for index in range(num_layers)]
    return model_tables({"L": mamba | dense, "N": attention | dense}, letters, **read_model(keys, norm_eps=1e-5))


def write(model: Decoder) -> dict[str, Any]:
    return {
        **write_model(model),
        **write_mixers(model, "bamba", fraction=True),
        "attn_layer_indices": [
            index for index, block in enumerate(blocks_of(model)) if isinstance(block.mixer, Attention)
        ],
        "intermediate_size": feed_forward_of(model, Dense, "bamba").units,
    }


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    name, mixer = mixer_rules(block.mixer)
    return layer_rules(
        mixer,
        mlp_rules(block.feed_forward),
        mixer_name=name,
        feed_forward_name="feed_forward",
        feed_forward_norm="pre_ff_layernorm",
    )


FAMILY = Family("bamba", "BambaForCausalLM", read, write, block_rules, Names(norm="model.final_layernorm"))
