"""Settings and rules that most families share: softmax attention, dense MLP, the layer's norms, `[model]`."""

from __future__ import annotations

from typing import Any

from torchlmoe.feed_forwards.base import FeedForward
from torchlmoe.interop.keys import Keys
from torchlmoe.interop.moe import NAMED
from torchlmoe.interop.rope import read_rope, write_rope
from torchlmoe.interop.rules import Rule, prefixed
from torchlmoe.mixers.attention import Attention


def read_attention(keys: Keys, *, base: float = 10_000.0, fraction: float = 1.0, **fixed: Any) -> dict[str, Any]:
    """Return a letter's mixer with its options. fixed: options that are constant in the family."""
    heads = keys.integer("num_attention_heads")
    return {
        "mixer": "attention",
        "num_heads": heads,
        "num_kv_heads": keys.integer("num_key_value_heads", heads),
        "head_dim": keys.integer("head_dim", keys.integer("hidden_size") // heads),
        **read_rope(keys, base=base, fraction=fraction),
        **fixed,
    }


def write_attention(mixer: Attention, *, fraction: bool = False) -> dict[str, Any]:
    """The inverse of `read_attention`."""
    return {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        **write_rope(mixer, fraction=fraction),
    }


def attention_rules(mixer: Attention) -> list[Rule]:
    """Return the rules for q_proj, k_proj, v_proj and o_proj, with biases and norms if the mixer has them."""
    names = [name for name, _ in mixer.named_parameters() if not name.startswith("gate_proj")]
    return [Rule(name, name) for name in names]


def mlp_rules(layer: FeedForward) -> list[Rule]:
    """Return the rules for gate_proj, up_proj and down_proj."""
    return [Rule(f"{name}.weight", f"{name}.weight") for name in NAMED]


def layer_rules(
    mixer: list[Rule],
    feed_forward: list[Rule],
    *,
    mixer_name: str = "self_attn",
    feed_forward_name: str = "mlp",
    feed_forward_norm: str = "post_attention_layernorm",
) -> list[Rule]:
    """Return the rules for a layer with two pre-norms.

    mixer, feed_forward: rules of the two parts. mixer_name, feed_forward_name, feed_forward_norm: names in the layer.
    """
    return [
        Rule("input_layernorm.weight", "mixer_norm.weight"),
        *prefixed(mixer, f"{mixer_name}.", "mixer."),
        Rule(f"{feed_forward_norm}.weight", "feed_forward_norm.weight"),
        *prefixed(feed_forward, f"{feed_forward_name}.", "feed_forward."),
    ]


def read_model(keys: Keys, *, norm_eps: float = 1e-6) -> dict[str, Any]:
    """Return settings of `[model]` whose keys have the same names in most families. norm_eps: default of the family."""
    keys.only("hidden_act", "silu")
    return {
        "dim": keys.integer("hidden_size"),
        "norm_eps": keys.number("rms_norm_eps", norm_eps),
        "tie_embeddings": keys.flag("tie_word_embeddings", False),
    }


def write_model(model: Any) -> dict[str, Any]:
    """The inverse of `read_model`."""
    return {
        "hidden_size": model.spec.dim,
        "num_hidden_layers": len(model.blocks),
        "rms_norm_eps": model.spec.norm_eps,
        "tie_word_embeddings": model.spec.tie_embeddings,
        "hidden_act": "silu",
    }
