"""OLMo-hybrid in transformers: OlmoHybridForCausalLM. Its Gated DeltaNet is that of flash-linear-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchlmoe.feed_forwards.dense import Dense
from torchlmoe.interop import gated_deltanet
from torchlmoe.interop.family import Family, all_mixers_of, feed_forward_of, model_tables
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.layer_types import LAYERS, write_layer_types
from torchlmoe.interop.qwen3_next import convolution_rule, write_deltanet
from torchlmoe.interop.rules import Rule, prefixed
from torchlmoe.interop.softmax import (
    attention_rules,
    mlp_rules,
    read_attention,
    read_model,
    write_attention,
    write_model,
)
from torchlmoe.interop.steps import Step
from torchlmoe.mixers.attention import Attention
from torchlmoe.mixers.gated_deltanet import GatedDeltaNet
from torchlmoe.model.decoder import Decoder

DELTANET_NORM_EPS = 1e-5  # fixed in transformers; rms_norm_eps does not apply to this norm


def read_deltanet(keys: Keys) -> dict[str, Any]:
    """Return a letter's mixer with its options."""
    heads = keys.integer("num_attention_heads")
    key_heads = keys.integer("linear_num_key_heads", heads)
    key_dim = keys.integer("linear_key_head_dim", int(0.75 * keys.integer("hidden_size") / key_heads))
    keys.skip(*(f"linear_{name}" for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor")))
    return {
        "mixer": "gated_deltanet",
        "num_heads": keys.integer("linear_num_value_heads", heads),
        "num_key_heads": key_heads,
        "head_dim": key_dim,
        "expand_v": keys.integer("linear_value_head_dim", 2 * key_dim) / key_dim,
        "conv_size": keys.integer("linear_conv_kernel_dim", 4),
        "negative_eigenvalues": keys.flag("linear_allow_neg_eigval", True),
        "norm_eps": DELTANET_NORM_EPS,
    }


def has_positions(keys: Keys) -> bool:
    """Return whether attention has rotary phases. It has none if rope_theta is null, and some if the key is absent."""
    places = keys.table("rope_parameters"), keys.content
    return next((place["rope_theta"] is not None for place in places if "rope_theta" in place), True)


def read(keys: Keys) -> dict[str, Any]:
    num_layers, bias = keys.integer("num_hidden_layers"), keys.flag("attention_bias", False)
    attention = read_attention(keys, qk_norm="all_heads", qkv_bias=bias, output_bias=bias)
    attention["rotary_fraction"] = float(has_positions(keys))
    default = ["full_attention" if index % 4 == 3 else "linear_attention" for index in range(num_layers)]
    if "full_attention" not in default:
        default[-1] = "full_attention"
    mlp = {"mlp": "dense", "mlp_options": {"mlp_dim": keys.integer("intermediate_size")}}
    kinds = {
        "L": {**read_deltanet(keys), **mlp},
        "N": {**attention, **mlp, "norm_placement": "post"},
    }
    return model_tables(kinds, keys.choices("layer_types", num_layers, LAYERS, default), **read_model(keys))


def write(model: Decoder) -> dict[str, Any]:
    deltanet, attention = all_mixers_of(model, "olmo_hybrid", "gated_deltanet", "attention")
    written = {
        **write_model(model),
        **write_attention(attention),
        "attention_bias": attention.q_proj.bias is not None,
        **write_layer_types(model),
        **write_deltanet(deltanet),
        "linear_allow_neg_eigval": deltanet.max_beta == 2,
        "intermediate_size": feed_forward_of(model, Dense, "olmo_hybrid").units,
    }
    if attention.rotary_dim == 0:
        written["rope_parameters"]["rope_theta"] = None
    return written


class Thirds(Step):
    """Concatenates three tensors of any sizes along dim 0. The inverse splits the result into equal thirds.

    The authors' files have separate convolutions of q, k and v. When transformers loads a file, it concatenates them.
    When it saves a model, it cuts the result into equal thirds under the names of q, k and v, whatever their widths.
    Concatenated, both kinds of file are the same.
    """

    num_before, num_after = 3, 1

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(tensors))]

    def backward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors[0].chunk(3))


def gated_deltanet_rules(mixer: GatedDeltaNet, *, saved: bool) -> list[Rule]:
    """Return the rules between OlmoHybridGatedDeltaNet and `gated_deltanet`.

    saved: whether names are those of files, which have three convolutions in place of one.
    """
    widths = (mixer.num_key_heads * mixer.key_dim,) * 2 + (mixer.num_heads * mixer.value_dim,)
    one = convolution_rule(*widths, mixer.q_conv.weight.shape[-1])
    three = Rule([f"{name}_conv1d.weight" for name in "qkv"], one.ours, Thirds(), *one.steps)
    return gated_deltanet.gated_deltanet_rules([three if saved else one])


def block_rules(block: Any, separate_experts: bool) -> list[Rule]:
    """Return the rules for OlmoHybridLinearAttentionDecoderLayer (pre-norm) or OlmoHybridAttentionDecoderLayer
    (post-norm). Two norms have other names in files than in modules.
    """
    if isinstance(block.mixer, Attention):
        norms, name = ("post_attention_layernorm", "post_feedforward_layernorm"), "self_attn"
        table = attention_rules(block.mixer)
    else:
        norms, name = ("input_layernorm", "post_attention_layernorm"), "linear_attn"
        table = gated_deltanet_rules(block.mixer, saved=separate_experts)
    if separate_experts:
        norms = SAVED_NORMS.get(norms[0], norms[0]), SAVED_NORMS.get(norms[1], norms[1])
    return [
        Rule(f"{norms[0]}.weight", "mixer_norm.weight"),
        *prefixed(table, f"{name}.", "mixer."),
        Rule(f"{norms[1]}.weight", "feed_forward_norm.weight"),
        *prefixed(mlp_rules(block.feed_forward), "mlp.", "feed_forward."),
    ]


SAVED_NORMS = {"input_layernorm": "attention_layer_norm", "post_attention_layernorm": "feedforward_layer_norm"}
FAMILY = Family(
    "olmo_hybrid", "OlmoHybridForCausalLM", read, write, block_rules,
    file_mark="q_conv1d.", other_names=tuple((saved, name) for name, saved in SAVED_NORMS.items()),
)  # fmt: skip
