"""Qwen3-MoE in transformers: Qwen3MoeForCausalLM."""

from __future__ import annotations

from typing import Any

from torchlmoe.interop.family import Family, mixers_of, model_tables
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.qwen2_moe import feed_forward_rules, read_feed_forwards, write_feed_forwards
from torchlmoe.interop.rules import Rule
from torchlmoe.interop.softmax import (
    attention_rules,
    layer_rules,
    read_attention,
    read_model,
    write_attention,
    write_model,
)
from torchlmoe.model.decoder import Decoder


def read(keys: Keys) -> dict[str, Any]:
    sparse, experts, dense = read_feed_forwards(keys, normalize=False)
    window = keys.integer("sliding_window", None) if keys.flag("use_sliding_window", False) else None
    keys.skip("sliding_window", "max_window_layers")
    bias = keys.flag("attention_bias", False)
    attention = read_attention(keys, qk_norm=True, qkv_bias=bias, output_bias=bias, sliding_window=window)
    kinds = {"N": {**attention, **experts}, "D": {**attention, **dense}}
    return model_tables(kinds, ["N" if each else "D" for each in sparse], **read_model(keys))


def write(model: Decoder) -> dict[str, Any]:
    (attention,) = mixers_of(model, "qwen3_moe", "attention")
    return {
        **write_model(model),
        **write_attention(attention),
        **write_feed_forwards(model, "num_local_experts"),
        "attention_bias": attention.q_proj.bias is not None,
        "use_sliding_window": attention.sliding_window is not None,
        "sliding_window": attention.sliding_window,
    }


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    return layer_rules(attention_rules(block.mixer), feed_forward_rules(block.feed_forward, separate_experts))


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", read, write, block_rules)
