"""Qwen3 in transformers: Qwen3ForCausalLM."""

from __future__ import annotations

from typing import Any

from torchlmoe.feed_forwards.dense import Dense
from torchlmoe.interop.family import Family, blocks_of, feed_forward_of, mixers_of, model_tables
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
from torchlmoe.model.decoder import Decoder

LAYERS = {"full_attention": "N", "sliding_attention": "W"}


def read(keys: Keys) -> dict[str, Any]:
    num_layers, bias = keys.integer("num_hidden_layers"), keys.flag("attention_bias", False)
    window = keys.integer("sliding_window", None) if keys.flag("use_sliding_window", False) else None
    keys.skip("sliding_window")
    first = keys.integer("max_window_layers", num_layers, least=0)
    default = ["sliding_attention" if window and index >= first else "full_attention" for index in range(num_layers)]
    letters = keys.choices("layer_types", num_layers, LAYERS, default)
    mlp = {"mlp": "dense", "mlp_options": {"mlp_dim": keys.integer("intermediate_size")}}
    full = {**read_attention(keys, qk_norm=True, qkv_bias=bias, output_bias=bias), **mlp}
    return model_tables({"N": full, "W": {**full, "sliding_window": window}}, letters, **read_model(keys))


def write(model: Decoder) -> dict[str, Any]:
    (attention,) = mixers_of(model, "qwen3", "attention")
    windows = [block.mixer.sliding_window for block in blocks_of(model)]
    window = next((each for each in windows if each is not None), None)
    return {
        **write_model(model),
        **write_attention(attention),
        "attention_bias": attention.q_proj.bias is not None,
        "intermediate_size": feed_forward_of(model, Dense, "qwen3").units,
        "layer_types": ["full_attention" if each is None else "sliding_attention" for each in windows],
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    return layer_rules(attention_rules(block.mixer), mlp_rules(block.feed_forward))


FAMILY = Family("qwen3", "Qwen3ForCausalLM", read, write, block_rules)
