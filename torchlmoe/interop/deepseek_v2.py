"""DeepSeek-V2 in transformers: DeepseekV2ForCausalLM. DeepSeek-V3 and Kimi-Linear share its latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchlmoe.feed_forwards.dense import Dense
from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.interop import moe
from torchlmoe.interop.family import (
    Family,
    all_mixers_of,
    blocks_of,
    feed_forward_of,
    first_feed_forward,
    model_tables,
)
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.rope import read_rope, write_rope
from torchlmoe.interop.rules import Rule
from torchlmoe.interop.softmax import layer_rules, mlp_rules, read_model, write_model
from torchlmoe.interop.steps import Reorder, Split
from torchlmoe.layers.low_rank import LowRank
from torchlmoe.mixers.attention import Attention
from torchlmoe.model.decoder import Decoder

# Options of `moe` and their keys in config.json.
SIZES = {
    "num_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "expert_dim": "moe_intermediate_size",
    "num_shared_experts": "n_shared_experts",
}
GROUPS = {"num_expert_groups": "n_group", "num_limited_groups": "topk_group"}


def read_latent_attention(keys: Keys, **fixed: Any) -> dict[str, Any]:
    """Return a letter's mixer with its options. fixed: options that are constant in the family."""
    heads, shared = keys.integer("num_attention_heads"), keys.integer("qk_rope_head_dim")
    head_dim, bias = keys.integer("qk_nope_head_dim") + shared, keys.flag("attention_bias", False)
    keys.only("num_key_value_heads", heads)
    keys.only("qk_head_dim", head_dim)
    return {
        "mixer": "attention",
        "num_heads": heads,
        "head_dim": head_dim,
        "shared_key_dim": shared,
        "value_dim": keys.integer("v_head_dim"),
        "kv_rank": keys.integer("kv_lora_rank"),
        "q_rank": keys.integer("q_lora_rank", None),
        "qkv_bias": bias,
        "output_bias": bias,
        "norm_eps": 1e-6,  # fixed in transformers; rms_norm_eps does not apply to the norms of the latents
        **fixed,
    }


def write_latent_attention(mixer: Attention, model_type: str) -> dict[str, Any]:
    """The inverse of `read_latent_attention`."""
    latent = mixer.latent
    if latent is None:
        raise ValueError(f"The model has no latent attention, but {model_type} needs it: choose another --format.")
    return {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "qk_rope_head_dim": latent.shared_dim,
        "qk_nope_head_dim": mixer.head_dim - latent.shared_dim,
        "v_head_dim": mixer.value_dim,
        "kv_lora_rank": latent.rank,
        "q_lora_rank": mixer.q_proj.down_proj.weight.shape[0] if isinstance(mixer.q_proj, LowRank) else None,
        "attention_bias": mixer.o_proj.bias is not None,
    }


def read_rotary_latent_attention(keys: Keys) -> dict[str, Any]:
    """Like `read_latent_attention`, with rotary phases on the channels of a key that all heads share."""
    attention, rope = read_latent_attention(keys), read_rope(keys)
    keys.only("head_dim", attention["shared_key_dim"])
    return {**attention, **rope, "rotary_fraction": attention["shared_key_dim"] / attention["head_dim"]}


def read_experts(keys: Keys, names: Mapping[str, str]) -> dict[str, Any]:
    """Return options of `moe`. names: options that are whole numbers, and their keys."""
    keys.only("moe_layer_freq", 1)
    keys.skip("ep_size", "pretraining_tp", "seq_aux")
    scale = keys.number("routed_scaling_factor")
    return {**{name: keys.integer(key) for name, key in names.items()}, "routed_scaling_factor": scale}


def write_experts(layer: MoE, names: Mapping[str, str], model_type: str) -> dict[str, Any]:
    """The inverse of `read_experts`."""
    expert_dim = layer.experts.down_proj.shape[-1]
    sizes = {
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "expert_dim": expert_dim,
        "num_shared_experts": moe.shared_units(layer, model_type) // expert_dim,
        "num_expert_groups": layer.router.num_expert_groups,
        "num_limited_groups": layer.router.num_limited_groups,
    }
    scale = layer.router.routed_scaling_factor
    return {**{key: sizes[name] for name, key in names.items()}, "routed_scaling_factor": scale}


def read_layers(keys: Keys, experts: dict[str, Any], **model: Any) -> dict[str, Any]:
    """Return the tables of a model whose first layers may be dense.

    experts: options of `moe`. model: more settings of `[model]`.
    """
    attention = read_rotary_latent_attention(keys)
    num_layers, num_dense = keys.integer("num_hidden_layers"), keys.integer("first_k_dense_replace", 0, least=0)
    kinds = {
        "N": {**attention, "mlp": "moe", "mlp_options": experts},
        "D": {**attention, "mlp": "dense", "mlp_options": {"mlp_dim": keys.integer("intermediate_size")}},
    }
    letters = ["D" if index < num_dense else "N" for index in range(num_layers)]
    return model_tables(kinds, letters, **read_model(keys), **model)


