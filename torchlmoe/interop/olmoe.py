"""OLMoE in transformers: OlmoeForCausalLM."""

from __future__ import annotations

from typing import Any

from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.interop import moe
from torchlmoe.interop.family import Family, feed_forward_of, mixers_of, model_tables
from torchlmoe.interop.keys import Keys
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
    keys.only("clip_qkv")
    bias = keys.flag("attention_bias", False)
    experts = {
        "num_experts": keys.integer("num_experts"),
        "top_k": keys.integer("num_experts_per_tok"),
        "expert_dim": keys.integer("intermediate_size"),
        "normalize_top_k": keys.flag("norm_topk_prob", False),
        "aux_loss_weight": keys.number("router_aux_loss_coef", 0.0),
    }
    attention = read_attention(keys, qk_norm="all_heads", qkv_bias=bias, output_bias=bias)
    layer = {**attention, "mlp": "moe", "mlp_options": experts}
    return model_tables({"N": layer}, "N" * keys.integer("num_hidden_layers"), **read_model(keys, norm_eps=1e-5))


def write(model: Decoder) -> dict[str, Any]:
    (attention,) = mixers_of(model, "olmoe", "attention")
    layer = feed_forward_of(model, MoE, "olmoe")
    return {
        **write_model(model),
        **write_attention(attention),
        "attention_bias": attention.q_proj.bias is not None,
        "num_experts": layer.num_experts,
        "num_experts_per_tok": layer.top_k,
        "intermediate_size": layer.experts.down_proj.shape[-1],
        "norm_topk_prob": layer.router.normalize_top_k,
        "router_aux_loss_coef": layer.load_balance.aux_loss_weight,
    }


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    experts = moe.moe_rules(separate_experts=block.feed_forward.num_experts if separate_experts else None)
    return layer_rules(attention_rules(block.mixer), experts)


FAMILY = Family("olmoe", "OlmoeForCausalLM", read, write, block_rules)
