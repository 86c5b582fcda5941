"""Language model of Qwen3.5-MoE in transformers: Qwen3_5MoeForCausalLM. Experts of Qwen2-MoE, mixers of Qwen3.5."""

from __future__ import annotations

from typing import Any

from torchlmoe.interop.family import Family, model_tables
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.qwen2_moe import feed_forward_rules, read_feed_forwards, write_shared_feed_forwards
from torchlmoe.interop.qwen3_5_text import LEFT_OUT, OTHER_NAMES, layer_of, read_text
from torchlmoe.interop.qwen3_next import read_layer_types, read_mixers, write_mixers
from torchlmoe.interop.rules import Rule
from torchlmoe.interop.softmax import write_model
from torchlmoe.model.decoder import Decoder


def read(keys: Keys) -> dict[str, Any]:
    for name, value in FIXED.items():
        keys.only(name, value)
    keys.integer("shared_expert_intermediate_size")
    sparse, experts, _ = read_feed_forwards(keys, normalize=True)
    kinds = {letter: {**mixer, **experts} for letter, mixer in read_mixers(keys).items()}
    return model_tables(kinds, read_layer_types(keys, len(sparse)), **read_text(keys))


def write(model: Decoder) -> dict[str, Any]:
    experts = write_shared_feed_forwards(model, "qwen3_5_moe_text")
    return {
        **write_model(model),
        **write_mixers(model, "qwen3_5_moe_text"),
        **{name: value for name, value in experts.items() if name not in (*FIXED, "intermediate_size")},
    }


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    return layer_of(block.mixer, feed_forward_rules(block.feed_forward, separate_experts))


# Keys of Qwen2-MoE with one possible value here: all layers have experts, and routing weights add up to one.
FIXED: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
FAMILY = Family(
    "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", read, write, block_rules, left_out=LEFT_OUT, other_names=OTHER_NAMES
)