def write_layers(model: Decoder, model_type: str) -> dict[str, Any]:
    """The inverse of `read_layers`, without the keys of experts."""
    (attention,) = all_mixers_of(model, model_type, "attention")
    experts, dense = feed_forward_of(model, MoE, model_type), first_feed_forward(model, Dense)
    return {
        **write_model(model),
        **write_latent_attention(attention, model_type),
        **write_rope(attention),
        "first_k_dense_replace": next(i for i, block in enumerate(blocks_of(model)) if block.feed_forward is experts),
        "intermediate_size": experts.experts.down_proj.shape[-1] if dense is None else dense.units,
    }


def read(keys: Keys) -> dict[str, Any]:
    keys.only("scoring_func", "softmax")
    keys.only("norm_topk_prob", False)
    keys.only("mlp_bias", False)
    keys.only("topk_method", "greedy", "group_limited_greedy")
    experts = read_experts(keys, SIZES)
    keys.skip(*GROUPS.values())
    if keys.take("topk_method", "greedy") == "group_limited_greedy":
        experts |= {name: keys.integer(key) for name, key in GROUPS.items()}
    experts |= {"normalize_top_k": False, "aux_loss_weight": keys.number("aux_loss_alpha", 0.0)}
    return read_layers(keys, experts)


def write(model: Decoder) -> dict[str, Any]:
    experts = feed_forward_of(model, MoE, "deepseek_v2")
    grouped = experts.router.num_limited_groups < experts.router.num_expert_groups
    return {
        **write_layers(model, "deepseek_v2"),
        **write_experts(experts, SIZES | GROUPS, "deepseek_v2"),
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "norm_topk_prob": False,
        "aux_loss_alpha": experts.load_balance.aux_loss_weight,
    }


def latent_attention_rules(
    *,
    head_dim: int,
    shared_key_dim: int,
    kv_rank: int,
    full_rank_q: bool = False,
    rotary: bool = True,
    bias: bool = False,
) -> list[Rule]:
    """Return the rules between DeepseekV2Attention and `attention` with kv_rank.

    head_dim: width of a key, including the shared_key_dim channels that all heads share.
    full_rank_q: whether q has one projection (q_lora_rank is null) or two.
    rotary: whether the shared channels are rotated. In Kimi-Linear they are not.
    bias: whether the projections to the latents and the output projection have biases.
    """
    shared = list(range(shared_key_dim))
    if rotary:
        shared = shared[::2] + shared[1::2]  # theirs rotates pairs of neighbours, ours pairs channels of two halves
    own_dim = head_dim - shared_key_dim
    # The shared channels are the last ones of a head in theirs, and the first ones in ours.
    head = Reorder((*(own_dim + channel for channel in shared), *range(own_dim)))
    latent = Reorder((*range(kv_rank), *(kv_rank + channel for channel in shared)))
    kinds = ("weight", "bias") if bias else ("weight",)
    if full_rank_q:
        q_rules = [Rule("q_proj.weight", "q_proj.weight", head)]
    else:
        q_rules = [
            *(Rule(f"q_a_proj.{kind}", f"q_proj.down_proj.{kind}") for kind in kinds),
            Rule("q_a_layernorm.weight", "q_proj.activation.weight"),
            Rule("q_b_proj.weight", "q_proj.up_proj.weight", head),
        ]
    return [
        *q_rules,
        *(
            Rule(
                f"kv_a_proj_with_mqa.{kind}",
                [f"latent.down_proj.{kind}", f"latent.shared_key_proj.{kind}"],
                latent,
                Split((kv_rank, shared_key_dim)),
            )
            for kind in kinds
        ),
        Rule("kv_a_layernorm.weight", "latent.norm.weight"),
        Rule("kv_b_proj.weight", "latent.up_proj.weight"),
        *(Rule(f"o_proj.{kind}", f"o_proj.{kind}") for kind in kinds),
    ]


def attention_rules(mixer: Attention) -> list[Rule]:
    """Return `latent_attention_rules` with the sizes of a mixer."""
    assert mixer.latent is not None
    return latent_attention_rules(
        head_dim=mixer.head_dim,
        shared_key_dim=mixer.latent.shared_dim,
        kv_rank=mixer.latent.rank,
        full_rank_q=not isinstance(mixer.q_proj, LowRank),
        rotary=mixer.rotary_dim > 0,
        bias=mixer.o_proj.bias is not None,
    )


def moe_rules(*, loss_free: bool = False, separate_experts: int | None = None) -> list[Rule]:
    """Return the rules between DeepseekV2Moe, or with loss_free DeepseekV3MoE, and `MoE` with shared experts.

    Arguments: see `moe.moe_rules`.
    """
    return moe.moe_rules(shared_expert="shared_experts", loss_free=loss_free, separate_experts=separate_experts)


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    layer = block.feed_forward
    if not isinstance(layer, MoE):
        return layer_rules(attention_rules(block.mixer), mlp_rules(layer))
    number = layer.num_experts if separate_experts else None
    experts = moe_rules(loss_free=layer.router.expert_bias is not None, separate_experts=number)
    return layer_rules(attention_rules(block.mixer), experts)


FAMILY = Family("deepseek_v2", "DeepseekV2ForCausalLM", read, write, block_rules)
