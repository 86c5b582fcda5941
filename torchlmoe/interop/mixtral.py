"""Mixtral in transformers: MixtralForCausalLM."""

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


def read_experts(keys: Keys) -> dict[str, Any]:
    """Return options of `moe`."""
    keys.only("router_jitter_noise", 0.0)
    return {
        "num_experts": keys.integer("num_local_experts"),
        "top_k": keys.integer("num_experts_per_tok"),
        "expert_dim": keys.integer("intermediate_size"),
        "aux_loss_weight": keys.number("router_aux_loss_coef", 0.0),
    }


def write_experts(model: Decoder, model_type: str) -> dict[str, Any]:
    """The inverse of `read_experts`."""
    layer = feed_forward_of(model, MoE, model_type)
    return {
        "num_local_experts": layer.num_experts,
        "num_experts_per_tok": layer.top_k,
        "intermediate_size": layer.experts.down_proj.shape[-1],
        "router_aux_loss_coef": layer.load_balance.aux_loss_weight,
    }


def read(keys: Keys) -> dict[str, Any]:
    attention = read_attention(keys, base=1e6, sliding_window=keys.integer("sliding_window", None))
    layer = {**attention, "mlp": "moe", "mlp_options": read_experts(keys)}
    return model_tables({"N": layer}, "N" * keys.integer("num_hidden_layers"), **read_model(keys, norm_eps=1e-5))


def write(model: Decoder) -> dict[str, Any]:
    (attention,) = mixers_of(model, "mixtral", "attention")
    return {
        **write_model(model),
        **write_attention(attention),
        "sliding_window": attention.sliding_window,
        **write_experts(model, "mixtral"),
    }


def moe_rules(*, separate_experts: int | None = None) -> list[Rule]:
    """Return the rules between MixtralSparseMoeBlock and `MoE`. Arguments: see `moe.moe_rules`."""
    return moe.moe_rules(separate_experts=separate_experts, expert_names=moe.NUMBERED)


def layer_of_experts_rules(mixer: list[Rule], layer: Any, separate_experts: bool) -> list[Rule]:
    """Return the rules for a layer of the decoder. mixer: rules of its attention. layer: its `MoE`."""
    experts = moe_rules(separate_experts=layer.num_experts if separate_experts else None)
    return layer_rules(mixer, experts, feed_forward_name="block_sparse_moe" if separate_experts else "mlp")


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    return layer_of_experts_rules(attention_rules(block.mixer), block.feed_forward, separate_experts)


FAMILY = Family("mixtral", "MixtralForCausalLM", read, write, block_rules)
