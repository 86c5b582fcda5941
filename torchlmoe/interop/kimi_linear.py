"""Kimi-Linear in transformers: KimiLinearForCausalLM. Kimi Delta Attention, and DeepSeek's latent attention and router.

Its config.json has two forms: transformers writes layer_types, and the authors' files have linear_attn_config with
lists of the layers of each kind, counted from 1.
"""

from __future__ import annotations

from typing import Any

from torchlmoe.feed_forwards.dense import Dense
from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.interop import deepseek_v2, moe
from torchlmoe.interop.deepseek_v2 import read_latent_attention, write_experts, write_latent_attention
from torchlmoe.interop.deepseek_v3 import read_router
from torchlmoe.interop.family import (
    Family,
    all_mixers_of,
    blocks_of,
    feed_forward_of,
    first_feed_forward,
    model_tables,
)
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.layer_types import DENSE, LAYERS, write_layer_types
from torchlmoe.interop.rules import Rule
from torchlmoe.interop.softmax import layer_rules, mlp_rules, read_model, write_model
from torchlmoe.interop.steps import Flatten, Split
from torchlmoe.mixers.attention import Attention
from torchlmoe.model.decoder import Decoder

# Options of `moe` and their keys in config.json.
SIZES = {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_token",
    "expert_dim": "moe_intermediate_size",
    "num_shared_experts": "num_shared_experts",
    "num_expert_groups": "num_expert_group",
    "num_limited_groups": "topk_group",
}


