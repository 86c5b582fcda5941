"""Language model of Qwen3.5, dense, in transformers: Qwen3_5ForCausalLM. It has the mixers of Qwen3-Next, except that
the projections of Gated DeltaNet are not interleaved by head.
"""

from __future__ import annotations

from typing import Any

from torchlmoe.feed_forwards.dense import Dense
from torchlmoe.interop.family import Family, feed_forward_of, model_tables
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.qwen3_next import (
    convolution_rule,
    gated_attention_rules,
    read_layer_types,
    read_mixers,
    write_mixers,
)
from torchlmoe.interop.rules import Rule
from torchlmoe.interop.softmax import layer_rules, mlp_rules, read_model, write_model
from torchlmoe.interop.steps import Split
from torchlmoe.mixers.attention import Attention
from torchlmoe.mixers.gated_deltanet import GatedDeltaNet
from torchlmoe.model.decoder import Decoder

LEFT_OUT = ("mtp.", "model.visual.")
OTHER_NAMES = (("model.", "model.language_model."),)


def read_text(keys: Keys) -> dict[str, Any]:
    """Return settings of `[model]`."""
    keys.only("attn_output_gate", True)
    # Files on the hub have these keys, which have no effect on text.
    keys.skip("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    return {"zero_centered_norm": True, **read_model(keys)}


def read(keys: Keys) -> dict[str, Any]:
    mlp = {"mlp": "dense", "mlp_options": {"mlp_dim": keys.integer("intermediate_size")}}
    kinds = {letter: {**mixer, **mlp} for letter, mixer in read_mixers(keys).items()}
    letters = read_layer_types(keys, keys.integer("num_hidden_layers"))
    return model_tables(kinds, letters, **read_text(keys))


def write(model: Decoder) -> dict[str, Any]:
    return {
        **write_model(model),
        **write_mixers(model, "qwen3_5_text"),
        "intermediate_size": feed_forward_of(model, Dense, "qwen3_5_text").units,
    }


def gated_deltanet_rules(mixer: GatedDeltaNet) -> list[Rule]:
    """Return the rules between Qwen3_5GatedDeltaNet and `gated_deltanet`."""
    widths = (mixer.num_key_heads * mixer.key_dim,) * 2 + (mixer.num_heads * mixer.value_dim,)
    return [
        convolution_rule(*widths, mixer.q_conv.weight.shape[-1]),
        Rule("in_proj_qkv.weight", ["q_proj.weight", "k_proj.weight", "v_proj.weight"], Split(widths)),
        Rule("in_proj_z.weight", "gate_proj.weight"),
        Rule("in_proj_b.weight", "b_proj.weight"),
        Rule("in_proj_a.weight", "a_proj.weight"),
        Rule("dt_bias", "decay.dt_bias"),
        Rule("A_log", "decay.A_log"),
        Rule("norm.weight", "norm.weight"),
        Rule("out_proj.weight", "o_proj.weight"),
    ]


def layer_of(mixer: Any, feed_forward: list[Rule]) -> list[Rule]:
    """Return the rules for a layer. feed_forward: rules of its feed-forward layer."""
    if isinstance(mixer, Attention):
        table = gated_attention_rules(num_heads=mixer.num_heads, head_dim=mixer.head_dim)
        return layer_rules(table, feed_forward)
    return layer_rules(gated_deltanet_rules(mixer), feed_forward, mixer_name="linear_attn")


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    return layer_of(block.mixer, mlp_rules(block.feed_forward))


FAMILY = Family(
    "qwen3_5_text", "Qwen3_5ForCausalLM", read, write, block_rules, left_out=LEFT_OUT, other_names=OTHER_NAMES
)
