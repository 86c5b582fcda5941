"""Llama in transformers: LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

from torchlmoe.feed_forwards.dense import Dense
from torchlmoe.interop.family import Family, feed_forward_of, mixers_of, model_tables
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


def read(keys: Keys) -> dict[str, Any]:
    keys.only("mlp_bias", False)
    keys.skip("pretraining_tp")
    bias = keys.flag("attention_bias", False)
    attention = read_attention(keys, qkv_bias=bias, output_bias=bias)
    layer = {**attention, "mlp": "dense", "mlp_options": {"mlp_dim": keys.integer("intermediate_size")}}
    return model_tables({"N": layer}, "N" * keys.integer("num_hidden_layers"), **read_model(keys))


def write(model: Decoder) -> dict[str, Any]:
    (attention,) = mixers_of(model, "llama", "attention")
    return {
        **write_model(model),
        **write_attention(attention),
        "attention_bias": attention.q_proj.bias is not None,
        "intermediate_size": feed_forward_of(model, Dense, "llama").units,
    }


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    return layer_rules(attention_rules(block.mixer), mlp_rules(block.feed_forward))


FAMILY = Family("llama", "LlamaForCausalLM", read, write, block_rules)