def read(keys: Keys) -> dict[str, Any]:
    num_layers = keys.integer("num_hidden_layers")
    of_linear = Keys(keys.table("linear_attn_config"), f"{keys.place}: linear_attn_config")
    kda = {
        "mixer": "kda",
        "num_heads": of_linear.integer("num_heads", None) or keys.integer("linear_num_heads"),
        "head_dim": of_linear.integer("head_dim", None) or keys.integer("linear_head_dim"),
        "conv_size": of_linear.integer("short_conv_kernel_size", None) or keys.integer("linear_conv_kernel_dim", 4),
    }
    keys.skip("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
    letters = keys.choices("layer_types", num_layers, LAYERS, _listed_layers(of_linear, num_layers))
    of_linear.finish()
    num_dense = keys.integer("first_k_dense_replace", 1, least=0)
    default = ["dense" if index < num_dense else "sparse" for index in range(num_layers)]
    places = keys.choices("mlp_layer_types", num_layers, {"dense": "dense", "sparse": "sparse"}, default)
    keys.only("tie_word_embeddings", False)  # transformers ignores the key
    # Keys of the authors' code; other values have no counterpart. There are no rotary phases.
    keys.only("mla_use_nope", True)
    keys.only("use_grouped_topk", True)
    keys.only("moe_router_activation_func", "sigmoid")
    keys.skip("head_dim", "rope_theta", "rope_scaling", "rope_parameters", "model_max_length")
    attention = read_latent_attention(keys, rotary_fraction=0.0)
    sparse = {"mlp": "moe", "mlp_options": read_router(keys, SIZES, normalize="moe_renormalize")}
    dense = {"mlp": "dense", "mlp_options": {"mlp_dim": keys.integer("intermediate_size")}}
    kinds = {
        "L": {**kda, **sparse}, "N": {**attention, **sparse}, "D": {**kda, **dense}, "E": {**attention, **dense},
    }  # fmt: skip
    letters = [DENSE[letter] if place == "dense" else letter for letter, place in zip(letters, places, strict=True)]
    return model_tables(kinds, letters, **read_model(keys, norm_eps=1e-5))


def _listed_layers(of_linear: Keys, num_layers: int) -> list[str]:
    """Return `layer_types` from the lists in the authors' files. Without lists, return transformers' default."""
    full, linear = (of_linear.take(name, [], list) for name in ("full_attn_layers", "kda_layers"))
    if not full and not linear:
        return ["full_attention" if index and index % 4 == 0 else "linear_attention" for index in range(num_layers)]
    if sorted([*full, *linear], key=str) != sorted(range(1, num_layers + 1), key=str):
        raise ValueError(
            f"{of_linear.place} must name each layer from 1 to {num_layers} once, in full_attn_layers or kda_layers."
        )
    return ["full_attention" if index + 1 in full else "linear_attention" for index in range(num_layers)]


def write(model: Decoder) -> dict[str, Any]:
    kda, attention = all_mixers_of(model, "kimi_linear", "kda", "attention")
    if model.spec.tie_embeddings:
        raise ValueError("The model has tied embeddings, which kimi_linear of transformers cannot have.")
    experts, dense = feed_forward_of(model, MoE, "kimi_linear"), first_feed_forward(model, Dense)
    return {
        **write_model(model),
        **write_latent_attention(attention, "kimi_linear"),
        "linear_num_heads": kda.num_heads,
        "linear_head_dim": kda.key_dim,
        "linear_conv_kernel_dim": kda.q_conv.weight.shape[-1],
        **write_layer_types(model),
        "mlp_layer_types": ["sparse" if isinstance(block.feed_forward, MoE) else "dense" for block in blocks_of(model)],
        **write_experts(experts, SIZES, "kimi_linear"),
        "moe_renormalize": experts.router.normalize_top_k,
        "intermediate_size": experts.experts.down_proj.shape[-1] if dense is None else dense.units,
    }


def kda_rules(*, num_heads: int, head_dim: int, conv_size: int, saved: bool = False) -> list[Rule]:
    """Return the rules between KimiLinearDeltaAttention and `kda`.

    saved: whether names are those of files, where the three convolutions are separate and the decay has no module.
    """
    convolutions = ["q_conv.weight", "k_conv.weight", "v_conv.weight"]
    one = Flatten((1, conv_size), dim=1)  # [channels, 1, conv_size] -> [channels, conv_size]
    if saved:
        decay = ""
        convolution_rules = [Rule(f"{ours[0]}_conv1d.weight", ours, one) for ours in convolutions]
    else:
        decay = "forget_gate."
        convolution_rules = [Rule("conv1d.weight", convolutions, one, Split((num_heads * head_dim,) * 3))]
    return [
        *convolution_rules,
        Rule("q_proj.weight", "q_proj.weight"),
        Rule("k_proj.weight", "k_proj.weight"),
        Rule("v_proj.weight", "v_proj.weight"),
        Rule(f"{decay}f_a_proj.weight", "decay_proj.down_proj.weight"),
        Rule(f"{decay}f_b_proj.weight", "decay_proj.up_proj.weight"),
        Rule(f"{decay}A_log", "decay.A_log", Flatten((1, 1, num_heads, 1))),
        Rule(f"{decay}dt_bias", "decay.dt_bias"),
        Rule("b_proj.weight", "b_proj.weight"),
        Rule("g_a_proj.weight", "gate_proj.down_proj.weight"),
        Rule("g_b_proj.weight", "gate_proj.up_proj.weight"),
        Rule("o_norm.weight", "norm.weight"),
        Rule("o_proj.weight", "o_proj.weight"),
    ]


def latent_attention_rules(
    *, head_dim: int, shared_key_dim: int, kv_rank: int, full_rank_q: bool = False
) -> list[Rule]:
    """Return the rules between KimiLinearAttention and `attention` with kv_rank and rotary_fraction = 0."""
    return deepseek_v2.latent_attention_rules(
        head_dim=head_dim, shared_key_dim=shared_key_dim, kv_rank=kv_rank, full_rank_q=full_rank_q, rotary=False
    )


def moe_rules(*, separate_experts: int | None = None) -> list[Rule]:
    """Return the rules between KimiLinearMoE and `MoE` with shared experts. Arguments: see `moe.moe_rules`."""
    return moe.moe_rules(
        shared_expert="shared_experts", loss_free=True, separate_experts=separate_experts, expert_names=moe.NUMBERED
    )


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    mixer, layer = block.mixer, block.feed_forward
    if isinstance(mixer, Attention):
        table = deepseek_v2.attention_rules(mixer)
    else:
        sizes = dict(num_heads=mixer.num_heads, head_dim=mixer.key_dim, conv_size=mixer.q_conv.weight.shape[-1])
        table = kda_rules(**sizes, saved=separate_experts)
    if isinstance(layer, MoE):
        feed_forward = moe_rules(separate_experts=layer.num_experts if separate_experts else None)
    else:
        feed_forward = mlp_rules(layer)
    return layer_rules(table, feed_forward, feed_forward_name="block_sparse_moe" if separate_experts else "mlp")


FAMILY = Family(
    "kimi_linear",
    "KimiLinearForCausalLM",
    read,
    write,
    block_rules,
    # In the authors' files, dense layers are called mlp. When transformers saves a model, it renames them too.
    other_names=((".block_sparse_moe.", ".mlp."),),
    file_mark=".block_sparse_moe.",
)
