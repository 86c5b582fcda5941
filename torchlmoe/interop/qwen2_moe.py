"""Qwen2-MoE in transformers: Qwen2MoeForCausalLM. Qwen3-MoE and Qwen3-Next have the same feed-forward layers."""

from __future__ import annotations

from typing import Any

from torchlmoe.feed_forwards.dense import Dense
from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.interop import moe
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


def read_feed_forwards(keys: Keys, *, normalize: bool) -> tuple[list[bool], dict[str, Any], dict[str, Any]]:
    """Return whether each layer is sparse, and the tables of sparse and of dense layers.

    normalize: default of norm_topk_prob.
    """
    num_layers, step = keys.integer("num_hidden_layers"), keys.integer("decoder_sparse_step", 1)
    dense = set(keys.take("mlp_only_layers", [], list))
    sparse = [index not in dense and (index + 1) % step == 0 for index in range(num_layers)]
    shared = keys.integer("shared_expert_intermediate_size", None)
    experts = {
        "num_experts": keys.integer("num_local_experts", None) or keys.integer("num_experts"),
        "top_k": keys.integer("num_experts_per_tok"),
        "expert_dim": keys.integer("moe_intermediate_size"),
        "normalize_top_k": keys.flag("norm_topk_prob", normalize),
        "aux_loss_weight": keys.number("router_aux_loss_coef", 0.001),
        **({} if shared is None else {"shared_expert_dim": shared, "shared_expert_gate": True}),
    }
    keys.skip("num_experts")
    mlp_dim = keys.integer("intermediate_size", None)
    return (
        sparse,
        {"mlp": "moe", "mlp_options": experts},
        {"mlp": "dense", "mlp_options": {"mlp_dim": mlp_dim}},
    )


def write_feed_forwards(model: Decoder, num_experts: str = "num_experts") -> dict[str, Any]:
    """The inverse of `read_feed_forwards`."""
    layers = [block.feed_forward for block in blocks_of(model)]
    experts = feed_forward_of(model, MoE, "its family")
    dense = next((layer for layer in layers if isinstance(layer, Dense)), None)
    shared = experts.shared_expert
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, layer in enumerate(layers) if not isinstance(layer, MoE)],
        num_experts: experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.experts.down_proj.shape[-1],
        "norm_topk_prob": experts.router.normalize_top_k,
        "router_aux_loss_coef": experts.load_balance.aux_loss_weight,
        **({} if shared is None else {"shared_expert_intermediate_size": shared.units}),
        **({} if dense is None else {"intermediate_size": dense.units}),
    }


def write_shared_feed_forwards(model: Decoder, model_type: str) -> dict[str, Any]:
    """Like `write_feed_forwards`, for families that require a shared expert."""
    moe.shared_units(feed_forward_of(model, MoE, model_type), model_type)
    return write_feed_forwards(model)


def moe_rules(*, separate_experts: int | None = None) -> list[Rule]:
    """Return the rules between Qwen2MoeSparseMoeBlock and `MoE` with a gated shared expert.

    Arguments: see `moe.moe_rules`.
    """
    return moe.moe_rules(shared_expert="shared_expert", shared_expert_gate=True, separate_experts=separate_experts)


def feed_forward_rules(layer: Any, separate_experts: bool) -> list[Rule]:
    """Return the rules for a sparse or a dense feed-forward layer."""
    if not isinstance(layer, MoE):
        return mlp_rules(layer)
    number = layer.num_experts if separate_experts else None
    return moe_rules(separate_experts=number) if layer.shared_expert else moe.moe_rules(separate_experts=number)


def read(keys: Keys) -> dict[str, Any]:
    sparse, experts, dense = read_feed_forwards(keys, normalize=False)
    keys.only("use_sliding_window", False)
    keys.skip("sliding_window", "max_window_layers")
    keys.choices("layer_types", len(sparse), {"full_attention": "N"}, ["full_attention"] * len(sparse))
    attention = read_attention(keys, qkv_bias=keys.flag("qkv_bias", True))
    kinds = {"N": {**attention, **experts}, "D": {**attention, **dense}}
    return model_tables(kinds, ["N" if each else "D" for each in sparse], **read_model(keys))


def write(model: Decoder) -> dict[str, Any]:
    (attention,) = mixers_of(model, "qwen2_moe", "attention")
    return {
        **write_model(model),
        **write_attention(attention),
        **write_feed_forwards(model),
        "qkv_bias": attention.q_proj.bias is not None,
    }


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    return layer_rules(attention_rules(block.mixer), feed_forward_rules(block.feed_forward, separate_experts))


FAMILY = Family("qwen2_moe", "Qwen2MoeForCausalLM", read, write, block_rules)
