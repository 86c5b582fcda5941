"""DeepSeek-V3 in transformers: DeepseekV3ForCausalLM. DeepSeek-V2 with another router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.interop.deepseek_v2 import (
    GROUPS,
    SIZES,
    block_rules,
    read_experts,
    read_layers,
    write_experts,
    write_layers,
)
from torchlmoe.interop.family import Family, feed_forward_of
from torchlmoe.interop.keys import Keys
from torchlmoe.model.decoder import Decoder


def read_router(keys: Keys, names: Mapping[str, str], *, normalize: str) -> dict[str, Any]:
    """Return options of `moe` with a sigmoid router and loss-free balance.

    names: see `read_experts`. normalize: the key of normalize_top_k.
    """
    experts = read_experts(keys, names)
    if experts["num_expert_groups"] > 1:
        experts["group_score"] = "top2_sum"
    flag = keys.flag(normalize, True)
    return {**experts, "score_function": "sigmoid", "balance": "loss_free", "normalize_top_k": flag}


def read(keys: Keys) -> dict[str, Any]:
    keys.only("scoring_func", "sigmoid")
    keys.only("topk_method", "noaux_tc")
    keys.only("rope_interleave", True)
    keys.only("num_nextn_predict_layers", 0, 1)  # the layer of multi-token prediction is left out
    keys.skip("aux_loss_alpha")  # weight of a balance loss; loss-free balance has none
    return read_layers(keys, read_router(keys, SIZES | GROUPS, normalize="norm_topk_prob"))


def write(model: Decoder) -> dict[str, Any]:
    experts = feed_forward_of(model, MoE, "deepseek_v3")
    return {
        **write_layers(model, "deepseek_v3"),
        **write_experts(experts, SIZES | GROUPS, "deepseek_v3"),
        "norm_topk_prob": experts.router.normalize_top_k,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }


FAMILY = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", read, write, block_rules, left_out=("model.layers.{num_layers}.",)
)
